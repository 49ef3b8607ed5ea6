"""LoKr: a Kronecker product of a small and a large factor, each whole or itself low-rank.

`delta = strength * alpha / rank * kron(w1, w2)`, where a factor may be `w_a @ w_b` and the large
one, with a core (Tucker), `sum t2[i,j,...] w2_a[i,o] w2_b[j,k]`. The rank is that of the large
factor where that is low-rank, else of the small one; where neither is, the alpha does not count.
Convolution kernels are flattened after their first dimension, which a Kronecker product allows.

Source: LyCORIS `modules/lokr.py:LokrModule` and `functional/lokr.py`; ComfyUI
`comfy/weight_adapter/lokr.py:LoKrAdapter`, which fails where there is a core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq.core.dtypes import TensorSpec
from cq_merge.adapters import Apply, Change, Reading
from cq_merge.changes import ALPHA, UNCHANGED, Inert, Scale, Scaled, bounded, makes, scale_of
from cq_merge.contents import Contents
from cq_merge.products import Product, named

if TYPE_CHECKING:
    import torch

_SMALL, _LARGE = ".lokr_w1", ".lokr_w2"
_CORE = ".lokr_t2"
_NO_CORE = f"ComfyUI fails at layers of LoKr with `{_CORE}`{UNCHANGED}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LokrChange(Scaled):
    """The Kronecker product of two factors."""

    small: Product
    large: Product

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the product has not the shape of `weight`, flattened."""
        small, large = self.small.shape, self.large.shape
        made = (small[0] * large[0], small[1] * large[1])
        if weight.shape and made == (weight.shape[0], weight.row_numel):
            return None
        return makes(self.contents, named((self.small, self.large)), made)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """Both factors whole, and what they are made of; their product is never held."""
        return self.small.nbytes_whole(itemsize) + self.large.nbytes_whole(itemsize)

    def load(self, dtype: torch.dtype) -> Apply:
        """Read and make both factors."""
        small, large = (own.load(dtype)(0, own.shape[0]) for own in (self.small, self.large))
        height = len(large)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            multiplier = bounded(strength * self.scale.value, rows)
            done = 0
            while done < len(rows):  # the rows that one row of the small factor makes
                upper, lower = divmod(first + done, height)
                count = min(len(rows) - done, height - lower)
                own = rows[done : done + count].view(count, small.shape[1], large.shape[1])
                part = large[lower : lower + count, None]
                own.addcmul_(small[upper, :, None], part, value=multiplier)
                done += count

        return apply


class _Lokr:
    kind: ClassVar[str] = "lokr"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every layer with both factors, whole or low-rank."""
        keys = {
            name[: -len(ending)]
            for name in source.names
            for ending in (_SMALL, _SMALL + "_a")
            if name.endswith(ending)
        }
        changes = []
        for key in sorted(keys):
            small, large = (_factor(source, key + which) for which in (_SMALL, _LARGE))
            if small is not None and large is not None:
                changes.append(_change(source, reading, key, small, large))
        return changes

    def partner(self, name: str) -> str | None:
        """A low-rank factor's other half, and the other factor, whole."""
        for which, other in ((_SMALL, _LARGE), (_LARGE, _SMALL)):
            for ending, needed in (("_a", which + "_b"), ("_b", which + "_a"), ("", other)):
                if name.endswith(which + ending):
                    return name.removesuffix(which + ending) + needed
        return name.removesuffix(_CORE) + _LARGE + "_a" if name.endswith(_CORE) else None


PLUG = _Lokr()


def _factor(source: Contents, whole: str) -> Product | None:
    """A factor; None if it is not there, or half of it."""
    if whole in source:
        return Product(contents=source, left=whole)
    left, right = whole + "_a", whole + "_b"
    if left not in source or right not in source:
        return None
    core = whole.removesuffix(_LARGE) + _CORE if whole.endswith(_LARGE) else None
    if core not in source:
        return Product(contents=source, left=left, right=right)
    return Product(contents=source, left=left, right=right, core=core, turned=True)


def _change(source: Contents, reading: Reading, key: str, small: Product, large: Product) -> Change:
    rank = small.rank if large.rank is None else large.rank
    if rank is not None:
        scale = scale_of(source, reading, key, rank)
    else:
        alpha = (key + ALPHA,) if key + ALPHA in source else ()  # the layer's, but without effect
        scale = Scale(rank=None, alpha=None, tensors=alpha)
    tensors = (*named((small, large)), *scale.tensors)
    said = () if large.core is None else (_NO_CORE,)
    if said and reading.as_comfyui:
        return Inert(key=key, tensors=tensors, said=said)
    return LokrChange(
        contents=source,
        key=key,
        tensors=tensors,
        scale=scale,
        small=small,
        large=large,
        said=said,
    )
