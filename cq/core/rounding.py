"""One weight through a format's grid: from float rows to stored tensors, segment by segment.

Owns the order of things (shared scales first, rows in order, padding, scales last) for whoever
rounds: the quantize stage, and tensors at run time. Who chooses codes is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from cq.core.dtypes import TensorSpec
from cq.core.formats import Format
from cq.core.grid import Grid, Scales

if TYPE_CHECKING:
    import torch


class Fit(Protocol):
    """Chooses codes: the `fit` of an optimizer."""

    def __call__(
        self, weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
    ) -> tuple[torch.Tensor, Scales]:
        """Codes and the rows' own scales of a float32 row segment."""
        ...


def stored_tensors(
    plug: Format,
    weight: TensorSpec,
    scaling: str,
    segments: Callable[[], Iterator[torch.Tensor]],
    fit: Fit,
    *,
    search: bool,
    together: int = 1,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors of a matrix by local name: the weight's rows in order, then what lies
    beside it, when all scales are known.

    `segments` yields its float32 rows in the basis that is rounded in, cut at multiples of 128
    rows; it is called twice where a scale reaches over all rows, so that they are never held.
    `fit` gets `together` of them at a time; what is yielded is cut as they are.
    """
    import torch

    grid = plug.grid(weight, scaling)
    if grid is None:
        yield from plug.store(torch.cat(list(segments()))).items()
        return
    shared = dict(grid.survey(segments())) if grid.surveys else {}
    found: dict[str, list[torch.Tensor]] = {}
    rows = 0
    for batch in _batches(segments(), together):
        sizes = [segment.shape[0] for segment in batch]
        codes, own = fit(_joined(batch), grid, shared, search=search)
        rows += sum(sizes)
        for key, scale in own.items():
            found.setdefault(key, []).append(scale)
        for part in torch.split(codes, sizes):
            packed = plug.pack(part)
            yield "weight", packed
    stored = plug.tensors(weight, scaling)["weight"]
    if stored.shape[0] > rows:
        padding = (stored.shape[0] - rows, *stored.shape[1:])
        yield "weight", torch.zeros(padding, dtype=packed.dtype, device=packed.device)
    joined = {key: s[0] if len(s) == 1 else torch.cat(s) for key, s in found.items()}
    yield from plug.pack_scales({**shared, **joined}).items()


def _batches(segments: Iterator[torch.Tensor], together: int) -> Iterator[list[torch.Tensor]]:
    while batch := list(islice(segments, together)):
        yield batch


def _joined(batch: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of a batch, which is emptied, so that its rows are not held twice."""
    import torch

    whole = batch[0] if len(batch) == 1 else torch.cat(batch)
    batch.clear()
    return whole
