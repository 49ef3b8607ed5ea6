"""BOFT: the weight's rows are rotated in stages, whose blocks take rows as a butterfly does.

Stage `i` of `m` turns blocks of `b` rows that stand `2^i * b / 2` apart in pairs; then
`y = rescale * rows`, and the weight becomes `W + strength * (y - W)`.

Source: BOFT, arXiv 2311.06243; LyCORIS `functional/boft.py`; ComfyUI
`comfy/weight_adapter/boft.py:BOFTAdapter`, which lets the strength count in every stage and again
at the end, and fails where there is no alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq_merge.adapters import Apply, Change, Reading
from cq_merge.changes import LARGEST_RUN, UNCHANGED, Inert, bounded, contradiction, runs
from cq_merge.contents import Contents
from cq_merge.rotations import BLOCKS, RESCALE, Rotation, keys

if TYPE_CHECKING:
    import torch

_TWICE = "ComfyUI lets the strength of BOFT count in every stage and again at the end"
_NO_ALPHA = f"ComfyUI fails at layers of BOFT without an alpha{UNCHANGED}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoftChange(Rotation):
    """A set of blocks for each stage, `(m, N / b, b, b)`."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Where ComfyUI does something else."""
        if self.alpha is None:
            return (_NO_ALPHA,)
        return (_TWICE, *self.bound_remarks)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """All blocks, and some columns of all rows: as they were, what is added to them, their sum,
        that in the stage's order, turned, and back in order."""
        blocks = self.contents.spec(self.blocks).numel
        width = 6 * max(LARGEST_RUN, self.rows)
        return self.nbytes_turns + (2 * blocks + width + 3 * self.rows) * itemsize

    def load(self, dtype: torch.dtype) -> Apply:
        """Make the blocks of all stages."""
        import torch

        stages = self.contents.spec(self.blocks).shape[0]
        turns = torch.empty(stages * (self.rows // self.size), self.size, self.size, dtype=dtype)
        for number, run in self.turns():
            turns[number : number + len(run)] = run
        turns = turns.view(stages, -1, self.size, self.size)
        factors = self.factors(dtype)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            multiplier = bounded(self._outer(strength), rows)
            within = strength if self.as_comfyui else 1.0
            for start, stop in runs(base.shape[1], len(base)):
                before = base[:, start:stop]
                # What is added to the weight is kept by itself, as it may be small beside it.
                delta = torch.zeros_like(before)
                for stage, own in enumerate(turns):
                    apart = 2**stage * (self.size // 2)
                    taken = _taken(before + delta, apart).view(len(own), self.size, -1)
                    turned = (own @ taken).view(len(base), -1)
                    delta.add_(_put_back(turned, apart), alpha=bounded(within, rows))
                if factors is not None:
                    delta.mul_(factors).addcmul_(before, factors - 1)
                rows[:, start:stop].add_(delta, alpha=multiplier)

        return apply

    def _outer(self, strength: float) -> float:
        """What multiplies the change of all stages."""
        return (self.alpha or 0.0) if self.decomposed else strength


def _taken(rows: torch.Tensor, apart: int) -> torch.Tensor:
    """Rows in the order in which a stage takes them: pairs that stand `apart` side by side."""
    return rows.view(-1, 2, apart, rows.shape[1]).transpose(1, 2).reshape(len(rows), -1)


def _put_back(rows: torch.Tensor, apart: int) -> torch.Tensor:
    """The inverse of `_taken`."""
    return rows.view(-1, apart, 2, rows.shape[1]).transpose(1, 2).reshape(len(rows), -1)


class _Boft:
    kind: ClassVar[str] = "boft"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every layer with blocks in stages."""
        return [_change(source, reading, key) for key in keys(source, 4)]

    def partner(self, name: str) -> str | None:
        """The blocks that a rescale belongs to."""
        if name.endswith(RESCALE):
            return name.removesuffix(RESCALE) + BLOCKS
        return name if name.endswith(BLOCKS) else None


PLUG = _Boft()


def _change(source: Contents, reading: Reading, key: str) -> Change:
    change = BoftChange.read(source, reading, key)
    stages, count, size, _ = source.spec(change.blocks).shape
    if size % 2 or count % 2 ** (stages - 1):
        raise contradiction(source, [change.blocks], "are no butterfly of these stages")
    if change.alpha is None and reading.as_comfyui:
        return Inert(key=key, tensors=change.tensors, said=change.remarks)
    return change
