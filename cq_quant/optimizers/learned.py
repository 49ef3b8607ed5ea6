"""`learned`: rounding refined until no single weight can lower the loss.

With calibration: LDLQ's result, or nearest rounding in rows where that loses less, refined by
coordinate descent on the calibrated loss. Without: nearest rounding, refined on the error within
the weight's own leading directions, E V Vᵀ, beside the error itself, and kept in rows where it
lowers the former, ‖E V‖. That is what tools offer as learned rounding without data; the directions
of a weight are not those of its inputs, so it need not help, and the note says so.

Source: CDQuant, arXiv 2406.17542 (coordinate descent); convert_to_quant (the loss without data,
here without its projection of rows, so that rows are independent).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from cq.core.grid import Grid, Scales
from cq.core.moment import Moment
from cq.core.rounding import Fit
from cq_quant.optimizers import Option, Task
from cq_quant.optimizers._feedback import (
    DAMP_OPTION,
    Candidate,
    Feedback,
    accepted,
    chosen,
    descended,
)

if TYPE_CHECKING:
    import torch

_PASSES = 2
_SHARE, _LEAST, _MOST = 0.2, 64, 1024  # of the shorter side, that many directions of a weight
_SPARE, _ROUNDS = 8, 2  # directions beyond those asked for, and rounds, of the search for them


class Learned(Feedback):
    """The optimizer plug."""

    name = "learned"
    note = (
        "without calibration data learned lowers the error along the weight's own leading"
        " directions, which need not be those of the inputs"
    )
    options: ClassVar[Mapping[str, Option]] = {
        "damp": DAMP_OPTION,
        "passes": Option(
            help="passes of coordinate descent", least=1, most=100, default=_PASSES, whole=True
        ),
    }

    def prepare(self, task: Task) -> Fit:
        """As LDLQ's, or the weight's directions without a moment."""
        if task.moment is not None:
            return super().prepare(task)
        import torch

        directions = _leading(task)
        nothing = torch.zeros(task.shape[1], device=task.device)
        stated = Moment(rest=nothing, sketch=directions, rows=task.shape[0])
        both = Moment(rest=nothing + 1, sketch=directions, rows=task.shape[0])

        def fit(
            weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
        ) -> tuple[torch.Tensor, Scales]:
            nearest = self._nearest(weight, grid, shared, search)
            found = descended(weight, grid, shared, nearest, both, _passes(task))
            return accepted(weight, grid, shared, nearest, found, stated, task)

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
        better = moment.loss(found.levels - weight) < moment.loss(nearest.levels - weight)
        start = chosen(better, found, nearest)
        return descended(weight, grid, shared, start, moment, _passes(task))

    def segments(self, weights: int, rank: int) -> int:
        """A batch, with a moment or without."""
        return super().segments(weights, 1)

    def nbytes_work(self, columns: int, rank: int, weights: int) -> int:
        """As LDLQ's; without calibration for the weight's directions."""
        return super().nbytes_work(columns, rank or _MOST + _SPARE, weights)


def _passes(task: Task) -> int:
    return int(task.options.get("passes", _PASSES))


def _leading(task: Task) -> torch.Tensor:
    """The weight's leading right singular directions, from two passes over its rows.

    By subspace iteration from random directions. Shapes: `(k, N)`.
    """
    import torch

    rows, columns = task.shape
    short = min(rows, columns)
    count = min(_MOST, max(_LEAST, int(_SHARE * short)), short)
    wide = min(count + _SPARE, columns)
    generator = torch.Generator().manual_seed(task.seed)
    # Drawn on the CPU, so that all devices begin with the same numbers.
    drawn = torch.randn(columns, wide, generator=generator).to(task.device)
    basis = torch.linalg.qr(drawn)[0]
    strength = basis.new_ones(wide)
    for _ in range(_ROUNDS):
        image = torch.zeros_like(basis)
        for segment in task.rows():
            image.addmm_(segment.T, segment @ basis)
        basis, upper = torch.linalg.qr(image)
        strength = upper.diagonal().abs()
    leading = torch.argsort(strength, descending=True, stable=True)[:count]
    return torch.index_select(basis, 1, leading.sort().values).T.contiguous()


PLUG = Learned()
