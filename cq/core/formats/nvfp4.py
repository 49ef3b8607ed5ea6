"""`nvfp4`: 4-bit floats (E2M1) in blocks of 16 along K, each with a float8 scale, and one float32
scale of the whole weight.

Stored: `weight` U8 `(N', K'/2)`, N and K rounded up to 16, two codes per byte, the even column in
the high nibble; `weight_scale` F8_E4M3, swizzled `(N' up to 128, K'/16 up to 4)`; `weight_scale_2`
F32 `()`. A code is its sign times 8 plus 0 to 7 for 0, 0.5, 1, 1.5, 2, 3, 4, 6.

Source: ComfyUI `comfy/quant_ops.py`, comfy-kitchen `tensor/nvfp4.py` (TensorCoreNVFP4Layout),
`backends/eager/quantization.py` (`quantize_nvfp4`, `dequantize_nvfp4`) and `float_utils.py`. The
search of block scales is our own; that larger scales than absmax / 6 can be better is told by "Four
Over Six", https://arxiv.org/abs/2512.02010.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core import tables
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Fault
from cq.core.formats.float8_e4m3fn import (
    in_chunks,
    per_expert,
    snap_floats,
    tensor_scale,
    widen,
)
from cq.core.formats.mxfp8 import BlockScaled, block_absmax, work_nbytes
from cq.core.grid import Scales, Steps
from cq.core.packing import pack_nibbles, pad, round_up, swizzle

if TYPE_CHECKING:
    import torch

_BLOCK = 16
_LARGEST = 6.0  # of E2M1
_LARGEST_SCALE = 448.0  # of E4M3
_CHUNK = 1 << 18  # weights; less is slower by what each operation costs at least
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_EXPONENT = 0x7F800000  # of a float32
_ONE, _FOUR = 0x3F800000, 0x40800000  # 1.0 and 4.0 as bits: the exponents of E2M1 are 1, 2 and 4
_EVEN = -2 * (127 + 22) % 8  # even, so that ties stay ties

# The search: E4M3 codes around the plain scale's, by their distance. From 0.8 times the scale to
# 1.5 times it and beyond, where a block's largest weight becomes a 4 rather than a 6; wider bounds
# gain nothing on normal weights.
_STEPS = (-2, -1, 1, 2, 3, 4, 5, 6)
_MANTISSAS = 8
# Over the magnitudes under the plain scale, at most 6.375; what lies beyond is in the last bin.
# Half as many bins lose 0.01 dB more to a full search, twice as many 0.002 less.
_BINS, _BINS_PER_UNIT = 832, 128
_SLACK = 2.0**-15  # of a gain: more than what float32 can round off between the table and the codes
# Below, the lowest candidate would be subnormal, and its ratio another one. Above lies the block
# with the weight's absmax, which must stay: the scale of the whole weight hangs on it, and with it
# whether quantizing the values once more gives the same values.
_LOWEST, _HIGHEST = 8 + 2, 0x7E - 1
_SMALLEST_STEP = 2.0**-100  # far from what float32 holds less precisely


@dataclass(frozen=True, slots=True)
class Nvfp4Grid:
    """E2M1 numbers times a block's and the whole weight's scale; `columns` is K. Codes are U8
    `(rows, K')`, the block scales F8_E4M3 `(rows, K'/16)`."""

    columns: int
    scaling: ClassVar[str] = "block"
    surveys: ClassVar[bool] = True
    searches: ClassVar[bool] = True

    @property
    def nbytes_work(self) -> int:
        """Beside the padded copy a chunk's three tensors to work in, if the segment is one chunk,
        and what belongs to blocks, codes included; more than the search's two, its importance and
        gains."""
        return work_nbytes(3 * 4 + 5, self.columns, _BLOCK)

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """absmax / (6 x 448) over all segments, at least 2**-126. Shapes: `()`."""
        return {"scale_2": tensor_scale(segments, _LARGEST * _LARGEST_SCALE)}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """absmax / 6 of each block over the shared scale, to the nearest E4M3."""
        import torch

        blocks = _blocks(weight)
        found = weight.new_empty(blocks.shape[:2], dtype=torch.float8_e4m3fn)
        for part, out in in_chunks(_CHUNK, blocks, found):
            needed = (block_absmax(part) / _LARGEST).div_(shared["scale_2"])
            out.copy_(needed.clamp_(max=_LARGEST_SCALE))
        return {"block": found}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """For each block the best of nine neighbouring E4M3 numbers, by what a table promises.

        The table holds by how much each candidate lowers the squared error of a magnitude, at
        least, so that sums over blocks are lower bounds: a block without a bound above zero keeps
        the plain rule's scale. No error is computed, and none grows.
        """
        import torch

        plain = self.scales(weight, shared)["block"]
        blocks, code = _blocks(weight), plain.view(torch.uint8)
        if importance is not None:
            columns = blocks.shape[1] * _BLOCK
            importance = pad(importance.float()[None], columns).view(1, -1, _BLOCK)
        step = _steps(plain, shared["scale_2"])
        inverse = (_BINS_PER_UNIT / step).clamp_(max=2.0**120)  # so that 0 stays 0
        best = _best(blocks, code, inverse, importance)
        move = tables.on(weight.device, _moves).index_select(0, best.flatten() & 7)
        free = (best > 7) & (code >= _LOWEST) & (code <= _HIGHEST) & (step >= _SMALLEST_STEP)
        moved = code + move.view(code.shape).mul_(free).to(torch.uint8)
        return {"block": moved.view(torch.float8_e4m3fn)}

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes 0 to 15, ties to even, padded with zeros to a whole number of blocks."""
        import torch

        blocks = _blocks(weight)
        step = _steps(scales["block"], scales["scale_2"])
        codes = weight.new_empty(blocks.shape, dtype=torch.uint8)
        for part, own, out, *work in _worked(3, blocks, _divisor(step), codes):
            torch.div(part, own[..., None], out=work[0])
            _encode(work, out)
        if not bool(step.amin() > 0):
            codes[step == 0] = 0  # positive zeros, also of negative weights
        return codes.flatten(1)

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """level x (scale of the weight x scale of the block) in float32."""
        import torch

        levels = tables.on(codes.device, _signed_levels)
        out = torch.empty(codes.shape, device=codes.device)
        for part, given, value in in_chunks(_CHUNK, codes, scales["block"], out):
            torch.index_select(levels, 0, part.flatten().int(), out=value.view(-1))
            _multiply(value, _steps(given, scales["scale_2"]))
        return out[:, : self.columns]

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Steps:
        """The step of each column's block."""
        import torch

        bits = scales["block"].view(torch.uint8).T.index_select(0, chosen // _BLOCK)
        step = _steps(bits.view(torch.float8_e4m3fn), scales["scale_2"])
        return Steps(step=step, snap=snap_floats(1, 1.0, _LARGEST))


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    padded = pad(weight, round_up(weight.shape[1], _BLOCK))
    return padded.contiguous().view(weight.shape[0], -1, _BLOCK)


def _steps(block: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """What a level of 1 stands for in each block, float32; 0 also where it underflows."""
    return widen(block).mul_(scale_2)


def _divisor(step: torch.Tensor) -> torch.Tensor:
    """Steps to divide by: infinity for 0."""
    import torch

    return step if bool(step.amin() > 0) else torch.where(step == 0, torch.inf, step)


def _multiply(value: torch.Tensor, step: torch.Tensor) -> None:
    value.view(*step.shape, _BLOCK).mul_(step[..., None])


def _worked(count: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """`in_chunks` of `tensors`, each with `count` more tensors of the first one's shape, in the
    memory of the chunk before: to allocate can cost more than to compute."""
    import torch

    work = tensors[0].new_empty(0, dtype=torch.float32)
    for chunk in in_chunks(_CHUNK, *tensors):
        if work.shape[1:] != chunk[0].shape:
            work = work.new_empty(count, *chunk[0].shape)
        yield (*chunk, *work)


def _encode(work: list[torch.Tensor], out: torch.Tensor) -> None:
    """Ratios of weights and steps, the first of three tensors to work in, to codes 0 to 15.

    E2M1 numbers of the exponent e (1, 2 or 4; 1 also below 1) are multiples of e/2. Added to e x
    2**22, whose last bit is worth e/2, a ratio is rounded to them, ties to even, by the addition
    itself, and the last bits of the sum count the multiples. With each exponent the code of the
    same count grows by two; `_EVEN` multiples more make codes of the last three bits.
    """
    import torch

    ratio = work[0]
    bits, sign, exponent = (tensor.view(torch.int32) for tensor in work)
    torch.bitwise_right_shift(bits, 31, out=sign)
    torch.bitwise_and(bits, _EXPONENT, out=exponent).clamp_(_ONE, _FOUR).add_((22 << 23) + _EVEN)
    ratio.abs_().clamp_(max=_LARGEST).add_(exponent.view(torch.float32))
    bits.add_(exponent.bitwise_right_shift_(22)).bitwise_and_(7)
    out.copy_(bits.sub_(sign, alpha=8))  # the sign is -1 or 0


def _best(
    blocks: torch.Tensor, code: torch.Tensor, inverse: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """The greatest of each block's gains, as float32 bits of which the last three are the place of
    its candidate; 7 or less if no candidate gains. Shapes: I32 `(rows, blocks)`."""
    import torch

    found = code.new_empty(code.shape, dtype=torch.int32)
    first = (code & (_MANTISSAS - 1)).float().mul_(_BINS)
    steps, table = (tables.on(code.device, own) for own in (_moves, _table))
    places = torch.arange(len(_STEPS), dtype=torch.int32, device=code.device)
    chunks = _worked(2, blocks, inverse, first, code, found)
    for part, scale, row, given, out, ratio, cell in chunks:
        torch.mul(part, scale[..., None], out=ratio)
        ratio.abs_().clamp_(max=_BINS - 1).add_(row[..., None])
        index = cell.view(torch.int32).copy_(ratio)
        weights = None if importance is None else importance.expand(part.shape).reshape(-1, _BLOCK)
        gains = torch.nn.functional.embedding_bag(
            index.view(-1, _BLOCK), table, mode="sum", per_sample_weights=weights
        )
        # Positive floats are ordered as their bits are, and negative ones are negative numbers: an
        # integer maximum finds value and place at once, in a third of the time.
        keys = gains.view(torch.int32).bitwise_and_(~7).bitwise_or_(places)
        top = (given.flatten() > _HIGHEST + 1 - _STEPS[-1]).nonzero().flatten()
        beyond = given.flatten()[top, None] + steps > _HIGHEST + 1  # such codes are no numbers
        keys[top] = keys[top].masked_fill(beyond, 0)
        torch.amax(keys.view(*out.shape, -1), -1, out=out)
    return found


@cache
def _moves() -> torch.Tensor:
    import torch

    return torch.tensor(_STEPS, dtype=torch.int32)


@cache
def _signed_levels() -> torch.Tensor:
    import torch

    return torch.tensor((*_LEVELS, *(-level for level in _LEVELS)))


@cache
def _table() -> torch.Tensor:
    """By how much each candidate lowers the squared error of the magnitudes in a bin, at least, in
    units of the plain scale's step; less than nothing where it raises the error.

    Between two normal E4M3 numbers the ratio depends on the steps between them and the mantissa of
    one, so that eight tables serve all scales. The difference of two errors is linear in the
    magnitude but where the nearest level changes, and where that of the plain scale does, it is
    greatest: bounds and candidates' ties are all that must be looked at. Shapes: `(8 * bins,
    candidates)`.
    """
    import torch

    mantissa = torch.arange(_MANTISSAS)[:, None]
    code = mantissa + torch.tensor(_STEPS)
    number = (1 + (code % _MANTISSAS) / 8) * 2.0 ** code.div(_MANTISSAS, rounding_mode="floor")
    ratio = (number / (1 + mantissa / 8)).double()[..., None]
    levels = torch.tensor(_LEVELS, dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2

    def gain(magnitude: torch.Tensor) -> torch.Tensor:
        plain = levels[torch.bucketize(magnitude, middles)] - magnitude
        moved = levels[torch.bucketize(magnitude / ratio, middles)] * ratio - magnitude
        return plain.square() - moved.square()

    bounds = torch.arange(_BINS + 1, dtype=torch.float64) / _BINS_PER_UNIT
    at_bounds = gain(bounds.repeat(*ratio.shape[:2], 1))
    least = torch.minimum(at_bounds[..., :-1], at_bounds[..., 1:])
    ties = ratio * middles
    bins = (ties * _BINS_PER_UNIT).long().clamp_(max=_BINS - 1)
    least = least.scatter_reduce(-1, bins, gain(ties), "amin") - _SLACK
    least[..., -1] = -1e30
    return least.transpose(1, 2).reshape(-1, len(_STEPS)).float().contiguous()


class Nvfp4(BlockScaled):
    """The format plug."""

    name = "nvfp4"
    first_comfyui = "0.8.0"
    largest_input = _LARGEST * _LARGEST_SCALE
    smooths = True
    block = _BLOCK
    scale_dtype = "F8_E4M3"
    scale_dtypes = frozenset({"U8", "F8_E4M3"})

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """`weight` U8, `weight_scale` F8_E4M3 and `weight_scale_2` F32."""
        rows, columns = self.padded(weight.shape)
        return {
            "weight": TensorSpec("U8", (rows, columns // 2)),
            "weight_scale": self.scale_spec((rows, columns)),
            "weight_scale_2": TensorSpec("F32", ()),
        }

    def sides(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """The stored shape, a byte being two columns."""
        rows, columns = stored
        return rows, 2 * columns

    def grid(self, weight: TensorSpec, scaling: str) -> Nvfp4Grid:
        """E2M1 numbers in blocks."""
        return Nvfp4Grid(weight.shape[1])

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pairs of codes as bytes."""
        return pack_nibbles(codes, high_first=True)

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Block scales swizzled, the weight's scale as it is."""
        return {"weight_scale": swizzle(scales["block"]), "weight_scale_2": scales["scale_2"]}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Dtypes, padding, the swizzled shape of the block scales, and a single F32 scale."""
        stored = per_expert(stored)
        weight, scale_2 = stored.get("weight"), stored.get("weight_scale_2")
        if weight is None:
            return [Fault("weight.missing", "has no `weight`")]
        faults = []
        if weight.dtype != "U8":
            faults.append(Fault("weight.dtype", f"stores its weight as {weight}, not as U8"))
        faults += self.check_blocks(stored)
        if scale_2 is None:
            return [*faults, Fault("scale.missing", "has no `weight_scale_2`")]
        if scale_2.dtype != "F32":
            faults.append(
                Fault("scale.dtype", f"has a {scale_2.dtype} `weight_scale_2`; ComfyUI needs F32")
            )
        if scale_2.shape != ():
            faults.append(
                Fault(
                    "scale.shape",
                    f"has a `weight_scale_2` of shape {list(scale_2.shape)}; ComfyUI needs []",
                )
            )
        return faults

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """The `weight_scale_2` that no other format has, beside a swizzled grid of scales."""
        packed = stored["weight"].dtype in {"U8", "I8"} and "weight_scale_2" in stored
        return packed and not self.check_blocks(stored)

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """See `BlockScaled.shape`. Raises: InputError also if the weight's scale is missing or is
        not one number."""
        scale_2 = stored.get("weight_scale_2")
        if scale_2 is None or scale_2.numel != 1:
            raise InputError(
                "there is no single `weight_scale_2` beside the codes", code="input.scale"
            )
        return super().shape(stored, marker)

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """level x (scale of the weight x scale of the block)."""
        import torch

        columns = 2 * rows.shape[1]
        block = self.block_scales(beside["weight_scale"], start, rows.shape[0], columns)
        scale_2 = beside["weight_scale_2"].float().reshape(())
        pairs, packed = tables.on(rows.device, _pairs), rows.contiguous().view(torch.uint8)
        out = packed.new_empty(rows.shape, dtype=torch.int64)
        for part, given, pair in in_chunks(_CHUNK // 2, packed, block, out):
            torch.index_select(pairs, 0, part.flatten().int(), out=pair.view(-1))
            _multiply(pair.view(torch.float32), _steps(given, scale_2))
        return out.view(torch.float32)


@cache
def _pairs() -> torch.Tensor:
    """The two float32 levels of each byte, moved as one 64-bit number: `(256,)`."""
    import torch

    levels, byte = _signed_levels(), torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=-1).view(torch.int64).flatten()


PLUG = Nvfp4()
