"""LDLQ from a diagonal and a sketch: rounding that feeds errors forward, without an N x N matrix.

Owns the numbers: `factors` once per layer, `round_rows` for any rows of it, `descend` to refine
what was rounded. Pure functions on tensors; knows no format, no file and no option.

With H = diag(d) + XᵀX (X r x N) the Schur complement of H on a block's columns, the columns after
it eliminated, is C = diag(d_b) + X_bᵀ G⁻¹ X_b with G = I + the sum over the columns f after the
block of x_f x_fᵀ / d_f (Woodbury's identity). What earlier columns ask of the block is R G⁻¹ X_b
C⁻¹, where R, rows x r, is the output error so far along the sketch. Inside the block C = U D Uᵀ, U
unit upper: a column's target takes in what the columns before it lacked of theirs, times -U⁻¹.

Source: GPTQ, arXiv 2210.17323; QuIP, arXiv 2307.13304 (LDLQ). The form with a sketch is our own;
the tests against the explicit matrix are its proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq.core.grid import Columns, Grid, Scales
from cq.core.moment import Moment

if TYPE_CHECKING:
    import torch

BLOCK = 128  # columns whose factors are dense
_SUB, _MINI = 32, 8  # columns that products and single steps take, so that they stay in cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What rounding needs of a second moment, in the order of rounding.

    `order` `(N,)` names the columns; `sketch` `(r, N)` is X in that order, `pull` `(r, N)` is
    G⁻¹ X_b C⁻¹ of each block, `feed` `(N, BLOCK)` the blocks' -U⁻ᵀ below the diagonal. Products
    with `sketch` and `pull` are taken in their dtype.
    """

    order: torch.Tensor
    sketch: torch.Tensor
    pull: torch.Tensor
    feed: torch.Tensor
    block: int


def factors(
    rest: torch.Tensor,
    sketch: torch.Tensor,
    *,
    block: int = BLOCK,
    dtype: torch.dtype | None = None,
    products: torch.dtype | None = None,
) -> Factors:
    """The factors of H = diag(rest) + sketchᵀ sketch; `rest` must be positive.

    Columns come in the order of H's diagonal, largest first: what weighs most is rounded while most
    can still make up for it. Blocks are taken from the last to the first, so that G grows by what
    is positive and nothing cancels. r x r matrices are float64, the results `dtype` (float32),
    `sketch` and `pull` `products` (as `dtype`).

    Shapes: `rest` `(N,)`, `sketch` `(r, N)`.
    """
    import torch

    dtype = dtype or torch.float32
    columns, rank = rest.shape[0], sketch.shape[0]
    diagonal = rest.double() + sketch.double().square().sum(0)
    order = torch.argsort(diagonal, descending=True, stable=True)
    x = sketch[:, order].to(dtype)
    weight = rest[order].double()
    pull = x.new_empty(rank, columns)
    feed = x.new_zeros(columns, block)
    free = torch.eye(rank, dtype=torch.float64, device=x.device)  # G
    for start in reversed(range(0, columns, block)):
        stop = min(columns, start + block)
        own = sketch[:, order[start:stop]].double()
        solved = torch.cholesky_solve(own, torch.linalg.cholesky(free))  # Y
        schur = torch.diag(weight[start:stop]).addmm_(own.T, solved)  # C
        upper = torch.linalg.cholesky(schur.flip(0, 1)).flip(0, 1)  # C = upper upperᵀ
        half = torch.linalg.solve_triangular(upper.T, solved, upper=False, left=False)
        pull[:, start:stop] = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
        unit = upper / upper.diagonal()  # U
        whole = torch.eye(stop - start, dtype=torch.float64, device=x.device)
        back = torch.linalg.solve_triangular(unit, whole, upper=True, unitriangular=True)
        feed[start:stop, : stop - start] = back.T.neg_().tril_(-1)
        free.addmm_(own / weight[start:stop], own.T)
    products = products or dtype
    return Factors(
        order=order, sketch=x.to(products), pull=pull.to(products), feed=feed, block=block
    )


