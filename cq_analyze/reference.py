"""The checkpoint that weights are compared with, found by name and read along with them.

Owns the fallback between model prefixes and the rows of two tensors side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cq.core.checkpoint import Checkpoint, Part
from cq.core.dtypes import TensorSpec
from cq.core.engine import local
from cq.core.recipe import without_prefix

if TYPE_CHECKING:
    import torch


class Reference:
    """The checkpoint that weights are compared with; its names may carry another model prefix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._by_bare: dict[str, str | None] = {}
        for name in checkpoint.specs:
            bare = without_prefix(name)
            self._by_bare[bare] = None if bare in self._by_bare else name

    def find(self, name: str) -> str | None:
        """The reference's name for the tensor `name`: the same, or the only one that is the same
        without model prefixes."""
        return name if name in self.checkpoint.specs else self._by_bare.get(without_prefix(name))

    def spec(self, name: str) -> TensorSpec:
        """The spec of its tensor `name`."""
        return self.checkpoint.specs[name]

    def nbytes_peak(self, name: str) -> int:
        """What reading its tensor `name` segment by segment holds, at most."""
        return 2 * self.checkpoint.part(name).nbytes_peak

    def rows(self, name: str) -> Rows:
        """Its tensor `name`, to be taken row by row."""
        return Rows(segments(self.checkpoint.part(name), name))


class Rows:
    """Hands out a tensor's rows in order, in portions that need not be the pieces it comes in."""

    def __init__(self, segments: Iterator[torch.Tensor]) -> None:
        self._segments = segments
        self._held: torch.Tensor | None = None

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """The next rows, as many as `other` has; the whole tensor if that is 0-d."""
        import torch

        if not other.shape:
            return next(self._segments)
        portions: list[torch.Tensor] = []
        missing = other.shape[0]
        while missing > 0:
            held = next(self._segments) if self._held is None else self._held
            portions.append(held[:missing])
            self._held = held[missing:] if held.shape[0] > missing else None
            missing -= portions[-1].shape[0]
        return portions[0] if len(portions) == 1 else torch.cat(portions)


def segments(part: Part, name: str) -> Iterator[torch.Tensor]:
    """The row segments of a part's tensor `name`, checked against its promise."""
    return (piece.tensor for piece in local.checked(part) if piece.name == name)
