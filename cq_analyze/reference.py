"""The checkpoint that weights are compared with, found by name and read along with them.

Owns the fallback between model prefixes.
"""

from __future__ import annotations

from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.recipe import without_prefix
from cq.core.rows import Rows, segments


class Reference:
    """The checkpoint that weights are compared with; its names may carry another model prefix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._by_bare: dict[str, str | None] = {}
        for name in checkpoint.specs:
            bare = without_prefix(name)
            self._by_bare[bare] = None if bare in self._by_bare else name

    def find(self, name: str) -> str | None:
        """The reference's name for the tensor `name`: the same, or the only one that is the same
        without model prefixes."""
        return name if name in self.checkpoint.specs else self._by_bare.get(without_prefix(name))

    def spec(self, name: str) -> TensorSpec:
        """The spec of its tensor `name`."""
        return self.checkpoint.specs[name]

    def nbytes_peak(self, name: str) -> int:
        """What reading its tensor `name` segment by segment holds, at most."""
        return 2 * self.checkpoint.part(name).nbytes_peak

    def rows(self, name: str) -> Rows:
        """Its tensor `name`, to be taken row by row."""
        return Rows(segments(self.checkpoint.part(name), name))
