"""`rtn`: every weight to the nearest level, absmax scales.

At 8 bits a search for smaller scales gains nothing, and on a per-tensor scale clipping is a gamble:
it can raise a layer's output error several times while lowering the weight error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.grid import Grid

if TYPE_CHECKING:
    import torch


class Rtn:
    """The optimizer plug."""

    name = "rtn"
    rotates = False
    note: str | None = None

    def fit(
        self, weight: torch.Tensor, grid: Grid, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes; absmax scales unless `scales` are given."""
        if scales is None:
            scales = grid.scales(grid.absmax(weight))
        return grid.nearest(weight, scales), scales


PLUG = Rtn()
