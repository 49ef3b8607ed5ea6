"""`orthogonal`: each adapter adds only what none before it adds already.

What an adapter's change has along the changes before it would count twice in a sum, so it is taken
out. The first adapter stays whole: the order is the user's word on which matters most.

Source: the Gram-Schmidt process on changes as vectors. That what is merged later should be
orthogonal to what was merged before is the idea of OPCM, arXiv 2501.09522, which projects singular
direction by singular direction instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cq_merge.changes import inner, squared

if TYPE_CHECKING:
    import torch


class Orthogonal:
    """The method plug."""

    name = "orthogonal"
    additive = False
    density: float | None = None

    def combine(
        self, deltas: Sequence[torch.Tensor], density: float | None, generator: torch.Generator
    ) -> torch.Tensor:
        """The sum of the changes, each without its part along the ones before it."""
        for number, delta in enumerate(deltas):
            for earlier in deltas[:number]:
                size = squared(earlier)
                if size:
                    delta.add_(earlier, alpha=-inner(delta, earlier) / size)
        total = deltas[0]
        for delta in deltas[1:]:
            total += delta
        return total


PLUG = Orthogonal()
