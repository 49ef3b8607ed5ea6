"""Rows of tensors in portions: regrouped, side by side, and codes together with what lies beside
them.

Owns how a reader takes what parts produce: in other portions than the pieces come in, and each part
once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from cq.core.checkpoint import Checkpoint, Part
from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.engine import local

if TYPE_CHECKING:
    import torch


class Rows:
    """Hands out a tensor's rows in order, in portions that need not be the pieces it comes in."""

    def __init__(self, segments: Iterable[torch.Tensor]) -> None:
        self._segments = iter(segments)
        self._held: torch.Tensor | None = None

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """The next rows, as many as `other` has; the whole tensor if that is 0-d."""
        return self.take(other.shape[0]) if other.shape else self.whole()

    def whole(self) -> torch.Tensor:
        """The next segment as it comes: the whole of a 0-d tensor."""
        return next(self._segments)

    def take(self, count: int) -> torch.Tensor:
        """The next `count` rows, at least one."""
        import torch

        portions: list[torch.Tensor] = []
        missing = count
        while missing > 0:
            held = next(self._segments) if self._held is None else self._held
            portions.append(held[:missing])
            self._held = held[missing:] if held.shape[0] > missing else None
            missing -= portions[-1].shape[0]
        return portions[0] if len(portions) == 1 else torch.cat(portions)


def empty(spec: TensorSpec) -> torch.Tensor:
    """A tensor without elements, for which no part yields a piece."""
    import torch

    return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))


def segments(part: Part, name: str) -> Iterator[torch.Tensor]:
    """The row segments of a part's tensor `name`, checked against its promise."""
    return (piece.tensor for piece in local.checked(part) if piece.name == name)


def held_together(checkpoint: Checkpoint, weight: str, beside: Collection[str]) -> bool:
    """Whether the part that produces `weight` produces tensors of `beside` too, so that codes must
    be held until these come."""
    return any(name in beside for name in checkpoint.part(weight).tensors)


def read_apart(
    checkpoint: Checkpoint, weight: str, beside: Collection[str]
) -> tuple[Iterable[torch.Tensor], dict[str, torch.Tensor]]:
    """The row segments of `weight`, and the whole tensors `beside` it.

    Each part is produced once. The segments are lazy unless one part produces both: then they are
    held.
    """
    import torch

    weight_part = checkpoint.part(weight)
    together = held_together(checkpoint, weight, beside)
    parts = {id(part): part for part in map(checkpoint.part, beside)}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in beside}
    codes: list[torch.Tensor] = []
    for part in parts.values():
        for piece in local.checked(part):
            if piece.name in found:
                found[piece.name].append(piece.tensor)
            elif piece.name == weight:
                codes.append(piece.tensor)
    others = {
        name: (pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        if pieces
        else empty(checkpoint.specs[name])
        for name, pieces in found.items()
    }
    return codes if together else segments(weight_part, weight), others
