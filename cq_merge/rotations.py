"""Rotations of a weight's rows by Cayley's map of skew-symmetric blocks: what OFT and BOFT share.

`Q = B - B^T` is bounded to a Frobenius norm over all blocks, and `R = (I + Q) (I - Q)^-1`. Owns `R`
without its identity, in float64, so that a small rotation is not lost beside the ones.

Source: OFT, arXiv 2306.07280, and BOFT, arXiv 2311.06243; LyCORIS `functional/diag_oft.py:get_r`
and sd-scripts `networks/oft.py:OFTModule` (the bound is alpha times the rows); ComfyUI
`comfy/weight_adapter/oft.py` and `boft.py` (the bound is alpha).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from cq.core.dtypes import TensorSpec
from cq.core.text import printable
from cq_merge.adapters import Additive, Reading
from cq_merge.changes import ALPHA, LARGEST_RUN, contradiction
from cq_merge.contents import Contents

if TYPE_CHECKING:
    import torch

BLOCKS = ".oft_blocks"
RESCALE = ".rescale"
_BOUND = "ComfyUI bounds rotations by alpha itself, not by alpha times the rows as in training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation(Additive):
    """Blocks that turn a weight's rows, and a factor for each row after that.

    Shapes: `blocks` `(..., b, b)`, `rescale` `(N, 1, ...)`. `decomposed` is ComfyUI's way inside
    DoRA: the strength counts within the change, which is multiplied by alpha.
    """

    contents: Contents
    key: str
    tensors: tuple[str, ...]
    blocks: str
    rescale: str | None
    alpha: float | None = field()  # without this, the property above would be the default
    as_comfyui: bool
    decomposed: bool = False

    @classmethod
    def read(cls, source: Contents, reading: Reading, key: str) -> Self:
        """The rotation that a file holds under `key`.

        Raises: PlanError if something is not floating point, InputError for blocks that are not
        square, a rescale that is not one number for each row, or an alpha that is no number.
        """
        blocks, rescale, alpha = (key + ending for ending in (BLOCKS, RESCALE, ALPHA))
        spec = source.floating(blocks)
        if spec.shape[-1] != spec.shape[-2] or not spec.numel:
            raise contradiction(source, [blocks], "are no square blocks")
        rows = math.prod(spec.shape[-3:-1])
        if rescale in source:
            own = source.floating(rescale)
            if own.shape[:1] != (rows,) or own.numel != rows:
                raise contradiction(source, [blocks, rescale], "do not have the same rows")
        return cls(
            contents=source,
            key=key,
            tensors=tuple(name for name in (blocks, rescale, alpha) if name in source),
            blocks=blocks,
            rescale=rescale if rescale in source else None,
            alpha=source.scalar(alpha) if alpha in source else None,
            as_comfyui=reading.as_comfyui,
        )

    @property
    def bound_remarks(self) -> tuple[str, ...]:
        """Where ComfyUI bounds rotations in another way."""
        return (_BOUND,) if self.alpha is not None and self.alpha > 0 else ()

    @property
    def reads_base(self) -> bool:
        """The weight itself is turned."""
        return True

    @property
    def whole(self) -> bool:
        """A block mixes its rows."""
        return True

    @property
    def size(self) -> int:
        """Rows of a block."""
        return self.contents.spec(self.blocks).shape[-1]

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return math.prod(self.contents.spec(self.blocks).shape[-3:-1])

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the blocks do not cover the rows of `weight`."""
        if weight.shape and weight.shape[0] == self.rows:
            return None
        spec = self.contents.spec(self.blocks)
        return f"the blocks `{printable(self.blocks)}` {spec} turn {self.rows} rows"

    def shrinking(self) -> float:
        """What all of `Q` is multiplied by, so that its norm keeps the bound."""
        bound = (self.alpha or 0.0) * (1 if self.as_comfyui else self.rows)
        if bound <= 0:
            return 1.0
        squared = 0.0
        for _, part in self._parts():
            squared += float((part - part.mT).square().sum())
        norm = math.sqrt(squared) + 1e-8
        return bound / norm if norm > bound else 1.0

    def turns(self) -> Iterator[tuple[int, torch.Tensor]]:
        """`R - I` for runs of blocks, `(count, b, b)` in float64, each with the first's number.

        Raises: InputError if a value is not finite.
        """
        import torch

        shrinking = self.shrinking()
        identity = torch.eye(self.size, dtype=torch.float64)
        for first, part in self._parts():
            skew = (part - part.mT).mul_(shrinking)
            # (I + Q) (I - Q)^-1 - I = 2 (I - Q)^-1 Q, without taking ones from ones.
            yield first, torch.linalg.solve(identity - skew, skew).mul_(2)

    def factors(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The factor of each row, `(N, 1)`."""
        if self.rescale is None:
            return None
        return self.contents.matrix(self.rescale, dtype).view(-1, 1)

    @property
    def nbytes_turns(self) -> int:
        """What making a run of blocks holds: as read, skew, the system, its factorization and its
        solution, one more on the way, and the identity."""
        spec = self.contents.spec(self.blocks)
        run = min(spec.numel, max(LARGEST_RUN, spec.row_numel))
        return 8 * (6 * run + self.size**2)

    def _parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Runs of blocks `(count, b, b)` in float64: along the first dimension, which is read."""
        import torch

        spec = self.contents.spec(self.blocks)
        own = math.prod(spec.shape[1:-2])  # blocks in one step along the first dimension
        step = max(1, LARGEST_RUN // spec.row_numel)
        for start in range(0, spec.shape[0], step):
            stop = min(spec.shape[0], start + step)
            part = self.contents.matrix(self.blocks, torch.float64, start=start, stop=stop)
            yield start * own, part.view(-1, self.size, self.size)


def keys(source: Contents, dimensions: int) -> list[str]:
    """The keys with blocks of so many dimensions."""
    return sorted(
        name.removesuffix(BLOCKS)
        for name in source.names
        if name.endswith(BLOCKS) and len(source.spec(name).shape) == dimensions
    )
