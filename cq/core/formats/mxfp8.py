"""`mxfp8`: float8 numbers in blocks of 32 along K, each with a power of two as its scale. Owns what
the formats share whose block scales lie in the order of tensor cores.

Stored: `weight` F8_E4M3 `(N', K')`, N and K rounded up to 32; `weight_scale` U8, a byte e per block
that stands for 2**(e - 127), swizzled `(N' up to 128, K'/32 up to 4)`. To comfy-kitchen the byte 0
means 0, so that blocks which are not zero get at least 1. The bytes' own dtype is F8_E8M0, and so
comfy-kitchen has them; but ComfyUI's own reader of files, which it uses where it manages the
device's memory itself, stops at a dtype that is not in its table. Layers view U8 as F8_E8M0.

Source: OCP Microscaling Formats 1.0; ComfyUI `comfy/quant_ops.py`, `comfy/utils.py` (`_TYPES`,
`load_safetensors`), comfy-kitchen `tensor/mxfp8.py` (TensorCoreMXFP8Layout) and
`backends/eager/quantization.py` (`quantize_mxfp8`, `dequantize_mxfp8`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core.dtypes import DTYPES, TensorSpec, torch_dtype
from cq.core.errors import InputError
from cq.core.formats import Fault, Format
from cq.core.formats.float8_e4m3fn import (
    CONTAINERS,
    container_fault,
    in_chunks,
    per_expert,
    refusal,
    snap_floats,
    widen,
)
from cq.core.grid import Scales, Steps
from cq.core.packing import pad, round_up, swizzle, swizzled_shape, unswizzle

if TYPE_CHECKING:
    import torch

_BLOCK = 32
_LARGEST = 448.0
_CHUNK = 1 << 18  # weights; less is slower by what each operation costs at least
_MAGNITUDE = 0x7FFFFFFF  # float32 without its sign


def block_absmax(blocks: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block. Shapes: `(…, block)` float32 to `(…)`."""
    import torch

    # Magnitudes are ordered as their bits are; torch reduces integers faster than floats.
    return (blocks.view(torch.int32) & _MAGNITUDE).amax(-1).view(torch.float32)


