"""Where formats and optimizers meet: the levels that a format can represent, and how codes name
them.

A format offers a `Grid`; an optimizer chooses codes on it. Neither knows the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Grid(Protocol):
    """The representable values of one weight, up to scales.

    Weights are float32 row segments `(rows, K)`; scales have a shape that broadcasts against them.
    """

    scaling: str
    """How far one scale reaches: `tensor`, `row` or `block`."""

    def absmax(self, weight: torch.Tensor) -> torch.Tensor:
        """Largest magnitude per reach of a scale; over several segments, combine by maximum."""
        ...

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """The absmax scales: the smallest for which nothing is clipped."""
        ...

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The codes of the nearest levels, ties to even."""
        ...

    def values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The float32 levels that codes stand for."""
        ...