def round_rows(weight: torch.Tensor, grid: Grid, scales: Scales, given: Factors) -> torch.Tensor:
    """The levels that LDLQ chooses for float rows, under fixed scales; a new tensor.

    Rows are independent of each other. Shapes: `(rows, N)` to `(rows, N)`.
    """
    import torch

    rows = weight.shape[0]
    turned = weight.T.contiguous()  # a column's rows lie together
    error = weight.new_zeros(given.sketch.shape[0], rows)  # Rᵀ
    for start in range(0, weight.shape[1], given.block):
        chosen = given.order[start : start + given.block]
        span = slice(start, start + chosen.shape[0])
        own = turned.index_select(0, chosen)
        target = _added(own.clone(), given.pull[:, span].T, error)
        levels = torch.empty_like(own)
        _round_block(target, levels, given.feed[span], grid.of_columns(scales, chosen))
        _added(error, given.sketch[:, span], own.sub_(levels))
        turned.index_copy_(0, chosen, levels)
    return turned.T.contiguous()


def _added(sum: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`sum` plus the product, in place; the product in the dtype of `left`, the sum in its own."""
    if left.dtype == sum.dtype:
        return sum.addmm_(left, right)
    return sum.add_(left @ right.to(left.dtype))


def descend(
    weight: torch.Tensor, levels: torch.Tensor, grid: Grid, scales: Scales, moment: Moment
) -> torch.Tensor:
    """One pass of coordinate descent over levels that were chosen: each column in turn is rounded
    anew as the errors of all others ask for; the moment's loss of no row grows. A new tensor.

    O(rank) for each weight: the output error so far is kept along the sketch, and within a block
    the columns' own products. Shapes: `(rows, N)` to `(rows, N)`.

    Source: CDQuant, arXiv 2406.17542.
    """
    import torch

    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    turned, found = weight.T.contiguous(), levels.T.contiguous()
    error = moment.sketch @ (turned - found)
    for chosen in torch.split(order, BLOCK):
        sketch, rest = moment.sketch[:, chosen], moment.rest[chosen]
        products = (sketch.T @ sketch).add_(torch.diag(rest))
        own = found.index_select(0, chosen)
        lacking = turned.index_select(0, chosen).sub_(own)
        target = (rest[:, None] * lacking).addmm_(sketch.T, error)
        moves = _descend_block(target, own, products, grid.of_columns(scales, chosen))
        error.addmm_(sketch, moves, alpha=-1)
        found.index_copy_(0, chosen, own)
    return found.T.contiguous()


def _round_block(
    target: torch.Tensor, levels: torch.Tensor, feed: torch.Tensor, columns: Columns
) -> None:
    """Round a block's columns one after the other; `target` becomes what each still lacked."""
    round_column = columns.rounder(target.dtype)
    lines, found = target.unbind(0), levels.unbind(0)

    def settle(j: int) -> None:
        round_column(j, lines[j], found[j])
        lines[j].sub_(found[j])

    _sweep(target, target, feed, settle)


def _descend_block(
    target: torch.Tensor, levels: torch.Tensor, products: torch.Tensor, columns: Columns
) -> torch.Tensor:
    """Move a block's levels one column after the other; by how much each was moved."""
    import torch

    round_column = columns.rounder(target.dtype)
    moves = torch.zeros_like(target)
    lines, found, moved = target.unbind(0), levels.unbind(0), moves.unbind(0)
    inverse = (1 / products.diagonal()).cpu().tolist()
    wanted = torch.empty_like(target[0])

    def settle(j: int) -> None:
        torch.add(found[j], lines[j], alpha=inverse[j], out=wanted)
        round_column(j, wanted, moved[j])
        torch.sub(moved[j], found[j], out=wanted)
        found[j].copy_(moved[j])
        moved[j].copy_(wanted)

    _sweep(target, moves, products.neg(), settle)
    return moves


def _sweep(
    target: torch.Tensor,
    settled: torch.Tensor,
    feed: torch.Tensor,
    settle: Callable[[int], None],
) -> None:
    """Call `settle` for each column in turn, when its target has taken in `feed` times what the
    columns before it have `settled`; in three levels, so that single steps stay in cache."""
    size = target.shape[0]
    for sub in range(0, size, _SUB):
        end = min(size, sub + _SUB)
        if sub:
            target[sub:end].addmm_(feed[sub:end, :sub], settled[:sub])
        for mini in range(sub, end, _MINI):
            last = min(end, mini + _MINI)
            if mini > sub:
                target[mini:last].addmm_(feed[mini:last, sub:mini], settled[sub:mini])
            for j in range(mini, last):
                settle(j)
                if j + 1 < last:
                    target[j + 1 : last].addr_(feed[j + 1 : last, j], settled[j])
