"""`convrot_w4a4`: signed 4-bit codes with a float32 scale per row, in the rotated basis.

Stored: `weight` I8 `(N, K/2)`, two codes to a byte, the even column in the low nibble;
`weight_scale` F32 `(N,)`, exactly one-dimensional. The runtime rotates and quantizes activations.

Source: comfy-kitchen `tensor/convrot_w4a4.py` and `backends/eager/convrot_w4a4.py`
(`quantize_convrot_w4a4_weight`, `dequantize_convrot_w4a4_weight`), `backends/eager/svdquant.py`
(`_pack_int4_row_major`); ConvRot, arXiv 2512.03673.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core import tables
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Fault, Format
from cq.core.formats.float8_e4m3fn import in_chunks, per_expert
from cq.core.formats.int8_tensorwise import convrot_group, snap_integers
from cq.core.grid import Scales, Steps
from cq.core.packing import fits, pack_nibbles, spread, unpack_nibbles
from cq.core.rotation import GROUPS, is_group, unrotate

if TYPE_CHECKING:
    import torch

_LEVELS = 7
_SMALLEST_ABSMAX = 1e-10  # comfy-kitchen's floor, so that an all-zero row divides by something
_MULTIPLE = 64  # columns that the 4-bit matrix product takes at a time
_CHUNK = 1 << 19  # weights that are searched together; less is slower by what each operation costs
_BINS = 512
# Shares of the row's largest weight that level 7 may stand for. Steps of 4 per cent: the refit
# after the choice is finer than any steps.
_SHARES = tuple(1.05 * 0.96**i for i in range(32))


@dataclass(frozen=True, slots=True)
class Int4Grid:
    """The integers -7 to 7 times a scale per row. -8 stays unused: the grid is symmetric."""

    scaling: ClassVar[str] = "row"
    surveys: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    # A search, if the segment is one chunk: the rows in one piece, codes and a product of them (or
    # bins, first as floats), importance spread over the rows
    nbytes_work: ClassVar[int] = 4 + 4 + 4 + 4

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """Nothing: no scale reaches beyond a row."""
        return {}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """absmax / 7, the absmax at least 1e-10. Shapes: `(rows,)`."""
        import torch

        absmax = torch.maximum(weight.amax(1), -weight.amin(1))
        return {"scale": absmax.clamp_(min=_SMALLEST_ABSMAX) / _LEVELS}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """A smaller scale clips the few large weights and rounds all others more finely.

        A row's magnitudes are counted into bins, each bin adds its tabled error under every
        candidate, and the best candidate is refitted by least squares to the codes it gives. The
        result replaces the plain scale where its error, measured exactly, is smaller.
        """
        import torch

        given = self.scales(weight, shared)["scale"]
        chosen = torch.empty_like(given)
        for part, plain, out in in_chunks(_CHUNK, weight, given, chosen):
            out.copy_(_search(part.contiguous(), plain, importance))
        return {"scale": chosen}

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Int8 codes; division rather than a product with the inverse, as comfy-kitchen divides."""
        import torch

        return _scaled_codes(weight, scales["scale"][:, None]).to(torch.int8)

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """codes x scale in float32."""
        return codes.float() * scales["scale"][:, None]

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Steps:
        """The same step in all columns."""
        return Steps(step=scales["scale"][None], snap=snap_integers(_LEVELS))


def _scaled_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).round_().clamp_(-_LEVELS, _LEVELS)


@cache
def _shares() -> torch.Tensor:
    import torch

    return torch.tensor(_SHARES, dtype=torch.float32)


@cache
def _error_table() -> torch.Tensor:
    """Squared error of a magnitude of `bin / _BINS` absmax under each candidate, in absmax^2.

    Shapes: `(_BINS + 1, len(_SHARES))`.
    """
    import torch

    magnitude = (torch.arange(_BINS + 1, dtype=torch.float64) + 0.5) / _BINS
    magnitude[-1] = 1.0  # the bin of the largest weight alone
    scale = torch.tensor(_SHARES, dtype=torch.float64) / _LEVELS
    codes = (magnitude[:, None] / scale).round_().clamp_(max=_LEVELS)
    return (codes * scale - magnitude[:, None]).square_().float()


