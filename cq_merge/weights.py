"""One tensor of a checkpoint with all the changes that adapters make to it, as a part.

Owns the arithmetic around the kinds: float32 or better, row segment by row segment where every
change allows it, the whole weight at once where one mixes rows, makes the weight grow, or a method
compares adapters; one rounding at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.dtypes import DTYPES, TensorSpec, torch_dtype
from cq.core.errors import InputError
from cq.core.source import cuts, largest_cut
from cq_merge.adapters import Apply, Change
from cq_merge.changes import NBYTES_RUN
from cq_merge.contents import all_finite
from cq_merge.methods import Method

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Placed:
    """A change where it belongs: rows of one tensor.

    Rows `start` to `start + count` of the tensor take the change's rows from `first` on, with
    `strength`. `adapter` is the number of the file that it comes from.
    """

    change: Change
    adapter: int
    strength: float
    start: int
    count: int
    first: int


class Loaded(NamedTuple):
    """A placed change whose factors have been read."""

    placed: Placed
    apply: Apply

    def add(
        self, base: torch.Tensor, rows: torch.Tensor, start: int, count: int | None = None
    ) -> None:
        """Add to `rows`, which begin at row `start` of the tensor, what the change has for them.

        It has `count` rows, if not as many as it was placed on: those of a weight that grows.
        """
        placed = self.placed
        low = max(placed.start, start)
        high = min(placed.start + (placed.count if count is None else count), start + len(rows))
        if low < high:
            own = slice(low - start, high - start)
            first = placed.first + low - placed.start
            self.apply(base[own], rows[own], first, placed.strength)


@dataclass(frozen=True)  # no slots: what follows from the fields is found once
class Merged:
    """The tensor `name` with `changes` in their order, stored as `dtype`.

    The changes of several adapters are all made to the weight as it was, and summed or combined by
    `method`, None for the sum. With `in_turn` each is made to the result of the one before, as
    ComfyUI does.
    """

    source: Checkpoint
    name: str
    changes: tuple[Placed, ...]
    dtype: str
    method: Method | None = None
    density: float | None = None
    seed: int = 0
    in_turn: bool = False

    @cached_property
    def before(self) -> TensorSpec:
        """The tensor as it is."""
        return self.source.specs[self.name]

    @cached_property
    def after(self) -> TensorSpec:
        """The tensor as it will be: in another dtype or larger if that was asked for."""
        shapes = [self.before.shape, *map(self._shape_for, self.changes)]
        return TensorSpec(self.dtype, tuple(map(max, *shapes)) if self.before.shape else ())

    @cached_property
    def whole(self) -> bool:
        """Whether all rows are computed at once."""
        return (
            self.method is not None
            or self.after.shape != self.before.shape
            or any(placed.change.whole for placed in self.changes)
        )

    def _shape_for(self, placed: Placed) -> tuple[int, ...]:
        """The tensor's shape as that change takes it: larger, if it makes it grow."""
        # What is placed on some rows alone is refused if it does that.
        return placed.change.shape(self.before.shape)

    @property
    def shown(self) -> str:
        """The checkpoint as a person knows it."""
        return " and ".join(f"`{s.shown}`" for s in self.source.sources)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in which is computed: double precision keeps it; a float32 holds all
        other dtypes exactly."""
        return 8 if self.before.dtype == "F64" else 4

    def part(self) -> Part:
        """The merged tensor."""
        return Part(
            tensors={self.name: self.after}, nbytes_peak=self.nbytes_peak, produce=self.produce
        )

    @property
    def nbytes_peak(self) -> int:
        """What computing the tensor holds at most."""
        if self.whole:
            # The weight as it was; the result, or each adapter's change and what methods need.
            buffers = 2 if self.method is None else 2 + len(self._adapters)
            if any(self._shape_for(placed) != self.after.shape for placed in self.changes):
                buffers += 2
            numel, rows = self.after.numel, max(1, *self.after.shape[:1])
            held = numel * self.itemsize * buffers + largest_cut(self.after) * 8 + NBYTES_RUN
        else:
            numel = largest_cut(self.before)
            rows = numel // max(1, self.before.row_numel)
            # Two stored segments each of the source and of the result: while the next one is made,
            # the one before is still in the hands of whoever asked for it.
            held = numel * self.itemsize * (2 if self._keeps_base else 1)
            held += 3 * numel * (DTYPES[self.before.dtype].bits + DTYPES[self.dtype].bits) // 16
        columns = self.after.row_numel
        return (
            self.source.part(self.name).nbytes_peak
            + held
            + sum(p.change.nbytes_peak(rows, columns, self.itemsize) for p in self.changes)
        )

    def load(self) -> list[Loaded]:
        """The changes with their factors."""
        return [Loaded(placed, placed.change.load(self.computed)) for placed in self.changes]

    @property
    def computed(self) -> torch.dtype:
        """The dtype that is computed in."""
        import torch

        return torch.float64 if self.itemsize == 8 else torch.float32

    def segments(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Row segments `(rows, K)` of the weight as it is, each with the number of its first row,
        in the dtype that is computed in and in memory of their own."""
        for piece in self.source.pieces(self.name):
            # A copy even if the dtype is the same: the segment may belong to the stage before.
            rows = piece.tensor.to(self.computed, copy=True)
            yield piece.start, rows.view(-1, self.before.row_numel)

    def produce(self) -> Iterator[Piece]:
        """The merged rows, each rounded once."""
        stored = torch_dtype(self.dtype)
        spans = self._at_once() if self.whole else self._by_segments()
        for start, rows in spans:
            if not all_finite(rows, stored_as=stored):
                raise self._not_finite()
            shape = (len(rows), *self.after.shape[1:]) if self.after.shape else ()
            yield Piece(self.name, start, rows.to(stored).view(shape))

    def add(self, change: Loaded, base: torch.Tensor, rows: torch.Tensor, start: int) -> None:
        """Add to `rows`, which begin at row `start` of `spans`, what the change has for them."""
        own, after = self._shape_for(change.placed), self.after.shape
        if own == after:
            change.add(base, rows, start, own[0] if own != self.before.shape else None)
            return
        # Another change makes the weight grow: this one is for a corner of what it will be.
        corner = tuple(map(slice, own))
        small = rows.view(after)[corner].reshape(own[0], -1)
        before = small if base is rows else base.view(after)[corner].reshape(own[0], -1)
        change.add(before, small, start, own[0] if own != self.before.shape else None)
        rows.view(after)[corner] = small.view(own)

    def spans(self) -> Iterator[tuple[int, torch.Tensor]]:
        """As `segments`, but all rows at once, grown as they will be, where that is needed."""
        if self.whole:
            yield 0, self._grown()
        else:
            yield from self.segments()

    def _by_segments(self) -> Iterator[tuple[int, torch.Tensor]]:
        loaded = self.load()
        for start, rows in self.segments():
            base = rows.clone() if self._keeps_base else rows
            for change in loaded:
                change.add(base, rows, start)
            yield start, rows

    def _at_once(self) -> Iterator[tuple[int, torch.Tensor]]:
        import torch

        base = self._grown()
        loaded = self.load()
        if self.method is None:
            rows = base.clone()
            for change in loaded:
                self.add(change, rows if self.in_turn else base, rows, 0)
        else:
            deltas = {adapter: torch.zeros_like(base) for adapter in self._adapters}
            for change in loaded:
                self.add(change, base, deltas[change.placed.adapter], 0)
            combined = self.method.combine(list(deltas.values()), self.density, self._generator())
            rows = base.add_(combined)
        for start, stop in cuts(self.after):
            yield start, rows[start:stop]

    def _grown(self) -> torch.Tensor:
        import torch

        base = torch.empty(self._height, self.before.row_numel, dtype=self.computed)
        for start, rows in self.segments():
            base[start : start + len(rows)] = rows
        if self.after.shape != self.before.shape:
            grown = torch.zeros(self.after.shape, dtype=base.dtype)
            grown[tuple(map(slice, self.before.shape))] = base.view(self.before.shape)
            base = grown.view(-1, self.after.row_numel)
        return base

    @property
    def _height(self) -> int:
        return self.before.shape[0] if self.before.shape else 1

    @property
    def _adapters(self) -> list[int]:
        return sorted({placed.adapter for placed in self.changes})

    @property
    def _keeps_base(self) -> bool:
        """Whether the rows as they were are looked at after one of them has changed."""
        return (
            not self.in_turn
            and len(self.changes) > 1
            and any(placed.change.reads_base for placed in self.changes)
        )

    def _generator(self) -> torch.Generator:
        """Random numbers that depend on the seed and on the tensor's name alone."""
        import torch

        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _not_finite(self) -> InputError:
        if all(all_finite(rows) for _, rows in self.segments()):
            what = f"overflows {self.dtype} when the adapters are added"
            hint = "lower the strengths"
        else:
            what = "holds NaN or infinite values before anything is added to it"
            hint = "mend the checkpoint"
        return InputError(
            f"tensor `{self.name}` of {self.shown} {what}",
            where=self.name,
            hint=hint,
            code="input.nonfinite",
        )
