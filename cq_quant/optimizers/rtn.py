"""`rtn`: every weight to the nearest level, under the scales of least squared error.

The search is the grid's own: it pays at 4 bits, where clipping a few large weights buys finer steps
for all others. At 8 bits it gains nothing, and on a per-tensor scale clipping is a gamble: it can
raise a layer's output error several times while lowering the weight error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.grid import Grid, Scales
from cq_quant.optimizers import Optimizer

if TYPE_CHECKING:
    import torch


class Rtn(Optimizer):
    """The optimizer plug."""

    name = "rtn"

    def fit(
        self, weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
    ) -> tuple[torch.Tensor, Scales]:
        """Nearest codes."""
        choose = grid.search if search and grid.searches else grid.scales
        scales = choose(weight, shared)
        return grid.nearest(weight, {**shared, **scales}), scales


PLUG = Rtn()