def _search(
    weight: torch.Tensor, plain: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """The better of the plain scale and the refitted best candidate, row by row."""
    import torch

    shares = tables.on(weight.device, _shares)
    scale = shares[_tabled(weight, plain, importance).argmin(1)] * plain
    codes = _scaled_codes(weight, scale[:, None])
    weighted = codes if importance is None else codes * importance
    refitted = (weighted * weight).sum(1) / weighted.mul_(codes).sum(1)
    # A row of zeros has no codes to fit to, and underflow could make the scale 0.
    refitted = torch.where(refitted > 0, refitted, plain)
    better = _error(weight, refitted, importance) < _error(weight, plain, importance)
    return torch.where(better, refitted, plain)


def _tabled(
    weight: torch.Tensor, plain: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """The tabled errors of each row under each candidate, `(rows, len(_SHARES))`."""
    import torch

    bins = weight.abs().mul_((_BINS / _LEVELS / plain)[:, None]).to(torch.int32)
    # A row's own absmax can land on the last bin's far side by rounding, no further.
    return torch.nn.functional.embedding_bag(
        bins.clamp_(max=_BINS),
        tables.on(weight.device, _error_table),
        mode="sum",
        per_sample_weights=None if importance is None else importance.expand(weight.shape),
    )


def _error(
    weight: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Squared error of nearest rounding, row by row."""
    error = _scaled_codes(weight, scale[:, None]).mul_(scale[:, None]).sub_(weight).square_()
    return (error if importance is None else error.mul_(importance)).sum(1)


class ConvrotW4A4(Format):
    """The format plug."""

    name = "convrot_w4a4"
    scalings = ("row",)
    first_comfyui = "0.28.0"
    rotation = "always"
    experts = True

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """K must be a multiple of 64 and of a rotation group."""
        return rotated_refusal(weight, _MULTIPLE, group)

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """`weight` I8 and `weight_scale` F32."""
        rows, columns = weight.shape
        return {
            "weight": TensorSpec("I8", (rows, columns // 2)),
            "weight_scale": TensorSpec("F32", (rows,)),
        }

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The name and the rotation group."""
        return {"format": self.name, "convrot_groupsize": group}

    def grid(self, weight: TensorSpec, scaling: str) -> Int4Grid:
        """The int4 levels."""
        return Int4Grid()

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pairs of codes as bytes, in two's complement."""
        import torch

        return pack_nibbles(codes, high_first=False).view(torch.int8)

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Scales are stored as they are."""
        return {"weight_scale": scales["scale"]}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Dtypes, the scale's one dimension, the rotation group, and the activations' dtype."""
        stored = per_expert(stored)
        weight, scale = stored.get("weight"), stored.get("weight_scale")
        if weight is None:
            return [Fault("weight.missing", "has no `weight`")]
        faults = packed_faults(weight, _MULTIPLE)
        if scale is None:
            faults.append(Fault("scale.missing", "has no `weight_scale`"))
        else:
            if scale.dtype != "F32":
                faults.append(Fault("scale.dtype", f"has a {scale.dtype} scale; ComfyUI needs F32"))
            if scale.shape != weight.shape[:1]:
                faults.append(
                    Fault(
                        "scale.shape",
                        f"has a scale of shape {list(scale.shape)}; ComfyUI needs"
                        f" {list(weight.shape[:1])}",
                    )
                )
        kind = settings_of(marker).get("linear_dtype", "int4")
        if kind not in ("int4", "int8"):
            faults.append(
                Fault("marker.linear_dtype", "has a `linear_dtype` that is not int4 or int8")
            )
        return faults + group_faults(marker, 2 * weight.shape[-1] if weight.shape else 0)

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """Bytes of whole groups of columns and one dimension of scales, or a `linear_dtype`, which
        only its marker has. A `convrot` or `per_row` speaks of int8."""
        weight, scale = stored["weight"], stored.get("weight_scale")
        if packed_faults(weight, _MULTIPLE) or scale is None or not scale.is_float:
            return False
        if "convrot" in marker or "per_row" in marker:
            return False
        rows = weight.shape[:1]
        return scale.shape == rows or (scale.shape == (*rows, 1) and "linear_dtype" in marker)

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """Two columns to a byte. Raises: InputError if the scale or the rotation does not fit."""
        rows, columns = packed_shape(stored["weight"])
        if "weight_scale" not in stored:
            raise InputError("there is no `weight_scale` beside the codes", code="input.scale")
        scale = stored["weight_scale"].shape
        if not fits(scale, (rows, columns)):
            raise InputError(
                f"a scale of shape {list(scale)} does not fit a weight of shape {[rows, columns]}",
                code="input.scale",
            )
        see_group(marker, columns)
        return rows, columns

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """codes x scale, rotated back."""
        import torch

        codes = unpack_nibbles(rows, high_first=False).view(torch.int8)
        value = codes.bitwise_xor_(8).sub_(8).float()  # the sign is the nibble's highest bit
        value.mul_(spread(beside["weight_scale"], start, *value.shape))
        return unrotate(value, rotation_group(marker))


# What formats of packed 4-bit codes in the rotated basis share -----------------------------------


def rotated_refusal(weight: TensorSpec, multiple: int, group: int | None) -> str | None:
    """Why a format of rotated 2-D weights, whose K is a multiple of `multiple`, cannot store
    `weight`, or None. `group` None is the lack of a rotation group that divides K."""
    if len(weight.shape) != 2:
        return f"its weight is {len(weight.shape)}-D"
    if 0 in weight.shape:
        return "its weight is empty"
    columns = weight.shape[1]
    if columns % multiple:
        return f"K={columns} is not a multiple of {multiple}"
    if group is None:
        return f"K={columns} is not a multiple of a rotation group ({GROUPS[-1]} at least)"
    return (
        f"K={columns} is not a multiple of the rotation group {group}" if columns % group else None
    )


def settings_of(marker: Mapping[str, Any]) -> dict[str, Any]:
    """A marker's settings, those of its `params` object among them."""
    nested = marker.get("params")
    return {**(nested if isinstance(nested, dict) else {}), **marker}


def rotation_group(marker: Mapping[str, Any]) -> int:
    """The rotation group of a layer that is always rotated; 0 for one that is no number."""
    return convrot_group({**marker, "convrot": True}) or 0


def group_faults(marker: Mapping[str, Any], columns: int) -> list[Fault]:
    """A fault if ComfyUI cannot build the rotation, or not apply it to so many columns."""
    group = rotation_group(marker)
    if is_group(group) and columns % group == 0:
        return []
    return [
        Fault(
            "convrot.group",
            f"has the rotation group {group}, which must be a power of 4 that divides K={columns}",
        )
    ]


def see_group(marker: Mapping[str, Any], columns: int) -> None:
    """Raise InputError if the rotation cannot be undone."""
    for _, sentence in group_faults(marker, columns):
        raise InputError(f"the layer {sentence}", code="input.rotation")


def packed_shape(weight: TensorSpec) -> tuple[int, int]:
    """The shape of a weight of two columns to a byte. Raises: InputError if it is not 2-D."""
    if len(weight.shape) != 2:
        raise InputError(f"codes of shape {list(weight.shape)} are not 2-D", code="input.scale")
    return weight.shape[0], 2 * weight.shape[1]


def packed_faults(weight: TensorSpec, multiple: int) -> list[Fault]:
    """Faults of a stored weight of two columns to a byte, K a multiple of `multiple`."""
    faults = []
    if weight.dtype != "I8":
        faults.append(Fault("weight.dtype", f"stores its weight as {weight}, not as I8"))
    if len(weight.shape) != 2:
        faults.append(Fault("weight.shape", f"stores its weight as {weight}, which is not 2-D"))
    elif 2 * weight.shape[1] % multiple:
        faults.append(
            Fault("weight.shape", f"has K={2 * weight.shape[1]}, not a multiple of {multiple}")
        )
    return faults


PLUG = ConvrotW4A4()
