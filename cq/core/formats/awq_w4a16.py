"""`awq_w4a16`: unsigned 4-bit codes with a scale and a zero per group of 64 columns; activations
are not quantized.

A weight is (code - 8) x scale + zero. Stored: `weight` I8 `(N, K/2)`, two codes to a byte, the even
column in the low nibble; `weight_scale` and `weight_zeros` `(K/64, N)`, transposed, F16 for an F16
weight and BF16 for any other: the runtime computes in their dtype.

The name is the storage's. AWQ itself also scales columns by what activations need, which takes
calibration data; nothing here does.

`first_comfyui`: absent from 0.33.0, present in the 0.38 sources that were read; no release between
was, so 0.38.0 is the earliest to be promised.

Source: comfy-kitchen `tensor/awq_w4a16.py` (TensorCoreAWQW4A16Layout.dequantize) and
`backends/eager/awq.py` (`gemv_awq_w4a16`), which read it and have no quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core import tables
from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.errors import InputError
from cq.core.formats import Fault, Format
from cq.core.formats.convrot_w4a4 import packed_faults, packed_shape, settings_of
from cq.core.formats.float8_e4m3fn import in_chunks, refusal
from cq.core.grid import Scales, Steps
from cq.core.packing import pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    import torch

_GROUP = 64
_LOWEST, _HIGHEST = -8, 7  # codes less 8
_STEPS = 15
_SMALLEST = 1e-30  # stands in for a scale of 0, where all of a group is its zero
_CHUNK = 1 << 19  # weights that are searched together; less is slower by what each operation costs
_BINS = 512
# Shares of a group's range that are cut off at its ends, each tried at the low and the high end.
# The refit after the choice makes up for coarse steps.
_FINE = (-0.015, 0.015, 0.03, 0.045)
_COARSE = (0.1, 0.2, 0.3, 0.4)
_CUTS = (
    *((low, high) for low in _FINE for high in _FINE),
    *((cut, 0.0) for cut in _COARSE),
    *((0.0, cut) for cut in _COARSE),
    *((cut, cut) for cut in _COARSE[:2]),
)
_LAST_BITS = 31  # enough for a candidate's number


@dataclass(frozen=True, slots=True)
class ZeroedGrid:
    """16 evenly spaced levels per group, `dtype` that of scales and zeros."""

    dtype: str
    scaling: ClassVar[str] = "block"
    surveys: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    # A search, if the segment is one chunk: the rows in one piece, offsets, codes and a product of
    # them (or bins, and errors of 26 candidates for each 64 weights), importance spread over them;
    # and what belongs to groups
    nbytes_work: ClassVar[int] = 4 + 4 + 4 + 4 + 4 + 1

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """Nothing: no scale reaches beyond a group."""
        return {}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """The range / 15, and the zero that puts the middle of the range between codes 7 and 8.

        Both are rounded to the stored dtype, the zero after the scale and for it. Shapes:
        `(rows, K/64)`, twice.
        """
        scale, zero = self._stored(*_reach(weight))
        return {"scale": scale, "zero": zero}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """A smaller range clips few weights and rounds all others more finely.

        A group's weights are put into bins over its range, each bin adds its tabled error under
        every candidate, and the best candidate is refitted by least squares to the codes it gives.
        The result replaces the plain scale and zero where its error, measured exactly and with
        stored numbers, is smaller.
        """

        found = weight.new_empty(
            2, weight.shape[0], weight.shape[1] // _GROUP, dtype=torch_dtype(self.dtype)
        )
        for part, scale, zero in in_chunks(_CHUNK, weight, *found):
            best = self._search(part.contiguous(), importance)
            scale.copy_(best[0])
            zero.copy_(best[1])
        return {"scale": found[0], "zero": found[1]}

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes 0 to 15 as int8."""
        import torch

        groups = weight.reshape(*scales["scale"].shape, _GROUP)
        codes = _codes(groups, scales["scale"].float(), scales["zero"].float())
        return codes.sub_(_LOWEST).to(torch.int8).view(weight.shape)

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """(codes - 8) x scale + zero in float32."""
        groups = codes.float().add_(_LOWEST).view(*scales["scale"].shape, _GROUP)
        value = groups.mul_(scales["scale"].float()[..., None])
        return value.add_(scales["zero"].float()[..., None]).view(codes.shape)

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Steps:
        """Step and zero of each column's group."""
        step, zero = (
            scales[name].T.index_select(0, chosen // _GROUP).float() for name in ("scale", "zero")
        )
        return Steps(step=step, zero=zero, snap=lambda x: x.round_().clamp_(_LOWEST, _HIGHEST))

    def _stored(self, low: torch.Tensor, extent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of groups that begin at `low`, in the stored dtype."""
        dtype = torch_dtype(self.dtype)
        scale = (extent / _STEPS).to(dtype)
        return scale, (low + extent / 2 + scale.float() / 2).to(dtype)

    def _search(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The better of the plain and the refitted best candidate, group by group."""
        import torch

        low, extent = _reach(weight)
        scale, zero = self._stored(low, extent)
        groups = weight.view(*scale.shape, _GROUP)
        share = None if importance is None else importance.view(-1, _GROUP)
        offsets = groups - low[..., None]
        best = _promising(offsets, extent, share)
        cuts = tables.on(weight.device, _cuts)[best].view(*scale.shape, 2)
        cut_low, cut_high = cuts.unbind(-1)
        tried = self._stored(cut_low * extent, (1 - cut_low - cut_high) * extent)
        fitted = self._refit(offsets, low, _codes(offsets, *(t.float() for t in tried)), share)
        better = _error(groups, *fitted, share) < _error(groups, scale, zero, share)
        return torch.where(better, fitted[0], scale), torch.where(better, fitted[1], zero)

    def _refit(
        self,
        offsets: torch.Tensor,
        low: torch.Tensor,
        codes: torch.Tensor,
        share: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of least squared error for given codes, from what weights are above the
        group's lowest, which may be far from 0."""
        import torch

        dtype = torch_dtype(self.dtype)
        weighted = codes if share is None else codes * share
        total = float(_GROUP) if share is None else share.sum(-1)
        mean_code = weighted.sum(-1) / total
        mean = (offsets if share is None else offsets * share).sum(-1) / total
        product = (weighted * offsets).sum(-1) - mean_code * mean * total
        square = (weighted * codes).sum(-1) - mean_code.square() * total
        scale = torch.where(square > 0, product / square, 0).to(dtype)
        return scale, (low + mean - scale.float() * mean_code).to(dtype)


def _reach(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest weight of each group, and how far above it the highest is."""
    groups = weight.reshape(weight.shape[0], -1, _GROUP)
    low = groups.amin(-1)
    return low, groups.amax(-1) - low


def _codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The nearest codes less 8, as float32."""
    steps = (groups - zero[..., None]).div_(scale.clamp(min=_SMALLEST)[..., None])
    return steps.round_().clamp_(_LOWEST, _HIGHEST)


def _promising(
    offsets: torch.Tensor, extent: torch.Tensor, share: torch.Tensor | None
) -> torch.Tensor:
    """The candidate of least error by the table for each group. Shapes: int32 `(groups,)`."""
    import torch

    bins = (offsets * (_BINS / extent.clamp(min=_SMALLEST))[..., None]).to(torch.int32)
    weights = None if share is None else share.expand(offsets.shape).reshape(-1, _GROUP)
    errors = torch.nn.functional.embedding_bag(
        bins.view(-1, _GROUP).clamp_(max=_BINS),
        tables.on(offsets.device, _error_table),
        mode="sum",
        per_sample_weights=weights,
    )
    # Errors are ordered as their bits are. With the candidate's number in their last bits the least
    # is found with its place, in a third of the time.
    numbers = torch.arange(len(_CUTS), dtype=torch.int32, device=errors.device)
    keys = errors.view(torch.int32).bitwise_and_(~_LAST_BITS).bitwise_or_(numbers)
    return keys.amin(1).bitwise_and_(_LAST_BITS)


def _error(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, share: torch.Tensor | None
) -> torch.Tensor:
    """Squared error of nearest rounding, group by group."""
    step, middle = scale.float(), zero.float()
    value = _codes(groups, step, middle).mul_(step[..., None]).add_(middle[..., None])
    error = value.sub_(groups).square_()
    return (error if share is None else error.mul_(share)).sum(-1)


@cache
def _cuts() -> torch.Tensor:
    import torch

    return torch.tensor(_CUTS, dtype=torch.float32)


@cache
def _error_table() -> torch.Tensor:
    """Squared error of a weight at `bin / _BINS` of its group's range under each candidate, in
    shares of the range. Shapes: `(_BINS + 1, len(_CUTS))`."""
    import torch

    place = (torch.arange(_BINS + 1, dtype=torch.float64) + 0.5) / _BINS
    place[-1] = 1.0  # the bin of the largest weight alone
    low, high = torch.tensor(_CUTS, dtype=torch.float64).unbind(1)
    scale = (1 - low - high) / _STEPS
    codes = ((place[:, None] - low) / scale).round_().clamp_(0, _STEPS)
    return (codes * scale + low - place[:, None]).square_().float()


class AwqW4A16(Format):
    """The format plug."""

    name = "awq_w4a16"
    scalings = ("block",)
    first_comfyui = "0.38.0"

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """K must be a multiple of 64."""
        reason = refusal(weight, group)
        if reason is None and weight.shape[1] % _GROUP:
            return f"K={weight.shape[1]} is not a multiple of {_GROUP}"
        return reason

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """Codes, and transposed scales and zeros."""
        rows, columns = weight.shape
        beside = TensorSpec(_dtype(weight), (columns // _GROUP, rows))
        return {
            "weight": TensorSpec("I8", (rows, columns // 2)),
            "weight_scale": beside,
            "weight_zeros": beside,
        }

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The name and the group."""
        return {"format": self.name, "group_size": _GROUP}

    def grid(self, weight: TensorSpec, scaling: str) -> ZeroedGrid:
        """16 levels per group."""
        return ZeroedGrid(_dtype(weight))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pairs of codes as bytes."""
        import torch

        return pack_nibbles(codes, high_first=False).view(torch.int8)

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Scales and zeros transposed."""
        return {
            "weight_scale": scales["scale"].T.contiguous(),
            "weight_zeros": scales["zero"].T.contiguous(),
        }

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Dtypes, the group, and transposed scales and zeros of one dtype."""
        weight = stored.get("weight")
        if weight is None:
            return [Fault("weight.missing", "has no `weight`")]
        faults = packed_faults(weight, 2)
        missing = [name for name in _BESIDE if name not in stored]
        if missing:
            return faults + [Fault("scale.missing", f"has no `{name}`") for name in missing]
        dtypes = {stored[name].dtype for name in _BESIDE}
        if len(dtypes) > 1 or not dtypes <= {"F16", "BF16"}:
            told = " and ".join(stored[name].dtype for name in _BESIDE)
            sentence = f"has scales and zeros in {told}; ComfyUI needs both in BF16 or F16"
            faults.append(Fault("scale.dtype", sentence))
        if len(weight.shape) != 2:
            return faults
        (rows, columns), group = packed_shape(weight), _group_size(marker)
        if group <= 0 or columns % group:
            sentence = f"has groups of {group}, which do not divide K={columns}"
            return [*faults, Fault("group.size", sentence)]
        for name in _BESIDE:
            if stored[name].shape != (columns // group, rows):
                sentence = f"has a `{name}` of shape {list(stored[name].shape)}; ComfyUI needs"
                sentence = f"{sentence} {[columns // group, rows]}, transposed"
                faults.append(Fault("scale.shape", sentence))
        return faults

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """The `weight_zeros` that no other format has, of the shape that groups give them."""
        weight, zeros = stored["weight"], stored.get("weight_zeros")
        if weight.dtype not in {"I8", "U8"} or len(weight.shape) != 2 or zeros is None:
            return False
        (rows, columns), group = packed_shape(weight), _group_size(marker)
        return group > 0 and columns % group == 0 and zeros.shape == (columns // group, rows)

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """Two columns to a byte. Raises: InputError if scales or zeros do not fit."""
        rows, columns = packed_shape(stored["weight"])
        group = _group_size(marker)
        for name in _BESIDE:
            if name not in stored:
                raise InputError(f"there is no `{name}` beside the codes", code="input.scale")
            shape = stored[name].shape
            if group <= 0 or columns % group or shape != (columns // group, rows):
                raise InputError(
                    f"a `{name}` of shape {list(shape)} does not fit a weight of shape"
                    f" {[rows, columns]} in groups of {group}",
                    code="input.scale",
                )
        return rows, columns

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """(code - 8) x scale + zero."""
        count = rows.shape[0]
        scale, zero = (beside[name][:, start : start + count].T.float() for name in _BESIDE)
        codes = unpack_nibbles(rows, high_first=False)
        groups = codes.float().add_(_LOWEST).view(*scale.shape, -1)
        return groups.mul_(scale[..., None]).add_(zero[..., None]).view(codes.shape)


_BESIDE = ("weight_scale", "weight_zeros")


def _dtype(weight: TensorSpec) -> str:
    """The stored dtype of scales and zeros."""
    return "F16" if weight.dtype == "F16" else "BF16"


def _group_size(marker: Mapping[str, Any]) -> int:
    """The columns that share a scale; 0 for what is no number."""
    group = settings_of(marker).get("group_size", _GROUP)
    return group if type(group) is int else 0


PLUG = AwqW4A16()
