"""What LDLQ from a diagonal and a sketch costs: against a matrix product and against explicit GPTQ.

    .venv/bin/python -m bench.ldlq --markdown bench/LDLQ.md

Every figure is a ratio of times of one run, in turns on one thread; memory is the peak RSS of
a process of its own beyond what it held before. GPTQ is the usual form, in float32: the second
moment as an N x N matrix, its inverse, the inverse's Cholesky factor, then blocks of 128 columns
with lazy updates. Both get the moment ready made; factorizations count.

Source: GPTQ, arXiv 2210.17323, algorithm 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.rendering import number, table
from cq.core import catalog
from cq.core.dtypes import TensorSpec
from cq.core.grid import Grid, Scales
from cq.core.moment import Moment
from cq_quant import ldlq

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS, WIDE = 3072, 12288, 16384
_PRODUCT = 2048  # columns of the matrix product that is the yardstick
_BLOCK = 128
_FORMATS = ("int8_tensorwise", "float8_e4m3fn", "mxfp8", "nvfp4", "convrot_w4a4")


def layer(
    rows: int, columns: int, rank: int
) -> tuple[torch.Tensor, Grid, Scales, torch.Tensor, torch.Tensor]:
    """A weight, its int8 grid, scales of rows, and a moment: rest `(N,)`, sketch `(r, N)`."""
    rng = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=rng)
    strength = torch.logspace(1, -1, rank)[:, None]
    sketch = strength * torch.randn(rank, columns, generator=rng)
    rest = torch.rand(columns, generator=rng) + 0.5
    grid = catalog.load("formats", "int8_tensorwise").grid(
        TensorSpec("F32", (rows, columns)), "row"
    )
    return weight, grid, grid.scales(weight, {}), rest, sketch


def explicit(weight: torch.Tensor, scales: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """GPTQ with the N x N second moment, which it overwrites. The int8 levels."""
    order = torch.argsort(matrix.diagonal(), descending=True)
    matrix = matrix[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight[:, order]
    found = torch.empty_like(left)
    step = scales.view(-1, 1)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        own, errors = left[:, start:stop].clone(), torch.empty_like(left[:, start:stop])
        for i in range(stop - start):
            pivot = upper[start + i, start + i]
            value = own[:, i : i + 1]
            level = (value / step).round_().clamp_(-127, 127).mul_(step)
            found[:, start + i : start + i + 1] = level
            error = (value - level) / pivot
            own[:, i:] -= error * upper[start + i, start + i : stop]
            errors[:, i : i + 1] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return found[:, torch.argsort(order)]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def times(rows: int, columns: int, rank: int, runs: int, *, against: bool) -> dict[str, float]:
    """Medians in seconds: the product, LDLQ with its factors, and, if `against`, GPTQ (once)."""
    weight, grid, scales, rest, sketch = layer(rows, columns, rank)
    other = torch.randn(columns, _PRODUCT)

    def mine() -> torch.Tensor:
        return ldlq.round_rows(weight, grid, scales, ldlq.factors(rest, sketch))

    weight @ other  # the first product wakes the threads
    taken: dict[str, list[float]] = {"product": [], "ldlq": []}
    for _ in range(runs):
        taken["product"].append(_seconds(lambda: weight @ other))
        taken["ldlq"].append(_seconds(mine))
    found = {name: median(values) for name, values in taken.items()}
    if against:
        matrix = (sketch.T @ sketch).diagonal_scatter(rest + sketch.square().sum(0))
        (scale,) = scales.values()
        found["gptq"] = _seconds(lambda: explicit(weight, scale, matrix))
    return found


_MEMORY = """
import sys, torch
torch.set_num_threads(1)
from bench import ldlq as bench
from cq_quant import ldlq
rows, columns, rank, form = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
weight, grid, scales, rest, sketch = bench.layer(rows, columns, rank)
torch.randn(64, 64) @ torch.randn(64, 64)
def peak():  # not getrusage, which begins with the parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
if form == "sketch":
    factors = ldlq.factors(rest, sketch)
    for part in range(0, rows, 512):
        own = {k: v[part : part + 512] for k, v in scales.items()}
        ldlq.round_rows(weight[part : part + 512], grid, own, factors)
else:
    matrix = torch.empty(columns, columns)
    torch.mm(sketch.T, sketch, out=matrix)
    matrix.diagonal().add_(rest)
    (scale,) = scales.values()
    bench.explicit(weight, scale, matrix)
