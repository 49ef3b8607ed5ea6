"""Where formats and optimizers meet: the levels that a format can represent, and how codes name
them.

A format offers a `Grid`; an optimizer chooses scales and codes on it. Neither knows the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Scales = Mapping[str, "torch.Tensor"]
"""Everything beside the codes that levels depend on, by the grid's own names. *Shared* scales reach
over the whole weight (a tensor scale, a codebook); the others belong to rows and have as many
leading entries as their rows, or as their blocks of rows, so that segments can be joined."""


class Grid(Protocol):
    """The representable values of one weight, up to scales.

    Weights are float32 row segments `(rows, K)` that begin at a multiple of 128 rows and are cut at
    such multiples, in the basis that is rounded in.
    """

    @property
    def scaling(self) -> str:
        """`tensor`, `row` or `block`."""
        ...

    @property
    def surveys(self) -> bool:
        """Whether there are shared scales."""
        ...

    @property
    def searches(self) -> bool:
        """Whether `search` can find better scales than `scales`."""
        ...

    @property
    def nbytes_work(self) -> int:
        """What choosing scales and codes holds at most, in bytes per weight of a segment."""
        ...

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """The shared scales of a whole weight, from all its segments; only if `surveys`."""
        ...

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """The rows' scales by the format's plain rule: the smallest that clip nothing."""
        ...

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """The rows' scales of least squared error among those worth trying, that of the largest
        weight's among them, so never worse than that one on any reach; only if `searches`.

        `importance` `(K,)` weighs columns.
        """
        ...

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The codes of the nearest levels; `scales` hold the shared ones as well."""
        ...

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The float32 levels `(rows, K)` that codes stand for."""
        ...
