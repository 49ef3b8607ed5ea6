"""GLoRA: a low-rank change of the weight's input side and a low-rank sum.

`delta = strength * alpha / rank * (W @ a1 @ a2 + b1 @ b2)`; files of older LyCORIS have the factors
the other way around: `W @ a2 @ a1 + b2 @ b1`. For convolutions the new one changes the channels of
the input, kernel position by kernel position; the old one the flattened kernel.

The shapes tell the layouts apart: the rank is the side that is shared. They cannot where the rank
is as large as a square weight; then the older layout is taken, as ComfyUI does.

Source: LyCORIS `modules/glora.py:GLoRAModule`; ComfyUI
`comfy/weight_adapter/glora.py:GLoRAAdapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq.core.dtypes import TensorSpec
from cq_merge.adapters import Apply, Change, Reading
from cq_merge.changes import (
    Scaled,
    bounded,
    contradiction,
    makes,
    matrices,
    nbytes_run,
    runs,
    scale_of,
)
from cq_merge.contents import Contents
from cq_merge.products import Product, named

if TYPE_CHECKING:
    import torch

_FACTORS = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")
_EITHER = "the factors fit both layouts of GLoRA and are taken as the older one, as ComfyUI does"


@dataclass(frozen=True, slots=True, kw_only=True)
class GloraChange(Scaled):
    """`inner` of shape `(I, I)` changes the weight's `I` input channels, `outer` is added."""

    inner: Product
    outer: Product

    @property
    def reads_base(self) -> bool:
        """The weight itself is multiplied."""
        return True

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the products have not the shapes for `weight`."""
        columns = self.inner.shape[0]
        channels = weight.shape[1] if len(weight.shape) > 1 else 1
        # The older layout flattens kernels, the newer one leaves their positions alone.
        fits = columns in {channels, weight.row_numel}
        if fits and weight.shape and self.outer.shape == (weight.shape[0], weight.row_numel):
            return None
        return makes(self.contents, named((self.inner, self.outer)), self.outer.shape)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """The factors; rows of the weight by channel, and what is made of them."""
        total = self.outer.nbytes_peak(rows, itemsize)
        total += self.inner.nbytes_peak(self.inner.shape[0], itemsize)
        if self.inner.shape[0] == columns:
            return total + rows * (self.inner.rank or 0) * itemsize
        positions = columns // self.inner.shape[0]
        return total + nbytes_run(rows, 2 * columns + positions * (self.inner.rank or 0), itemsize)

    def load(self, dtype: torch.dtype) -> Apply:
        """Read all factors but the left one of the sum, which is read with its rows."""
        channels = self.inner.shape[0]
        first_in, then_in = self.inner.upper(dtype)(0, channels), self.inner.lower(dtype)
        up, down = self.outer.upper(dtype), self.outer.lower(dtype)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            multiplier = bounded(strength * self.scale.value, rows)
            if base.shape[1] == channels:
                rows.addmm_(base @ first_in, then_in, alpha=multiplier)
            else:
                width = 2 * base.shape[1] + base.shape[1] // channels * first_in.shape[1]
                for start, stop in runs(len(base), width):
                    kernel = base[start:stop].view(stop - start, channels, -1).transpose(1, 2)
                    delta = (kernel @ first_in @ then_in).transpose(1, 2)
                    rows[start:stop].view(delta.shape).add_(delta, alpha=multiplier)
            rows.addmm_(up(first, first + len(rows)), down, alpha=multiplier)

        return apply


class _Glora:
    kind: ClassVar[str] = "glora"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every layer with all four factors."""
        keys = sorted(n.removesuffix(_FACTORS[0]) for n in source.names if n.endswith(_FACTORS[0]))
        return [
            _change(source, reading, key)
            for key in keys
            if all(key + ending in source for ending in _FACTORS)
        ]

    def partner(self, name: str) -> str | None:
        """The factor after it."""
        for n, ending in enumerate(_FACTORS):
            if name.endswith(ending):
                return name.removesuffix(ending) + _FACTORS[(n + 1) % len(_FACTORS)]
        return None


PLUG = _Glora()


def _change(source: Contents, reading: Reading, key: str) -> GloraChange:
    names = [key + ending for ending in _FACTORS]
    a1, a2, b1, b2 = matrices(source, names)
    newer = a1.row_numel == a2.shape[0] == b1.row_numel == b2.shape[0]
    older = a1.shape[0] == a2.row_numel == b1.shape[0] == b2.row_numel
    if newer and older:
        newer = a2.shape[0] < a1.shape[0]
    if newer:
        fits = a1.shape[0] == a2.row_numel
        order = names
    else:
        fits = older and a1.row_numel == a2.shape[0]
        order = [names[1], names[0], names[3], names[2]]
    if not fits:
        raise contradiction(source, names, "share no rank")
    inner = Product(contents=source, left=order[0], right=order[1])
    outer = Product(contents=source, left=order[2], right=order[3])
    scale = scale_of(source, reading, key, source.spec(order[1]).shape[0])
    tied = len({size for spec in (a1, a2, b1, b2) for size in (spec.shape[0], spec.row_numel)}) == 1
    return GloraChange(
        contents=source,
        key=key,
        tensors=(*names, *scale.tensors),
        scale=scale,
        inner=inner,
        outer=outer,
        said=(_EITHER,) if tied else (),
    )
