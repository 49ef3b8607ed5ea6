"""`int8_tensorwise`: symmetric int8 with one float32 scale per tensor or per row, ConvRot optional.

Stored: `weight` I8 `(N, K)`; `weight_scale` F32 `()` or `(N, 1)`. A scale of shape `(N,)` would
run, but multiplies along K when ComfyUI dequantizes. Rotated weights are stored rotated, with
`"convrot": true`; the runtime rotates activations and never undoes the weights' rotation.

Source: ComfyUI `comfy/quant_ops.py` (QUANT_ALGOS), comfy-kitchen `tensor/int8.py`
(TensorWiseINT8Layout) and `backends/eager/quantization.py` (`quantize_int8_rowwise`,
`quantize_int8_tensorwise`, `dequantize_int8_simple`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cq.core.dtypes import TensorSpec
from cq.core.formats import Fault
from cq.core.rotation import is_group, unrotate

if TYPE_CHECKING:
    import torch

_LEVELS = 127
_SMALLEST_SCALE = 1e-30  # comfy-kitchen's floor, so that an all-zero row divides by something


@dataclass(frozen=True, slots=True)
class Int8Grid:
    """The integers -127 to 127 times a scale. -128 stays unused: the grid is symmetric."""

    scaling: str

    def absmax(self, weight: torch.Tensor) -> torch.Tensor:
        """Shape `(rows, 1)` for rows, `()` for a tensor. NaN where a weight is."""
        import torch

        # Two reductions rather than magnitudes, which would be another copy of the weight.
        if self.scaling == "row":
            return torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
        return torch.maximum(weight.amax(), -weight.amin())

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """absmax / 127, at least 1e-30."""
        return (absmax / _LEVELS).clamp_(min=_SMALLEST_SCALE)

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Int8 codes; division rather than a product with the inverse, as comfy-kitchen divides."""
        import torch

        return (weight / scales).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)

    def values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """codes x scale in float32."""
        return codes.float() * scales


class Int8Tensorwise:
    """The format plug."""

    name = "int8_tensorwise"
    scalings = ("row", "tensor")
    first_comfyui = "0.27.0"

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

    def marker(self, group: int | None) -> dict[str, Any]:
        """The fields in the order of the official files, so that the bytes are equal to theirs."""
        settings: dict[str, Any] = {"format": self.name}
        if group is not None:
            settings |= {"convrot": True, "convrot_groupsize": group}
        return settings

    def grid(self, scaling: str) -> Int8Grid:
        """The int8 levels."""
        return Int8Grid(scaling)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes are stored as they are."""
        return codes

    def pack_scales(self, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scales are stored as they are."""
        return {"weight_scale": scales}

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

    def unpack(self, stored: Mapping[str, torch.Tensor], marker: Mapping[str, Any]) -> torch.Tensor:
        """codes x scale, rotated back if the marker says so."""
        scale = stored["weight_scale"].float()
        value = stored["weight"].float() * scale
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
