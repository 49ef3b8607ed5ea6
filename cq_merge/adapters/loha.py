"""LoHa: the elementwise product of two low-rank products.

`delta = strength * alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)`. With cores `t1` and `t2` (Tucker)
each product is `sum t[i,j,...] w_a[i,o] w_b[j,k]` instead, whose `w_a` stand transposed.

Source: FedPara, arXiv 2108.06098; LyCORIS `functional/loha.py`; ComfyUI
`comfy/weight_adapter/loha.py:LoHaAdapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq.core.dtypes import TensorSpec
from cq_merge.adapters import Apply, Change, Reading
from cq_merge.changes import Scaled, bounded, contradiction, makes, scale_of
from cq_merge.contents import Contents
from cq_merge.products import Product, named

if TYPE_CHECKING:
    import torch

_FACTORS = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
_CORES = (".hada_t1", ".hada_t2")


@dataclass(frozen=True, slots=True, kw_only=True)
class LohaChange(Scaled):
    """Two products of one shape."""

    products: tuple[Product, Product]

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the product has not the shape of `weight`, flattened."""
        made = self.products[0].shape
        if weight.shape and made == (weight.shape[0], weight.row_numel):
            return None
        return makes(self.contents, named(self.products), made)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """The factors, and rows of both products."""
        made = 2 * rows * columns * itemsize
        return made + sum(product.nbytes_peak(rows, itemsize) for product in self.products)

    def load(self, dtype: torch.dtype) -> Apply:
        """Read what all rows need; the rest is read with its rows."""
        one, two = (product.load(dtype) for product in self.products)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            stop = first + len(rows)
            delta = one(first, stop).mul_(two(first, stop))
            rows.add_(delta, alpha=bounded(strength * self.scale.value, rows))

        return apply


class _Loha:
    kind: ClassVar[str] = "loha"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every layer with all four factors, and both cores or none."""
        keys = sorted(n.removesuffix(_FACTORS[0]) for n in source.names if n.endswith(_FACTORS[0]))
        return [
            _change(source, reading, key)
            for key in keys
            if all(key + ending in source for ending in _FACTORS)
        ]

    def partner(self, name: str) -> str | None:
        """The factor after it; a core's is its twin."""
        for ring in (_FACTORS, _CORES):
            for n, ending in enumerate(ring):
                if name.endswith(ending):
                    return name.removesuffix(ending) + ring[(n + 1) % len(ring)]
        return None


PLUG = _Loha()


def _change(source: Contents, reading: Reading, key: str) -> LohaChange:
    cores = all(key + core in source for core in _CORES)
    one, two = (
        Product(
            contents=source,
            left=key + left,
            right=key + right,
            core=key + core if cores else None,
            turned=cores,
        )
        for left, right, core in zip(_FACTORS[::2], _FACTORS[1::2], _CORES, strict=True)
    )
    if one.shape != two.shape:
        raise contradiction(source, named((one, two)), "make products of two shapes")
    scale = scale_of(source, reading, key, source.spec(key + _FACTORS[1]).shape[0])
    return LohaChange(
        contents=source,
        key=key,
        tensors=(*named((one, two)), *scale.tensors),
        scale=scale,
        products=(one, two),
    )
