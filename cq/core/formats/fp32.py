"""`fp32`: a plain cast to float32. Owns what all plain dtypes share: no marker, no scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.formats import Fault, Format
from cq.core.grid import Grid

if TYPE_CHECKING:
    import torch


class Cast(Format):
    """A plain dtype as a format: every floating-point tensor is cast, whatever its shape."""

    scalings = ("none",)
    first_comfyui = None  # there is no release that does not read plain floats
    keeps_shape = True
    embeddings = True
    experts = True
    casts = True

    def __init__(self, name: str, dtype: str) -> None:
        self.name = name
        self.dtype = dtype

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Only numbers that are not floating point."""
        return None if weight.is_float else f"its weight is {weight.dtype}, not floating point"

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """The same shape in the format's dtype."""
        return {"weight": TensorSpec(self.dtype, weight.shape)}

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """None: ComfyUI reads plain floats at face value."""
        return {}

    def grid(self, weight: TensorSpec, scaling: str) -> Grid | None:
        """None: casting rounds by itself."""
        return None

    def store(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The cast weight, nearest, ties to even."""
        return {"weight": weight.to(torch_dtype(self.dtype))}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """A marker would name a format that ComfyUI does not know."""
        return [Fault("marker.format", f"has a marker for `{self.name}`, which needs none")]

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """The stored weight's own."""
        return stored["weight"].shape

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """The values in float32."""
        return rows.float()


PLUG = Cast("fp32", "F32")
