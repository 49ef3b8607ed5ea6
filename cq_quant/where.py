"""Where a layer is rounded: on the CPU or a device, in how large portions, and what it takes.

Owns what becomes of a layer when a device's memory runs out: rows of a batch that the device has no
room for are rounded on the CPU, a segment at a time. Rows are independent of each other, so the
choice is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from cq.core.dtypes import DTYPES
from cq.core.engine import device
from cq.core.engine.staging import Staging
from cq.core.grid import Grid, Scales
from cq.core.rounding import Fit
from cq.core.source import largest_cut
from cq.core.streaming import CPU, DTYPE, Placement, Work, claimed

if TYPE_CHECKING:
    import torch

    from cq_quant.layer import Kind


def in_bf16(word: str, device: str) -> bool | None:
    """What `--bf16-compute` `auto`, `on` or `off` means: settled in the plan, since it changes
    codes. `auto` is None, which is on if anything is guided by a calibration, where a GPU is asked
    for by its name, which has units for such products."""
    if word == "auto":
        return None if device.startswith("cuda") else False
    return word == "on"


def taken(
    kind: Kind, rank: int, nbytes_source: int, beside: Callable[[int], int] | None
) -> Work | None:
    """What a layer of the `kind` takes, as far as its rows can be cut, with so many directions of
    moments, sources that hold `nbytes_source`, and what stands `beside` so many weights that are
    rounded together. None if its format takes the whole weight."""
    key = rank, nbytes_source
    if beside is None and key in kind.works:
        return kind.works[key]
    optimizer = kind.plan.optimizer
    nbytes_weight = kind.nbytes_weight
    if optimizer is None or nbytes_weight is None:
        return None
    cut, columns = largest_cut(kind.matrix), kind.matrix.shape[-1]
    once, twice = (
        optimizer.nbytes_work(columns, rank, weights) + (beside(weights) if beside else 0)
        for weights in (cut, 2 * cut)
    )
    rounding = -((once - twice) // cut)  # for each weight, rounded up
    work = Work(
        weights=kind.matrix.numel,
        columns=columns,
        cut=cut,
        usual=kind.together(rank),
        gains=kind.together(rank) > 1,
        nbytes_host=nbytes_source + kind.nbytes_held,
        nbytes_fixed=kind.nbytes_beside + kind.nbytes_rotation + once - rounding * cut,
        nbytes_weight=nbytes_weight + rounding,
        nbytes_staged=-(-DTYPES[kind.weight.dtype].bits // 8),
        dtype="bfloat16" if kind.plan.bf16 and optimizer.calibrates and rank else DTYPE,
    )
    if beside is None:
        kind.works[key] = work
    return work


class Where(NamedTuple):
    """Where a layer is computed: the way there, the row segments that go together, and whom to tell
    if it has no room."""

    staging: Staging
    segments: int
    retreat: Callable[[], None]

    def fitted(self, prepare: Callable[[Where], Fit], rows: int) -> tuple[Fit, Where]:
        """What rounds rows of a layer, and where: on the CPU if the device has no room for what all
        rows need, and there `rows` at a time if it has none for a batch."""
        import torch

        if self.staging.device == CPU:
            return prepare(self), self
        try:
            there = prepare(self)
        except torch.OutOfMemoryError:  # whose traceback holds what was computed so far
            there = None
        if there is None:
            device.give_back()
            self.retreat()
            return prepare(HERE), HERE
        return Retreating(there, lambda: prepare(HERE), rows, self.retreat), self


HERE = Where(Staging(CPU), 1, lambda: None)


@contextmanager
def asked(name: str, usual: int) -> Iterator[Where]:
    """Where the part is computed that this thread produces, `usual` row segments at a time if
    nobody said anything. What a device does wrong is told of the tensor `name`."""
    place, retreat = claimed(Placement(device=CPU, segments=usual))
    with device.failures_told(name, place.device):
        yield Where(Staging(place.device, place.ahead), place.segments, retreat)


class Retreating:
    """The fit `there`, and what `here` prepares where that runs out of memory, `rows` at a time;
    `retreat` is called then."""

    def __init__(
        self, there: Fit, here: Callable[[], Fit], rows: int, retreat: Callable[[], None]
    ) -> None:
        self._there = there
        self._prepare = here
        self._here: Fit | None = None
        self._rows = rows
        self._retreat = retreat

    def __call__(
        self, weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
    ) -> tuple[torch.Tensor, Scales]:
        """Codes and the rows' own scales, on the device of `weight`."""
        import torch

        try:
            return self._there(weight, grid, shared, search=search)
        except torch.OutOfMemoryError:
            pass
        device.give_back()
        self._retreat()
        self._here = self._here or self._prepare()
        scales = {key: scale.to(CPU) for key, scale in shared.items()}
        found = [
            self._here(rows.to(CPU), grid, scales, search=search)
            for rows in torch.split(weight, self._rows)
        ]
        codes = torch.cat([codes for codes, _ in found]).to(weight.device)
        own = {key: torch.cat([s[key] for _, s in found]).to(weight.device) for key in found[0][1]}
        return codes, own
