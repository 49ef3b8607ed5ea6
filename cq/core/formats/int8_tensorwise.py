"""`int8_tensorwise`: symmetric int8 with one float32 scale per tensor or per row, ConvRot optional.

Stored: `weight` I8 `(N, K)`; `weight_scale` F32 `()` or `(N, 1)`. A scale of shape `(N,)` would
run, but multiplies along K when ComfyUI dequantizes. Rotated weights are stored rotated, with
`"convrot": true`; the runtime rotates activations and never undoes the weights' rotation.

Source: ComfyUI `comfy/quant_ops.py` (QUANT_ALGOS), comfy-kitchen `tensor/int8.py`
(TensorWiseINT8Layout) and `backends/eager/quantization.py` (`quantize_int8_rowwise`,
`quantize_int8_tensorwise`, `dequantize_int8_simple`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Fault, Format, plain_shape
from cq.core.grid import Scales, Steps
from cq.core.packing import spread
from cq.core.rotation import is_group, unrotate

if TYPE_CHECKING:
    import torch

_LEVELS = 127
_SMALLEST_SCALE = 1e-30  # comfy-kitchen's floor, so that an all-zero row divides by something


@dataclass(frozen=True, slots=True)
class Int8Grid:
    """The integers -127 to 127 times a scale. -128 stays unused: the grid is symmetric."""

    scaling: str
    searches: ClassVar[bool] = False
    nbytes_work: ClassVar[int] = 4 + 1  # the scaled copy and the codes

    @property
    def surveys(self) -> bool:
        """Whether one scale reaches over all rows."""
        return self.scaling == "tensor"

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """absmax / 127 over all segments."""
        import torch

        largest = torch.stack([torch.maximum(s.amax(), -s.amin()) for s in segments]).amax()
        return {"scale": _scale(largest)}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """absmax / 127, at least 1e-30. Shapes: `(rows, 1)`."""
        import torch

        if self.surveys:
            return {}
        # Two reductions rather than magnitudes, which would be another copy of the weight.
        absmax = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
        return {"scale": _scale(absmax)}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """The plain rule: at 8 bits smaller scales gain nothing, and clipping a scale that many
        rows share is a gamble."""
        return self.scales(weight, shared)

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Int8 codes; division rather than a product with the inverse, as comfy-kitchen divides."""
        import torch

        return (weight / scales["scale"]).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """codes x scale in float32."""
        return codes.float() * scales["scale"]

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Steps:
        """The same step in all columns."""
        return Steps(step=scales["scale"].reshape(1, -1), snap=snap_integers(_LEVELS))


def snap_integers(levels: int) -> Callable[[torch.Tensor], object]:
    """Rounds ratios in place to the integers up to `levels` either way, ties to even."""
    return lambda ratio: ratio.round_().clamp_(-levels, levels)


def _scale(absmax: torch.Tensor) -> torch.Tensor:
    return (absmax / _LEVELS).clamp_(min=_SMALLEST_SCALE)


class Int8Tensorwise(Format):
    """The format plug."""

    name = "int8_tensorwise"
    scalings = ("row", "tensor")
    first_comfyui = "0.27.0"
    rotation = "optional"
    keeps_shape = True
    embeddings = True
    experts = True
    aliases = ("int8_axiswise",)

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Any 2-D weight can be stored; a rotation group must divide K."""
        if len(weight.shape) != 2:
            return f"its weight is {len(weight.shape)}-D"
        if 0 in weight.shape:
            return "its weight is empty"
        if group is not None and weight.shape[1] % group:
            return f"K={weight.shape[1]} is not a multiple of the rotation group {group}"
        return None

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """`weight` I8 and `weight_scale` F32."""
        return {
            "weight": TensorSpec("I8", weight.shape),
            "weight_scale": TensorSpec("F32", (weight.shape[0], 1) if scaling == "row" else ()),
        }

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The fields in the order of the official files, so that the bytes are equal to theirs."""
        settings: dict[str, Any] = {"format": self.name}
        if group is not None:
            settings |= {"convrot": True, "convrot_groupsize": group}
        return settings

    def grid(self, weight: TensorSpec, scaling: str) -> Int8Grid:
        """The int8 levels."""
        return Int8Grid(scaling)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes are stored as they are."""
        return codes

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Scales are stored as they are."""
        return {"weight_scale": scales["scale"]}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Dtypes, scale shape, and a rotation group that ComfyUI can build and apply."""
        faults = []
        weight, scale = stored.get("weight"), stored.get("weight_scale")
        if weight is None:
            return [Fault("weight.missing", "has no `weight`")]
        if weight.dtype != "I8" or len(weight.shape) != 2:
            faults.append(Fault("weight.dtype", f"stores its weight as {weight}, not as 2-D I8"))
        if scale is None:
            faults.append(Fault("scale.missing", "has no `weight_scale`"))
        else:
            if scale.dtype != "F32":
                faults.append(Fault("scale.dtype", f"has a {scale.dtype} scale; ComfyUI needs F32"))
            if scale.shape not in {(), (*weight.shape[:1], 1)}:
                faults.append(
                    Fault(
                        "scale.shape",
                        f"has a scale of shape {list(scale.shape)}; ComfyUI needs []"
                        f" or [{weight.shape[0] if weight.shape else 0}, 1]",
                    )
                )
        group = convrot_group(marker)
        if group is not None and (
            not is_group(group) or (len(weight.shape) == 2 and weight.shape[1] % group)
        ):
            faults.append(
                Fault(
                    "convrot.group",
                    f"has the rotation group {group}, which must be a power of 4 that divides K",
                )
            )
        return faults

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """I8 codes and a scale of rows or of the tensor. A `linear_dtype` speaks of others."""
        weight, scale = stored["weight"], stored.get("weight_scale")
        if weight.dtype != "I8" or scale is None or not scale.is_float or "linear_dtype" in marker:
            return False
        rows = weight.shape[0] if weight.shape else 0
        return scale.shape in {(), (1,), (1, 1), (rows,), (rows, 1)}

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """The stored weight's own. Raises: InputError if the scale or the rotation does not fit."""
        shape = plain_shape(stored)
        group = convrot_group(marker)
        if group is not None and (not is_group(group) or shape[1] % group):
            raise InputError(
                f"the rotation group {group} is no power of 4 that divides K={shape[1]}",
                code="input.rotation",
            )
        return shape

    def unturned(self, marker: Mapping[str, Any]) -> tuple[Mapping[str, Any], int | None]:
        """Without the rotation's flag, wherever it stands."""
        return {"format": self.name}, convrot_group(marker)

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """codes x scale, rotated back if the marker says so."""
        value = rows.float().mul_(spread(beside["weight_scale"], start, *rows.shape))
        group = convrot_group(marker)
        return value if group is None else unrotate(value, group)


def convrot_group(marker: Mapping[str, Any]) -> int | None:
    """The rotation group that ComfyUI would use for a layer, or None.

    The fields may stand in a `params` object as well; a group without a number counts as 0, which
    no check lets pass.
    """
    nested = marker.get("params")
    settings = {**(nested if isinstance(nested, dict) else {}), **marker}
    if not settings.get("convrot"):
        return None
    group = settings.get("convrot_groupsize", 256)
    return group if type(group) is int else 0


PLUG = Int8Tensorwise()
