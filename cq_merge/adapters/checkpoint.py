"""A whole second model: its tensors, or what they differ from those of a third.

`weight + strength * (second - weight)`, the weighted sum of two models; with an origin
`weight + strength * (second - origin)`, the second's difference from it. What is not floating
point, such as position ids, is no weight and stays as the first model has it.

Source: Model Soups, arXiv 2203.05482 (sums), and Task Arithmetic, arXiv 2212.04089 (differences);
ComfyUI `comfy_extras/nodes_model_merging.py:ModelMergeSimple`, `ModelSubtract` and `ModelAdd`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, InternalError
from cq.core.rows import Rows, segments
from cq.core.source import largest_cut
from cq.core.text import printable
from cq_merge.adapters import Additive, Apply, Change, Parameter, Reading
from cq_merge.changes import add_towards, bounded, nbytes_towards, unlike
from cq_merge.contents import Contents, all_finite

if TYPE_CHECKING:
    import torch

_PARAMETERS: tuple[tuple[str, Parameter], ...] = ((".weight", "weight"), (".bias", "bias"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointChange(Additive):
    """The tensor `name` of a second model. With an `origin` rows must be asked for in order."""

    contents: Contents
    key: str
    name: str
    parameter: Parameter = field()  # without this, the property above would be the default
    origin: Checkpoint | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.name,)

    @property
    def reads_base(self) -> bool:
        """Without an origin, the way leads from the weight itself."""
        return self.origin is None

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why second model, origin and weight do not have one shape."""
        shown = f"`{printable(self.name)}`"
        if self.origin is not None:
            own = self.origin.specs.get(self.name)
            if own is None:
                return f"{_shown(self.origin)} holds no {shown} to take the difference from"
            if own.shape != self.contents.spec(self.name).shape or not own.is_float:
                return f"{shown} of {_shown(self.origin)} is {own}"
        return unlike(self.contents, self.name, weight)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """Rows of the second model; rows of the origin, or the way from the weight."""
        own = self.contents.nbytes_rows(self.name, rows * columns, itemsize)
        if self.origin is None:
            return own + nbytes_towards(rows, columns, itemsize)
        spec = self.origin.specs[self.name]
        # A segment of its own cut in hand, one that begins in it, and the rows joined from both.
        cut = TensorSpec(spec.dtype, (2 * largest_cut(spec) + rows * columns,)).nbytes
        return own + self.origin.part(self.name).nbytes_peak + cut + rows * columns * itemsize

    def load(self, dtype: torch.dtype) -> Apply:
        """Nothing is read before the rows that need it."""
        original = None if self.origin is None else self._original(self.origin, dtype)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            value = self.contents.matrix(self.name, dtype, start=first, stop=first + len(rows))
            if original is None:
                add_towards(base, rows, value, strength)
            else:
                difference = value.sub_(original(first, len(rows)))
                rows.add_(difference, alpha=bounded(strength, rows))

        return apply

    def _original(
        self, origin: Checkpoint, dtype: torch.dtype
    ) -> Callable[[int, int], torch.Tensor]:
        """A function that gives `count` rows of the origin from row `first` on."""
        spec = origin.specs[self.name]
        rows = Rows(_matrices(segments(origin.part(self.name), self.name), spec))
        reached = 0

        def take(first: int, count: int) -> torch.Tensor:
            nonlocal reached
            if first < reached:
                raise InternalError(f"rows of `{self.name}` were asked for out of order")
            for start in range(reached, first, max(1, count)):
                rows.take(min(first - start, max(1, count)))
            reached = first + count
            taken = rows.take(count).to(dtype)
            if not all_finite(taken):
                raise InputError(
                    f"tensor `{printable(self.name)}` of {_shown(origin)}"
                    " holds NaN or infinite values",
                    where=self.name,
                    hint="mend the checkpoint",
                    code="input.nonfinite",
                )
            return taken

        return take


def _matrices(pieces: Iterator[torch.Tensor], spec: TensorSpec) -> Iterator[torch.Tensor]:
    """Segments as `(n, K)`; that of a 0-d tensor as `(1, 1)`."""
    for piece in pieces:
        yield piece.reshape(-1, spec.row_numel)


class _Checkpoint:
    kind: ClassVar[str] = "checkpoint"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every tensor that is floating point."""
        return [_change(source, name) for name in sorted(source.names) if source.is_floating(name)]

    def partner(self, name: str) -> str | None:
        """A weight stands by itself, and any name may be one."""
        return None


PLUG = _Checkpoint()


def _change(source: Contents, name: str) -> CheckpointChange:
    for ending, parameter in _PARAMETERS:
        if name.endswith(ending) and name != ending:
            key = name.removesuffix(ending)
            return CheckpointChange(contents=source, key=key, name=name, parameter=parameter)
    return CheckpointChange(contents=source, key=name, name=name, parameter="weight")


def _shown(checkpoint: Checkpoint) -> str:
    return " and ".join(f"`{source.shown}`" for source in checkpoint.sources)
