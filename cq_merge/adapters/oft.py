"""OFT: blocks of the weight's rows are rotated.

Block by block `y = rescale * R^T W`, and the weight becomes `W + strength * (y - W)`.

Source: OFT, arXiv 2306.07280; LyCORIS `functional/diag_oft.py`; sd-scripts `networks/oft.py`;
ComfyUI `comfy/weight_adapter/oft.py:OFTAdapter`, which squares the strength and leaves out the
rescale. PEFT's OFT (`.oft_R`) turns the input side by a map that its file does not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq_merge.adapters import Apply, Change, Reading
from cq_merge.changes import LARGEST_RUN, bounded, runs
from cq_merge.contents import Contents
from cq_merge.rotations import BLOCKS, RESCALE, Rotation, keys

if TYPE_CHECKING:
    import torch

_SQUARED = "ComfyUI squares the strength of OFT"
_NO_RESCALE = "ComfyUI leaves out the rescale of OFT"


@dataclass(frozen=True, slots=True, kw_only=True)
class OftChange(Rotation):
    """One set of blocks, `(N / b, b, b)`."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Where ComfyUI does something else."""
        rescale = () if self.rescale is None else (_NO_RESCALE,)
        return (_SQUARED, *rescale, *self.bound_remarks)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """A run of blocks, and some columns of its rows as they were and as they become."""
        largest = max(LARGEST_RUN, self.rows)
        return self.nbytes_turns + (4 * largest + 2 * self.rows) * itemsize + 2 * largest

    def load(self, dtype: torch.dtype) -> Apply:
        """Blocks are read when they turn their rows."""
        factors = None if self.as_comfyui else self.factors(dtype)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            multiplier = bounded(strength * self._within(strength), rows)
            for number, turns in self.turns():
                own = slice(number * self.size, (number + len(turns)) * self.size)
                shape = (len(turns), self.size, -1)
                before, after = base[own].view(shape), rows[own].view(shape)
                turned = turns.mT.to(dtype)
                for start, stop in runs(base.shape[1], own.stop - own.start):
                    delta = turned @ before[..., start:stop]
                    if factors is not None:
                        factor = factors[own].view(len(turns), self.size, 1)
                        delta.mul_(factor).addcmul_(before[..., start:stop], factor - 1)
                    after[..., start:stop].add_(delta, alpha=multiplier)

        return apply

    def _within(self, strength: float) -> float:
        """What multiplies the change beside the strength."""
        if self.decomposed:
            return self.alpha or 0.0
        return strength if self.as_comfyui else 1.0


class _Oft:
    kind: ClassVar[str] = "oft"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every layer with blocks in one set."""
        return [OftChange.read(source, reading, key) for key in keys(source, 3)]

    def partner(self, name: str) -> str | None:
        """The blocks that a rescale belongs to."""
        if name.endswith(RESCALE):
            return name.removesuffix(RESCALE) + BLOCKS
        return name if name.endswith(BLOCKS) else None


PLUG = _Oft()
