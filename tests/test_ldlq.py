"""LDLQ from a diagonal and a sketch against GPTQ with the explicit matrix, on every grid."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cq.core import catalog, rotation
from cq.core.dtypes import TensorSpec
from cq.core.grid import Grid, Scales
from cq.core.moment import Moment, compressed, output_error
from cq_quant import ldlq

GRIDS = tuple(
    (name, scaling)
    for name in catalog.names("formats")
    for scaling in catalog.load("formats", name).scalings
    if not catalog.load("formats", name).casts
)
EVERY_GRID = pytest.mark.parametrize(("name", "scaling"), GRIDS)


def gridded(name: str, scaling: str, weight: torch.Tensor) -> tuple[Grid, Scales]:
    """The format's grid for `weight`, and all its scales."""
    grid = catalog.load("formats", name).grid(TensorSpec("F32", tuple(weight.shape)), scaling)
    shared = dict(grid.survey([weight])) if grid.surveys else {}
    return grid, {**shared, **grid.scales(weight, shared)}


def moment(columns: int, rank: int, seed: object = 0) -> Moment:
    """A random diagonal with a few strong directions."""
    rng = make.generator("moment", columns, rank, seed)
    strength = torch.logspace(0.5, -1, rank)[:, None]
    return Moment(
        rest=torch.rand(columns, generator=rng) + 0.1,
        sketch=torch.randn(rank, columns, generator=rng) * strength,
        rows=10 * columns,
    )


def matrix(found: Moment) -> torch.Tensor:
    """The explicit float64 `(N, N)` matrix."""
    wide = found.sketch.double()
    return torch.diag(found.rest.double()) + wide.T @ wide


def nearest(grid: Grid, scales: Scales, weight: torch.Tensor) -> torch.Tensor:
    return grid.values(grid.nearest(weight, scales), scales)


def gptq(
    weight: torch.Tensor, h: torch.Tensor, order: torch.Tensor, grid: Grid, scales: Scales
) -> torch.Tensor:
    """The textbook: inverse, Cholesky, column after column, all in float64; the grid's own
    rounding, one column at a time, as the oracle of levels."""
    left = weight.double().clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    found = torch.empty_like(left)
    for place, column in enumerate(order.tolist()):
        levels = nearest(grid, scales, left.float())[:, column].double()
        found[:, column] = levels
        error = (left[:, column] - levels) / upper[place, place]
        left[:, order[place:]] -= error[:, None] * upper[place, place:]
    return found


def differing(left: torch.Tensor, right: torch.Tensor) -> int:
    """Levels that are not the same, but for what float32 rounds off."""
    return int(((left - right).abs() > 1e-6 * right.abs().amax()).sum())


@EVERY_GRID
def test_products_in_bfloat16_change_codes_but_hardly_the_loss(name: str, scaling: str) -> None:
    found = moment(512, 64)
    weight = 0.02 * torch.randn(256, 512, generator=make.generator("bf16", name, scaling))
    grid, scales = gridded(name, scaling, weight)
    losses, levels = [], []
    for products in (None, torch.bfloat16):
        factors = ldlq.factors(found.rest, found.sketch, products=products)
        levels.append(ldlq.round_rows(weight, grid, scales, factors))
        losses.append(float(found.loss(levels[-1] - weight).double().sum()))
    assert levels[1].dtype == torch.float32
    assert 0.98 < losses[1] / losses[0] < 1.02
    share = differing(*levels) / weight.numel()
    assert 0 < share < 0.2


@EVERY_GRID
def test_levels_are_those_of_gptq_with_the_explicit_matrix(name: str, scaling: str) -> None:
    """In float64, in three blocks, the last of them not whole on grids that allow it; with weights
    that meet no tie of the oracle's float32, where either level is right."""
    columns = 320 if name in {"int8_tensorwise", "float8_e4m3fn", "float8_e5m2"} else 256
    weight, found = make.weight(128, columns, seed="no ties"), moment(columns, 24)
    grid, scales = gridded(name, scaling, weight)
    given = ldlq.factors(found.rest.double(), found.sketch.double(), dtype=torch.float64)
    ours = ldlq.round_rows(weight.double(), grid, scales, given)
    theirs = gptq(weight, matrix(found), given.order, grid, scales)
    assert differing(ours, theirs) == 0
    assert differing(ours, nearest(grid, scales, weight).double()) > 0


@EVERY_GRID
def test_float32_loses_as_little_as_float64(name: str, scaling: str) -> None:
    weight, found = make.weight(128, 384), moment(384, 64)
    grid, scales = gridded(name, scaling, weight)
    one = ldlq.round_rows(weight, grid, scales, ldlq.factors(found.rest, found.sketch))
    given = ldlq.factors(found.rest, found.sketch, dtype=torch.float64)
    two = ldlq.round_rows(weight.double(), grid, scales, given).float()
    loss, exact = (float(found.loss(levels - weight).sum()) for levels in (one, two))
    plain = float(found.loss(nearest(grid, scales, weight) - weight).sum())
    assert loss == pytest.approx(exact, rel=0.02)
    assert loss < 0.5 * plain


