"""Storage formats, one file each, named by ComfyUI's key. Owns the protocol that they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from cq.core.dtypes import TensorSpec
from cq.core.grid import Grid

if TYPE_CHECKING:
    import torch


class Format(Protocol):
    """How a quantized weight is stored. Everything but `pack` and `unpack` is pure planning.

    `name` is ComfyUI's key and the file's name, `scalings` what `--scaling` may be (the default
    first), `first_comfyui` the first ComfyUI release that reads it.
    """

    name: str
    scalings: tuple[str, ...]
    first_comfyui: str

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Why `weight` cannot be stored so, as a sentence part, or None if it can.

        `group` is the rotation group, None for the original basis.
        """
        ...

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """Specs of the stored tensors by local name (`weight`, `weight_scale`), without the
        marker."""
        ...

    def marker(self, group: int | None) -> dict[str, Any]:
        """The layer's `comfy_quant` settings."""
        ...

    def grid(self, scaling: str) -> Grid:
        """The levels."""
        ...

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(rows, K)` as rows of the stored `weight`."""
        ...

    def pack_scales(self, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """The whole weight's scales as the stored tensors beside `weight`."""
        ...

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """What ComfyUI would trip over in a layer stored so, judged from specs and marker."""
        ...

    def unpack(self, stored: Mapping[str, torch.Tensor], marker: Mapping[str, Any]) -> torch.Tensor:
        """The float32 weight rows, in the original basis, of a row segment of the stored tensors.

        Tensors with a row for each weight row are cut alike, the others are whole.
        """
        ...


class Fault(tuple[str, str]):
    """A slug such as `scale.shape` and a sentence: why ComfyUI cannot use a layer as stored."""

    __slots__ = ()

    def __new__(cls, slug: str, sentence: str) -> Fault:
        """A fault of the kind `slug`, told by `sentence`."""
        return super().__new__(cls, (slug, sentence))