print(before, peak())
"""


def memory(rows: int, columns: int, rank: int, form: str) -> tuple[int, int]:
    """Peak RSS in bytes of a process before and after rounding in the `form` sketch or matrix."""
    found = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(rows), str(columns), str(rank), form],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, found.stdout.split())
    return before, after


def in_bf16() -> dict[str, tuple[float, float]]:
    """By format, what products in bfloat16 change: the share of codes, and the factor of the
    loss."""
    found = {}
    for name in _FORMATS:
        plug = catalog.load("formats", name)
        scaling = "row" if "row" in plug.scalings else plug.scalings[0]
        rng = torch.Generator().manual_seed(0)
        weight = 0.02 * torch.randn(1024, 3072, generator=rng)
        sketch = torch.logspace(0.5, -1, 256)[:, None] * torch.randn(256, 3072, generator=rng)
        known = Moment(rest=torch.rand(3072, generator=rng) + 0.5, sketch=sketch, rows=1 << 16)
        grid = plug.grid(TensorSpec("F32", (1024, 3072)), scaling)
        shared = dict(grid.survey([weight])) if grid.surveys else {}
        scales = {**shared, **grid.scales(weight, shared)}
        wide, narrow = (
            ldlq.round_rows(
                weight, grid, scales, ldlq.factors(known.rest, sketch, products=products)
            )
            for products in (None, torch.bfloat16)
        )
        losses = [float(known.loss(x - weight).double().sum()) for x in (wide, narrow)]
        found[name] = (float((wide != narrow).float().mean()), losses[1] / losses[0])
    return found


def to_markdown(found: dict[str, Any]) -> str:
    """The page."""
    lines = ["# What LDLQ costs", "", *_HEAD.format(**found["facts"]).splitlines(), ""]
    shape = f"{ROWS} x {COLUMNS}"
    rows = []
    for rank, taken in found["times"].items():
        product = taken["product"]
        gptq = taken.get("gptq")
        rows.append(
            (
                shape,
                str(rank),
                number(taken["ldlq"], 2),
                number(taken["ldlq"] / product, 2),
                number(None if gptq is None else gptq / taken["ldlq"], 1),
            )
        )
    titles = ("layer", "rank", "seconds", "of a product", "x explicit GPTQ")
    lines += [*table(titles, rows), "", "## Memory", ""]
    rows = [
        (form, f"{layer_rows} x {columns}", str(rank), number((after - before) / 1e6, 0),
         number(after / 1e6, 0))
        for form, layer_rows, columns, rank, before, after in found["memory"]
    ]  # fmt: skip
    titles = ("form", "layer", "rank", "MB beyond the inputs", "MB of the process")
    lines += [*table(titles, rows), "", "## Products in bfloat16 (`--bf16-compute on`)", ""]
    rows = [
        (name, f"{100 * share:.1f} %", f"x {factor:.4f}")
        for name, (share, factor) in found["bf16"].items()
    ]
    return "\n".join([*lines, *table(("format", "codes that change", "loss"), rows)]) + "\n"


_HEAD = """Written by `python -m bench.ldlq`: torch {torch}, one thread, int8 rows, medians of {runs} runs.
`of a product` is the time over that of a float32 product of M x N x 2048 in the same run, the
factorization included (aim: at most 1.5 at rank 256); `x explicit GPTQ` is how many times as long
GPTQ with the N x N matrix takes, its inverse and its factor included (aim: at least 5). Memory is
in rows of 512; the explicit form holds several N x N matrices of float32."""  # noqa: E501


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-gptq", action="store_true", help="leave the slow explicit form out")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker: small steps on several threads wait for each other
    found: dict[str, Any] = {
        "facts": {
            "torch": torch.__version__,
            "runs": args.runs,
        },
        "times": {
            rank: times(ROWS, COLUMNS, rank, args.runs, against=rank == 256 and not args.no_gptq)
            for rank in (256, 512)
        },
        "memory": [],
        "bf16": in_bf16(),
    }
    forms = [("sketch", ROWS, COLUMNS, 256), ("sketch", 4096, WIDE, 512)]
    forms += [] if args.no_gptq else [("matrix", 4096, WIDE, 512)]
    for form, rows, columns, rank in forms:
        found["memory"].append((form, rows, columns, rank, *memory(rows, columns, rank, form)))
    page = to_markdown(found)
    if args.markdown is not None:
        args.markdown.write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