@dataclass(frozen=True, slots=True)
class Mxfp8Grid:
    """E4M3 numbers times a power of two per block; `columns` is K. Codes are `(rows, K')`."""

    columns: int
    scaling: ClassVar[str] = "block"
    surveys: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    @property
    def nbytes_work(self) -> int:
        """Beside the padded copy a chunk's ratios, if the segment is one chunk, and codes, and what
        belongs to blocks."""
        return work_nbytes(4 + 1 + 1, self.columns, _BLOCK)

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """Nothing reaches over all rows."""
        return {}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """ceil(log2(absmax / 448)) + 127 as U8 `(rows, K'/32)`, 1 to 254; 0 for zero blocks."""
        import torch

        blocks = _blocks(weight)
        found = weight.new_empty(blocks.shape[:2], dtype=torch.uint8)
        for part, out in in_chunks(_CHUNK, blocks, found):
            largest = block_absmax(part)
            # float32's log2, though it is inexact: above a power of two by an ulp the exponent
            # differs from the true one, and comfy-kitchen's codes are clipped as ours are.
            exponents = torch.log2((largest / _LARGEST).clamp_(min=2.0**-126)).ceil_()
            out.copy_(exponents.add_(127).clamp_(1, 254).mul_(largest != 0))
        return {"exponent": found}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """The plain rule: the next smaller power of two would clip half of the numbers' range."""
        return self.scales(weight, shared)

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes F8_E4M3, padded with zeros to a whole number of blocks."""
        import torch

        blocks, exponent = _blocks(weight), scales["exponent"]
        codes = weight.new_empty(blocks.shape, dtype=torch.float8_e4m3fn)
        step, empty = _powers(exponent), exponent == 0
        step[empty] = 1.0
        for part, own, out in in_chunks(_CHUNK, blocks, step, codes):
            out.copy_((part / own[..., None]).clamp_(-_LARGEST, _LARGEST))
        if bool(empty.any()):
            codes.view(torch.uint8)[empty] = 0  # positive zeros, also of negative ones
        return codes.flatten(1)

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """codes x 2**(exponent - 127) in float32."""
        return _values(codes, scales["exponent"])[:, : self.columns]

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Steps:
        """The step of each column's block."""
        step = _powers(scales["exponent"].T.index_select(0, chosen // _BLOCK))
        return Steps(step=step, snap=snap_floats(3, 2.0**-6, _LARGEST))


def work_nbytes(nbytes: int, columns: int, block: int) -> int:
    """Bytes per weight of a K of `columns`, if the padded copy is made where there is padding, and
    `nbytes` for each of its numbers."""
    padded = round_up(columns, block)
    copied = 0 if padded == columns else 4
    return -(-(copied + nbytes) * padded // columns)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    padded = pad(weight, round_up(weight.shape[1], _BLOCK))
    return padded.contiguous().view(weight.shape[0], -1, _BLOCK)


def _powers(exponent: torch.Tensor) -> torch.Tensor:
    """U8 exponents as float32: 2**(e - 127), but 0 for 0 and infinity for 255, as comfy-kitchen
    reads them."""
    import torch

    return (exponent.to(torch.int32) << 23).view(torch.float32)


def _values(codes: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    value = widen(codes)
    value.view(*exponent.shape, _BLOCK).mul_(_powers(exponent)[..., None])
    return value


class BlockScaled(Format):
    """What both formats share: weights padded to multiples of `block` on both sides, and an 8-bit
    scale for each `block` of columns, swizzled. The marker tells the shape where there is padding:
    ComfyUI knows it from the model and ignores the field."""

    scalings = ("block",)
    experts = True
    block: int
    scale_dtype: str
    scale_dtypes: frozenset[str]
    """Of the block scales as we store them; ComfyUI views U8 as well."""

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Any 2-D weight can be stored, in its original basis."""
        return refusal(weight, group)

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The name, and `orig_shape` if the weight is padded."""
        settings: dict[str, Any] = {"format": self.name}
        if self.padded(weight.shape) != weight.shape:
            settings["orig_shape"] = list(weight.shape)
        return settings

    def padded(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The sides of a weight `(N, K)` with its padding."""
        rows, columns = shape
        return round_up(rows, self.block), round_up(columns, self.block)

    @abstractmethod
    def sides(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """The padded weight's sides, from the stored weight's shape, which is 2-D."""
        ...

    def scale_spec(self, sides: tuple[int, int]) -> TensorSpec:
        """The spec of the block scales of a padded weight."""
        return TensorSpec(self.scale_dtype, swizzled_shape(sides[0], sides[1] // self.block))

    def check_blocks(self, stored: Mapping[str, TensorSpec]) -> list[Fault]:
        """What is wrong with the stored weight's shape and its block scales."""
        weight, scale = stored["weight"], stored.get("weight_scale")
        faults = []
        sides = self.sides(weight.shape) if len(weight.shape) == 2 else (0, 0)
        whole = all(side and side % self.block == 0 for side in sides)
        if not whole:
            faults.append(
                Fault(
                    "weight.shape",
                    f"stores its weight as {weight}; ComfyUI needs both sides padded to multiples"
                    f" of {self.block}",
                )
            )
        if scale is None:
            return [*faults, Fault("scale.missing", "has no `weight_scale`")]
        if scale.dtype not in self.scale_dtypes:
            wanted = " or ".join(sorted(self.scale_dtypes))
            faults.append(
                Fault("scale.dtype", f"has {scale.dtype} block scales; ComfyUI reads {wanted}")
            )
        if whole and scale.shape != self.scale_spec(sides).shape:
            faults.append(
                Fault(
                    "scale.shape",
                    f"has block scales of shape {list(scale.shape)}; ComfyUI needs them swizzled,"
                    f" {list(self.scale_spec(sides).shape)}",
                )
            )
        return faults

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """The marker's `orig_shape` if the stored sides are its padded ones; else N from the bias.

        Raises: InputError if the block scales are missing or do not fit the codes.
        """
        weight, scale = stored["weight"], stored.get("weight_scale")
        if scale is None:
            raise InputError("there is no `weight_scale` beside the codes", code="input.scale")
        if DTYPES[weight.dtype].bits != 8 or DTYPES[scale.dtype].bits != 8:
            raise InputError(
                f"codes and block scales are {weight.dtype} and {scale.dtype}, not single bytes",
                code="input.scale",
            )
        sides = self.sides(weight.shape) if len(weight.shape) == 2 else (0, 0)
        needed = self.scale_spec(sides)
        if (
            sides[1] % self.block
            or scale.shape not in {needed.shape, (needed.numel,)}
            or not sides[1]
        ):
            raise InputError(
                f"block scales of shape {list(scale.shape)} do not fit codes of shape"
                f" {list(weight.shape)}",
                hint=f"they must be swizzled: {list(needed.shape)}",
                code="input.scale",
            )
        told = marker.get("orig_shape")
        if (
            isinstance(told, list | tuple)
            and len(told) == 2
            and all(type(side) is int and side > 0 for side in told)
            and sides in {self.padded(tuple(told)), tuple(told)}
        ):
            return tuple(told)
        bias = stored.get("bias")
        if bias is not None and len(bias.shape) == 1 and 0 <= sides[0] - bias.shape[0] < self.block:
            return bias.shape[0], sides[1]
        return sides

    def block_scales(
        self, stored: torch.Tensor, start: int, rows: int, columns: int
    ) -> torch.Tensor:
        """The plain order `(rows, columns / block)` of stored scales, from row `start` on, in the
        dtype that we store."""
        blocks = columns // self.block
        order = stored.reshape(-1, swizzled_shape(1, blocks)[1])
        return unswizzle(order, start, rows, blocks).view(torch_dtype(self.scale_dtype))


class Mxfp8(BlockScaled):
    """The format plug."""

    name = "mxfp8"
    first_comfyui = "0.18.0"
    block = _BLOCK
    scale_dtype = "U8"
    scale_dtypes = frozenset({"U8", "F8_E8M0"})

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """`weight` F8_E4M3 and `weight_scale` U8."""
        sides = self.padded(weight.shape)
        return {"weight": TensorSpec("F8_E4M3", sides), "weight_scale": self.scale_spec(sides)}

    def sides(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """The stored shape."""
        rows, columns = stored
        return rows, columns

    def grid(self, weight: TensorSpec, scaling: str) -> Mxfp8Grid:
        """E4M3 numbers in blocks."""
        return Mxfp8Grid(weight.shape[1])

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes are stored as they are."""
        return codes

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Exponents, swizzled."""
        return {"weight_scale": swizzle(scales["exponent"])}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Dtypes, padding, and the swizzled shape of the scales."""
        stored = per_expert(stored)
        weight = stored.get("weight")
        if weight is None:
            return [Fault("weight.missing", "has no `weight`")]
        faults = []
        if weight.dtype in CONTAINERS:
            faults.append(container_fault(weight))
        elif weight.dtype != "F8_E4M3":
            faults.append(Fault("weight.dtype", f"stores its weight as {weight}, not as F8_E4M3"))
        return faults + self.check_blocks(stored)

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """F8_E4M3 codes beside a swizzled grid of exponents."""
        return stored["weight"].dtype == "F8_E4M3" and not self.check_blocks(stored)

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """codes x 2**(exponent - 127)."""
        import torch

        codes = rows.view(torch.float8_e4m3fn) if rows.dtype in {torch.uint8, torch.int8} else rows
        return _values(codes, self.block_scales(beside["weight_scale"], start, *codes.shape))


PLUG = Mxfp8()
