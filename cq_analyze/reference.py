"""The checkpoint that weights are compared with, found by name and read along with them.

Owns the fallback between model prefixes, and what judges outputs where inputs were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cq.core.checkpoint import Checkpoint
from cq.core.comfy import WEIGHT
from cq.core.dtypes import TensorSpec
from cq.core.recipe import without_prefix
from cq.core.rows import Rows, segments
from cq.core.stored import Stored, matrix_specs
from cq_analyze.outputs import Judge, Outputs

if TYPE_CHECKING:
    import torch


class Reference:
    """The checkpoint that weights are compared with; its names may carry another model prefix."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        outputs: Outputs | None = None,
        inputs: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._outputs = outputs
        self._inputs = inputs or {}  # by layer, what its recorded inputs are multiplied by
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

    def judge(self, layer: str, shape: tuple[int, ...]) -> Judge | None:
        """What judges the output of a layer whose weight has that shape; None if its inputs were
        not recorded. Raises: as `Outputs.judge`."""
        if self._outputs is None:
            return None
        own = (self.find(layer + WEIGHT) or "").removesuffix(WEIGHT)
        return self._outputs.judge(layer, shape[-1], self._inputs.get(own))

    def nbytes_judging(self, layer: str) -> int:
        """What that holds at most."""
        return 0 if self._outputs is None else self._outputs.nbytes_peak(layer)


def is_padded(stored: Stored, reference: TensorSpec) -> bool:
    """Whether the stored weight is the reference's with padding."""
    weight, plug = stored.weight, stored.format
    if len(reference.shape) != len(weight.shape) or len(weight.shape) not in {2, 3}:
        return False
    if len(weight.shape) == 3:
        if reference.shape[0] != weight.shape[0]:
            return False
        reference = TensorSpec(reference.dtype, reference.shape[1:])
    own = matrix_specs(stored.tensors)["weight"].shape
    return any(
        plug.refuse(reference, scaling, None) is None
        and plug.tensors(reference, scaling)["weight"].shape == own
        for scaling in plug.scalings
    )
