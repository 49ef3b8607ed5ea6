"""Methods by which the changes of several adapters become one, a file each. Owns the protocol.

A method sees what each adapter alone would add to one weight, strengths and all, and says what all
of them together add. Strengths are the user's; a method may drop, weigh and turn, but with a single
adapter it must not be mistaken for another strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Method(Protocol):
    """A method. `additive` says that it is the plain sum, which needs no comparing; `density` is
    the share of each adapter's numbers that it keeps unless told otherwise, None if it has no such
    setting."""

    name: str
    additive: bool
    density: float | None

    def combine(
        self, deltas: Sequence[torch.Tensor], density: float | None, generator: torch.Generator
    ) -> torch.Tensor:
        """One delta of `deltas`, each `(N, K)`, in the adapters' order; they may be written to.

        `density` is in (0, 1]. Random numbers come from `generator` alone.
        """
        ...
