"""`dare`: drop numbers of each change at random and scale up the others, so that what adapters add
overlaps less while its expectation stays.

Source: DARE, arXiv 2311.03099, §3 (drop with probability p, rescale by 1 / (1 - p)); the density is
1 - p. The drops come from `--seed` and the tensor's name alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cq_merge.changes import runs

if TYPE_CHECKING:
    import torch


class Dare:
    """The method plug."""

    name = "dare"
    additive = False
    density: float | None = 0.5

    def combine(
        self, deltas: Sequence[torch.Tensor], density: float | None, generator: torch.Generator
    ) -> torch.Tensor:
        """The sum of what was not dropped."""
        import torch

        kept = 1.0 if density is None else density
        for delta in deltas:
            for start, stop in runs(*delta.shape):
                run = delta[start:stop]
                drawn = torch.rand(run.shape, generator=generator, dtype=torch.float32)
                run.masked_fill_(drawn >= kept, 0).div_(kept)
        total = deltas[0]
        for delta in deltas[1:]:
            total += delta
        return total


PLUG = Dare()
