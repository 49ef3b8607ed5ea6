"""Matrices as adapter files hold them: whole, as two factors, or as two factors around a core.

Owns the shapes of such products and how they are multiplied out, row by row. Knows no kind.

Source: LyCORIS `functional/general.py:tucker_weight_from_conv` and `rebuild_tucker`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq_merge.changes import contradiction, matrices
from cq_merge.contents import Contents

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A matrix `(N, K)`: `left`, or `left @ right`, or `sum left[o,i] core[i,j,...] right[j,k]`.

    Shapes: `left` `(N, rank)`, `turned` `(rank, N)`; `right` `(rank, K)`; `core` `(rank, rank,
    ...)`, whose further dimensions come after K. What a file stores with more dimensions is
    flattened after the first.

    Raises: PlanError if a factor is not floating point, InputError if the shapes do not fit.
    """

    contents: Contents
    left: str
    right: str | None = None
    core: str | None = None
    turned: bool = False

    def __post_init__(self) -> None:
        specs = matrices(self.contents, self.names)
        if self.right is None:
            return
        left, right = specs[0], specs[1]
        inner = left.shape[0] if self.turned else left.row_numel
        outer = right.shape[0]
        if self.core is None:
            fits = inner == outer
        else:
            # Factors around a core are matrices; only the core has the kernel's dimensions.
            flat = all(math.prod(spec.shape[2:]) == 1 for spec in (left, right))
            fits = flat and specs[2].shape[:2] == (inner, outer)
        if not fits:
            raise contradiction(self.contents, self.names, "share no rank")

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors: left, right, core."""
        return tuple(name for name in (self.left, self.right, self.core) if name is not None)

    @property
    def rank(self) -> int | None:
        """The rank of the right factor; None if there is but one."""
        return None if self.right is None else self.contents.spec(self.right).shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        left = self.contents.spec(self.left)
        rows = left.shape[1] if self.turned else left.shape[0]
        if self.right is None:
            return rows, left.row_numel
        columns = self.contents.spec(self.right).row_numel
        if self.core is not None:
            columns *= math.prod(self.contents.spec(self.core).shape[2:])
        return rows, columns

    def nbytes_peak(self, rows: int, itemsize: int) -> int:
        """What is read and held to multiply out `rows` rows, without these themselves."""
        left = self.contents.spec(self.left)
        held = left.numel if self.turned else rows * left.row_numel
        total = self.contents.nbytes_rows(self.left, held, itemsize)
        if self.right is not None:
            total += self.contents.nbytes_whole(self.right, itemsize)
        if self.core is not None:
            # The core as read and as it is turned; what it makes as multiplied and as turned.
            core = self.contents.spec(self.core)
            total += self.contents.nbytes_whole(self.core, itemsize) + core.numel * itemsize
            total += 2 * core.shape[0] * self.shape[1] * itemsize
        return total

    def nbytes_whole(self, itemsize: int) -> int:
        """What multiplying out the whole matrix holds, with the matrix."""
        rows, columns = self.shape
        made = 0 if self.right is None else rows * columns * itemsize
        return self.nbytes_peak(rows, itemsize) + made

    def lower(self, dtype: torch.dtype) -> torch.Tensor:
        """What rows of the left factor are multiplied with: `(rank, K)`."""
        assert self.right is not None
        right = self.contents.matrix(self.right, dtype)
        if self.core is None:
            return right
        import torch

        core = self.contents.whole(self.core, dtype).flatten(2)
        return torch.einsum("ijs,jk->iks", core, right).flatten(1)

    def upper(self, dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
        """A function that gives rows `first` to `stop` of the left factor."""
        if self.turned:
            whole = self.contents.matrix(self.left, dtype)
            return lambda first, stop: whole[:, first:stop].T
        return lambda first, stop: self.contents.matrix(self.left, dtype, start=first, stop=stop)

    def load(self, dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
        """A function that multiplies out rows `first` to `stop`, in memory of their own."""
        upper = self.upper(dtype)
        if self.right is None:
            return upper
        lower = self.lower(dtype)
        return lambda first, stop: upper(first, stop) @ lower


def named(products: Sequence[Product]) -> list[str]:
    """The names of all tensors of `products`."""
    return [name for product in products for name in product.names]
