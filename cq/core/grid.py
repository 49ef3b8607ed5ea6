"""Where formats and optimizers meet: the levels that a format can represent, and how codes name
them.

A format offers a `Grid`; an optimizer chooses scales and codes on it. Neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Scales = Mapping[str, "torch.Tensor"]
"""Everything beside the codes that levels depend on, by the grid's own names. *Shared* scales reach
over the whole weight (a tensor scale, a codebook); the others belong to rows and have as many
leading entries as their rows, or as their blocks of rows, so that segments can be joined."""


RoundColumn = Callable[[int, "torch.Tensor", "torch.Tensor"], None]


class Columns(Protocol):
    """Some columns of a weight under fixed scales, to be rounded one after the other."""

    def rounder(self, dtype: torch.dtype) -> RoundColumn:
        """What rounds a column: its place among the columns, the weights `(rows,)` of `dtype`, and
        where their nearest levels go."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """`Columns` whose levels are what `snap` makes of a weight's ratio to a step, times the step,
    plus the zero if there is one.

    `step` and `zero` have a line for each column, or one for all of them, and an entry for each row
    or one for all: `(columns or 1, rows or 1)`. Where the step is 0 the level is 0. `snap` rounds
    ratios in place.
    """

    step: torch.Tensor
    snap: Callable[[torch.Tensor], object]
    zero: torch.Tensor | None = None

    def rounder(self, dtype: torch.dtype) -> RoundColumn:
        """See `Columns`."""
        import torch

        step = self.step.to(dtype)
        divisor = torch.where(step == 0, torch.inf, step) if bool((step == 0).any()) else step
        snap, single = self.snap, step.shape[0] == 1
        steps, divisors = step.unbind(0), divisor.unbind(0)
        zeros = None if self.zero is None else self.zero.to(dtype).unbind(0)

        def round_column(place: int, weight: torch.Tensor, out: torch.Tensor) -> None:
            own = 0 if single else place
            if zeros is None:
                torch.div(weight, divisors[own], out=out)
                snap(out)
                out.mul_(steps[own])
            else:
                torch.sub(weight, zeros[own], out=out).div_(divisors[own])
                snap(out)
                out.mul_(steps[own]).add_(zeros[own])

        return round_column


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

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Columns:
        """The columns `chosen`, indices `(n,)`, under `scales`: for optimizers that round one
        column after the other."""
        ...
