"""`ties`: trim each change to its largest numbers, elect a sign for each weight, and add only what
agrees with it.

Adapters that pull a weight both ways no longer cancel each other, and the many small numbers that
only blur the others are gone. The paper averages what is left, as all its models count alike; here
every adapter has a strength of its own, so what is left is added: one adapter alone is trimmed and
nothing else.

Source: TIES-Merging, arXiv 2306.01708, §4 (trim, elect by total magnitude, disjoint merge), with
its default of keeping 20 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Ties:
    """The method plug."""

    name = "ties"
    additive = False
    density: float | None = 0.2

    def combine(
        self, deltas: Sequence[torch.Tensor], density: float | None, generator: torch.Generator
    ) -> torch.Tensor:
        """The sum of what is large and of the elected sign."""
        for delta in deltas:
            _trim(delta, density)
        elected = deltas[0].clone()
        for delta in deltas[1:]:
            elected += delta
        total = elected.new_zeros(elected.shape)
        for delta in deltas:
            total += delta.where(delta * elected > 0, delta.new_zeros(()))
        return total


PLUG = Ties()


def _trim(delta: torch.Tensor, density: float | None) -> None:
    """Set all but the largest numbers to 0: a share of `density` stays, and what ties with it."""
    if density is None or density >= 1 or not delta.numel():
        return
    kept = max(1, round(delta.numel() * density))
    size = delta.abs()
    least = size.flatten().kthvalue(delta.numel() - kept + 1).values
    delta.masked_fill_(size < least, 0)
