"""`sum`: every adapter adds its change to the weight as it was. The order does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Sum:
    """The method plug."""

    name = "sum"
    additive = True
    density: float | None = None

    def combine(
        self, deltas: Sequence[torch.Tensor], density: float | None, generator: torch.Generator
    ) -> torch.Tensor:
        """The sum."""
        total = deltas[0]
        for delta in deltas[1:]:
            total += delta
        return total


PLUG = Sum()
