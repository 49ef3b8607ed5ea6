"""What is known of each adapter of a merge, for plans and reports: kinds, ranks, alphas, what it
changes, what it leaves, and what a person should know of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cq.core import comfy
from cq.core.names import Target
from cq_merge.adapters import Change
from cq_merge.inputs import AdapterFile
from cq_merge.weights import Placed

# The scale alpha / rank of published adapters is at most 2, apart from a few of 4.
_LARGEST_SCALE = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """One adapter: its changes with the rows that they belong to, and the keys without any.

    `left_out` are the numbers of those that are not made although they match, `said` remarks on how
    they stand to each other. `placed` are the changes by tensor, with the adapter's effective
    strength.
    """

    file: AdapterFile
    kinds: tuple[str, ...]
    matched: tuple[tuple[Change, tuple[Target, ...]], ...]
    unmatched: tuple[str, ...]
    left_out: frozenset[int] = frozenset()
    said: tuple[str, ...] = ()
    strength: float = 0.0
    placed: tuple[tuple[str, Placed], ...] = ()

    def note(self) -> dict[str, Any]:
        """The adapter as plain JSON."""
        changes = [change for change, _ in self.matched]
        return {
            "path": self.file.path,
            "strength": self.file.strength,
            "effective_strength": self.strength,
            "kind": "+".join(self.kinds),
            "ranks": sorted({c.rank for c in changes if c.rank is not None}),
            "alphas": sorted({c.alpha for c in changes if c.alpha is not None}),
            "matched": len(changes),
            "unmatched": list(self.unmatched),
            "layers": sorted({layer_of(t.tensor) for _, place in self.matched for t in place}),
            "remarks": list(self.remarks()),
        }

    def remarks(self) -> Iterator[str]:
        """Sentences on what is odd, or other than in ComfyUI, with the number of layers."""
        told = Counter(remark for change, _ in self.matched for remark in change.remarks)
        told.update(self.said)
        for remark, count in told.items():
            yield f"{remark} ({count} {'layer' if count == 1 else 'layers'})"
        scales = {
            (c.alpha, c.rank)
            for c, _ in self.matched
            if c.alpha is not None and c.rank and not 0 < c.alpha / c.rank <= _LARGEST_SCALE
        }
        if scales:
            alpha, rank = max(scales)
            does = "changes nothing" if not alpha else f"multiplies it by {alpha / rank:g}"
            yield f"alpha {alpha:g} at rank {rank} {does}: is the file sound?"


def layer_of(tensor: str) -> str:
    """The layer that a tensor is of."""
    return tensor.removesuffix(comfy.WEIGHT).removesuffix(".bias")
