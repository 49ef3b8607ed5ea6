"""What the optimizers share that feed errors forward. No plug of its own.

Owns the order of things for a layer with a moment: damping, scales weighted by the moment's
diagonal, LDLQ, passes of coordinate descent, and for each row the choice between the result and
nearest rounding. Rows are independent of each other, so that the choice needs no second pass; it is
made by the loss under inputs that were held back, since what was fitted to noise shows there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq.core.grid import Grid, Scales
from cq.core.moment import Moment
from cq.core.rounding import Fit
from cq_quant import ldlq
from cq_quant.optimizers import Option, Rounded, Task
from cq_quant.optimizers.rtn import Rtn

if TYPE_CHECKING:
    import torch

# Of the diagonal's mean. What is added hides the noise of an estimate, and keeps weights nearer to
# what they were for inputs that were not recorded: many rows need less of it, few are mostly noise.
DAMP_FEW, DAMP, DAMP_MANY = 0.3, 0.05, 0.01
_FEW, _MANY = 2, 64  # rows for each input feature
_TOGETHER = 1 << 24  # weights that are rounded together: steps cost less the more rows take them
# A batch of rows as it was, turned, rounded, turned back and to nearest, and a difference
_BYTES_BATCH = 6 * 4
_BYTES_SKETCH = 5 * 4 + 8  # as read, damped, ordered and pulled; float64 blocks

DAMP_OPTION = Option(
    help="how much of the mean square input is added to each, so that noise is not fitted;"
    f" by default {DAMP}, {DAMP_FEW} with fewer rows than {_FEW} per input feature, and {DAMP_MANY}"
    f" with {_MANY} or more",
    least=1e-6,
    most=1e6,
    default=None,
    calibrated=True,
)
PASSES_OPTION = Option(
    help="passes of coordinate descent after LDLQ; by default 1 for formats whose scales are"
    " searched, which have few levels, else 0",
    least=0,
    most=100,
    default=None,
    whole=True,
    calibrated=True,
)


def damping(moment: Moment, options: Mapping[str, float]) -> float:
    """The share of the mean that is added to the diagonal."""
    each = moment.rows / moment.rest.shape[0]
    usual = DAMP_FEW if each < _FEW else DAMP if each < _MANY else DAMP_MANY
    return options.get("damp", usual)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Rows that were rounded: their scales and levels."""

    own: Scales
    levels: torch.Tensor


class Feedback(Rtn):
    """Nearest rounding without a moment, LDLQ with one."""

    calibrates = True
    options: ClassVar[Mapping[str, Option]] = {"damp": DAMP_OPTION, "passes": PASSES_OPTION}

    def prepare(self, task: Task) -> Fit:
        """Factors once, for all rows."""
        if task.moment is None:
            return self.fit
        import torch

        moment = task.moment.damped(damping(task.moment, task.options))
        products = torch.bfloat16 if task.bf16 else None
        given = ldlq.factors(moment.rest, moment.sketch, products=products)
        importance = moment.diagonal()

        def fit(
            weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
        ) -> tuple[torch.Tensor, Scales]:
            nearest = self._nearest(weight, grid, shared, search)
            own = nearest.own
            if search and grid.searches:
                own = grid.search(weight, shared, importance)
            levels = ldlq.round_rows(weight, grid, {**shared, **own}, given)
            found = Candidate(own=own, levels=levels)
            found = self._refined(weight, grid, shared, nearest, found, moment, task)
            return accepted(weight, grid, shared, nearest, found, task.held or moment, task)

        return fit

    def _refined(
        self,
        weight: torch.Tensor,
        grid: Grid,
        shared: Scales,
        nearest: Candidate,
        found: Candidate,
        moment: Moment,
        task: Task,
    ) -> Candidate:
        """What is made of LDLQ's result before it is judged."""
        passes = int(task.options.get("passes", 1 if grid.searches else 0))
        return descended(weight, grid, shared, found, moment, passes)

    def _nearest(self, weight: torch.Tensor, grid: Grid, shared: Scales, search: bool) -> Candidate:
        codes, own = self.fit(weight, grid, shared, search=search)
        return Candidate(own=own, levels=grid.values(codes, {**shared, **own}))

    def segments(self, weights: int, rank: int) -> int:
        """As many as make a batch; one without a moment."""
        return max(1, _TOGETHER // max(1, weights)) if rank else 1

    def nbytes_work(self, columns: int, rank: int, weights: int) -> int:
        """Batches in several forms, sketches, and the factors of blocks."""
        if not rank:
            return 0
        blocks = columns * ldlq.BLOCK * 4 + 4 * 8 * (rank + ldlq.BLOCK) ** 2
        return weights * _BYTES_BATCH + rank * columns * _BYTES_SKETCH + blocks


def chosen(better: torch.Tensor, found: Candidate, other: Candidate) -> Candidate:
    """Row by row `found` where it is `better`, else `other`.

    Scales that belong to blocks of rows are the plain rule's in both, and so equal.
    """
    import torch

    own = {}
    for key, scale in found.own.items():
        if scale.shape[:1] == better.shape and key in other.own:
            place = better.view(-1, *(1,) * (scale.ndim - 1))
            # Bytes, since torch chooses between no float8 numbers.
            kind = torch.uint8 if scale.element_size() == 1 else scale.dtype
            mixed = torch.where(place, scale.view(kind), other.own[key].view(kind))
            own[key] = mixed.view(scale.dtype)
        else:
            own[key] = scale
    return Candidate(own=own, levels=torch.where(better[:, None], found.levels, other.levels))


def descended(
    weight: torch.Tensor,
    grid: Grid,
    shared: Scales,
    start: Candidate,
    moment: Moment,
    passes: int,
) -> Candidate:
    """`start` after so many passes of coordinate descent, under its scales."""
    levels = start.levels
    for _ in range(passes):
        levels = ldlq.descend(weight, levels, grid, {**shared, **start.own}, moment)
    return Candidate(own=start.own, levels=levels)


def accepted(
    weight: torch.Tensor,
    grid: Grid,
    shared: Scales,
    nearest: Candidate,
    found: Candidate,
    judge: Moment,
    task: Task,
) -> tuple[torch.Tensor, Scales]:
    """Codes and scales of the better of both in each row, by `judge`."""
    import torch

    before = judge.loss(nearest.levels - weight)
    after = judge.loss(found.levels - weight)
    better = after < before
    best = chosen(better, found, nearest)
    # What is a level already is its own nearest.
    codes = grid.nearest(best.levels, {**shared, **best.own})
    task.tell(  # at the end: on a device all of it may be done again for want of memory
        Rounded(
            rows=weight.shape[0],
            taken=int(better.sum()),
            nearest=float(before.double().sum()),
            kept=float(torch.where(better, after, before).double().sum()),
        )
    )
    return codes, best.own
