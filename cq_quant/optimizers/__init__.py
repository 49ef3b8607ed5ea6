"""Optimizers: what chooses codes, one file each. Owns the protocol that they keep.

An optimizer never names a format: it sees float32 rows and a grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cq.core.grid import Grid, Scales

if TYPE_CHECKING:
    import torch


class Optimizer(Protocol):
    """Chooses codes. `rotates` says whether it works in the rotated basis, `note` what a user
    should know of how it works here, such as what it does without calibration data."""

    name: str
    rotates: bool
    note: str | None

    def fit(
        self, weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
    ) -> tuple[torch.Tensor, Scales]:
        """Codes and the rows' own scales for a float32 row segment `(rows, K)`.

        `shared` are the scales that reach beyond the segment. `search` asks for scales of least
        error rather than the format's plain rule.
        """
        ...
