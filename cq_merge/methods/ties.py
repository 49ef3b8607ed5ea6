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

from cq_merge.changes import runs

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
        for start, stop in runs(*deltas[0].shape):
            own = [delta[start:stop] for delta in deltas]
            elected = own[0].clone()
            for rows in own[1:]:
                elected += rows
            for rows in own:
                # Signs, as the product of two small numbers may be 0.
                rows.masked_fill_(rows.sign() != elected.sign(), 0)
            for rows in own[1:]:
                own[0].add_(rows)
        return deltas[0]


PLUG = Ties()


def _trim(delta: torch.Tensor, density: float | None) -> None:
    """Set all but the largest numbers to 0: a share of `density` stays, and what ties with it."""
    if density is None or density >= 1 or not delta.numel():
        return
    kept = max(1, round(delta.numel() * density))
    sizes = delta.abs().flatten().numpy()
    at = delta.numel() - kept
    sizes.partition(at)  # in its own memory
    least = float(sizes[at])
    for start, stop in runs(*delta.shape):
        run = delta[start:stop]
        run.masked_fill_(run.abs() < least, 0)