@EVERY_GRID
def test_levels_are_levels_and_name_themselves(name: str, scaling: str) -> None:
    """What LDLQ chooses is coded by the grid without another change."""
    weight, found = make.weight(128, 256), moment(256, 16)
    grid, scales = gridded(name, scaling, weight)
    levels = ldlq.round_rows(weight, grid, scales, ldlq.factors(found.rest, found.sketch))
    assert torch.equal(nearest(grid, scales, levels), levels)


@EVERY_GRID
def test_single_columns_round_as_the_whole_does(name: str, scaling: str) -> None:
    """`of_columns` in any order against `nearest`; ties, which may fall either way, do not occur in
    normal numbers. Rows of zeros and outliers among them."""
    weight = make.weight(128, 256, seed="columns")
    weight[3], weight[5] = 0, weight[5] * 100
    grid, scales = gridded(name, scaling, weight)
    order = torch.randperm(256, generator=make.generator("order"))
    round_column = grid.of_columns(scales, order).rounder(torch.float32)
    found = torch.empty(256, 128)
    for place, column in enumerate(order.tolist()):
        round_column(place, weight[:, column].contiguous(), found[column])
    expected = nearest(grid, scales, weight)
    wrong = (found.T - expected).abs() > 1e-6 * expected.abs().amax()
    assert int(wrong.sum()) == 0


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_round_as_torch_converts_them(name: str) -> None:
    """Every finite float16, subnormal results and ties among them, in both precisions."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).double()
    every = every[every.isfinite()]
    dtype = getattr(torch, name)
    largest = torch.finfo(dtype).max
    grid = catalog.load("formats", name).grid(TensorSpec("F32", (1, 1)), "tensor")
    columns = grid.of_columns({"scale": torch.tensor(1.0)}, torch.zeros(1, dtype=torch.int64))
    for precision in (torch.float32, torch.float64):
        found = torch.empty(every.shape, dtype=precision)
        columns.rounder(precision)(0, every.to(precision), found)
        expected = every.float().clamp(-largest, largest).to(dtype).to(precision)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("block", [1, 7, 32, 200, 512])
def test_the_block_does_not_matter(block: int) -> None:
    weight, found = make.weight(128, 200).double(), moment(200, 24)
    grid, scales = gridded("int8_tensorwise", "row", weight.float())
    rest, sketch = found.rest.double(), found.sketch.double()
    one, two = (
        ldlq.round_rows(
            weight, grid, scales, ldlq.factors(rest, sketch, block=size, dtype=torch.float64)
        )
        for size in (block, 128)
    )
    assert differing(one, two) == 0


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    rank=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_any_shape_and_rank_is_gptq(rows: int, columns: int, rank: int, seed: int) -> None:
    weight, found = make.weight(rows, columns, seed=seed), moment(columns, rank, seed)
    grid, scales = gridded("int8_tensorwise", "row", weight)
    given = ldlq.factors(found.rest.double(), found.sketch.double(), dtype=torch.float64)
    ours = ldlq.round_rows(weight.double(), grid, scales, given)
    assert differing(ours, gptq(weight, matrix(found), given.order, grid, scales)) == 0


@EVERY_GRID
def test_a_diagonal_moment_is_nearest_rounding(name: str, scaling: str) -> None:
    weight = make.weight(128, 256)
    grid, scales = gridded(name, scaling, weight)
    plain = ldlq.factors(torch.rand(256) + 0.1, torch.zeros(0, 256))
    levels = ldlq.round_rows(weight, grid, scales, plain)
    assert differing(levels, nearest(grid, scales, weight)) == 0


def test_columns_come_by_what_they_weigh() -> None:
    found = moment(100, 8)
    order = ldlq.factors(found.rest, found.sketch).order
    diagonal = matrix(found).diagonal()[order]
    assert bool((diagonal[1:] <= diagonal[:-1] + 1e-9).all())


def test_huge_and_tiny_moments_round_alike() -> None:
    """Scaling H changes nothing, up to what float32 holds."""
    weight, found = make.weight(64, 128), moment(128, 16)
    grid, scales = gridded("int8_tensorwise", "row", weight)
    levels = [
        ldlq.round_rows(weight, grid, scales, ldlq.factors(found.rest * s**2, found.sketch * s))
        for s in (1.0, 2.0**-30, 2.0**30)
    ]
    assert torch.equal(levels[0], levels[1])
    assert torch.equal(levels[0], levels[2])


# Coordinate descent -------------------------------------------------------------------------------


@EVERY_GRID
def test_descent_never_raises_the_loss_of_a_row(name: str, scaling: str) -> None:
    weight, found = make.weight(128, 256), moment(256, 24)
    grid, scales = gridded(name, scaling, weight)
    levels = nearest(grid, scales, weight)
    for _ in range(3):
        better = ldlq.descend(weight, levels, grid, scales, found)
        before, after = found.loss(levels - weight), found.loss(better - weight)
        assert bool((after <= before * (1 + 1e-4)).all())
        assert torch.equal(nearest(grid, scales, better), better)
        levels = better
    assert float(found.loss(levels - weight).sum()) < 0.8 * float(
        found.loss(nearest(grid, scales, weight) - weight).sum()
    )


def test_descent_ends_where_no_single_weight_lowers_the_loss() -> None:
    weight, found = make.weight(4, 40), moment(40, 6)
    grid, scales = gridded("int8_tensorwise", "row", weight)
    levels = nearest(grid, scales, weight)
    for _ in range(30):
        levels = ldlq.descend(weight, levels, grid, scales, found)
    h, step = matrix(found), scales["scale"][:, 0].double()
    error = (levels - weight).double()
    least = torch.einsum("ri,ij,rj->r", error, h, error)
    for column in range(40):
        for way in (-1, 1):
            moved = error.clone()
            moved[:, column] += way * step
            inside = (levels[:, column].double() / step + way).abs() <= 127.01
            loss = torch.einsum("ri,ij,rj->r", moved, h, moved)
            assert bool((loss[inside] >= least[inside] * (1 - 1e-4)).all())


# The moment ---------------------------------------------------------------------------------------


def test_loss_is_the_quadratic_form() -> None:
    found, error = moment(50, 9), make.weight(7, 50)
    wide = error.double()
    expected = torch.einsum("ri,ij,rj->r", wide, matrix(found), wide)
    assert torch.allclose(found.loss(error).double(), expected, rtol=1e-5)
    whole = float(torch.einsum("ri,ij,rj->", wide, matrix(found), wide))
    assert output_error(found, error, 2 * error) == pytest.approx(0.25)
    assert whole > 0
    assert output_error(found, error, torch.zeros_like(error)) == 0


@pytest.mark.parametrize("group", [16, 64, 256])
def test_a_rotated_moment_is_the_explicit_one_but_for_the_rests_correlations(group: int) -> None:
    """The sketch rotates exactly; of the rest the diagonal is exact. With a rest that is even
    within groups, nothing is lost."""
    found = moment(256, 12)
    h = torch.block_diag(*[rotation.hadamard(group).double()] * (256 // group))
    explicit = h @ matrix(found) @ h.T
    assert torch.allclose(found.rotated(group).diagonal().double(), explicit.diagonal(), rtol=1e-4)
    even = Moment(rest=torch.full((256,), 0.7), sketch=found.sketch, rows=99)
    explicit = h @ matrix(even) @ h.T
    assert torch.allclose(matrix(even.rotated(group)), explicit, atol=1e-5)


def test_features_that_stand_out_lose_nothing_by_rotation() -> None:
    """As directions of their own: their correlations after the rotation are what helps."""
    rest = torch.full((256,), 0.5)
    rest[[7, 99]] = torch.tensor([40.0, 300.0])
    found = Moment(rest=rest, sketch=moment(256, 12).sketch, rows=99)
    h = rotation.hadamard(256).double()
    explicit = h @ matrix(found) @ h.T
    assert torch.allclose(matrix(found.rotated(256)), explicit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [5, 40])
def test_compression_keeps_the_leading_directions(rank: int) -> None:
    rows = make.weight(30, 80) * torch.logspace(0, -2, 30)[:, None]
    found = compressed(rows, rank)
    values = torch.linalg.eigvalsh((rows.T @ rows).double()).flip(0)[: found.shape[0]]
    assert found.shape[0] == min(rank, 30)
    assert torch.allclose(found.double().square().sum(1), values, rtol=1e-3, atol=1e-7)
    if rank >= 30:
        assert torch.allclose(found.T @ found, rows.T @ rows, atol=1e-6)


def test_damping_makes_any_moment_positive() -> None:
    """Also of inputs that are all zero, for which rounding is nearest."""
    dead = Moment(rest=torch.zeros(64), sketch=torch.zeros(3, 64), rows=5).damped(0.1)
    weight = make.weight(16, 64)
    grid, scales = gridded("int8_tensorwise", "row", weight)
    levels = ldlq.round_rows(weight, grid, scales, ldlq.factors(dead.rest, dead.sketch))
    assert differing(levels, nearest(grid, scales, weight)) == 0
    flat = Moment(rest=torch.zeros(64), sketch=torch.randn(3, 64), rows=5).damped(0.1)
    assert bool((flat.rest > 0).all())


_WIDE = """
import resource, torch
from cq.core import catalog
from cq.core.dtypes import TensorSpec
from cq_quant import ldlq
torch.set_num_threads(1)
weight = torch.randn(128, 16384)
grid = catalog.load("formats", "int8_tensorwise").grid(TensorSpec("F32", (128, 16384)), "row")
scales = grid.scales(weight, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
given = ldlq.factors(torch.rand(16384) + 0.1, torch.randn(64, 16384))
ldlq.round_rows(weight, grid, scales, given)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_nothing_is_as_large_as_the_matrix() -> None:
    """16 384 columns: the matrix would take 1 GB; what is added stays under 150 MB."""
    done: Any = subprocess.run(
        [sys.executable, "-c", _WIDE], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 150
