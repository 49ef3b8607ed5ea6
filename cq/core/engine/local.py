"""Runs parts on this machine: worker threads under one memory budget, with progress and promises.

Owns scheduling only. What is done with a part is a function; `cq.core.write` passes one that fills
a sink, `cq verify` one that measures. Every part is computed by one thread with one torch thread,
so results do not depend on how many workers there are.
"""

from __future__ import annotations

import heapq
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from cq.core.checkpoint import Part, Piece
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.engine import device, groups, memory
from cq.core.errors import InternalError, ResourceError
from cq.core.streaming import (
    CPU,
    Checkpointed,
    Placement,
    Room,
    StreamingMode,
    Work,
    offered,
    placed,
)


class Progress(NamedTuple):
    """How far the work is, in bytes of output and in parts, and the part last worked on."""

    done: int
    total: int
    parts_done: int
    parts: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to run. `workers` None is one per core; `memory_limit` in bytes bounds the parts in
    flight together, None is half of what the machine has free. `device` computes what can be
    computed there, in portions of the `streaming_mode`, smaller ones where a layer is
    `quip_checkpointed`, within `vram_limit` bytes; None is most of what is free. `on_retreat` is
    told the names of parts for which its memory ran out."""

    workers: int | None = None
    memory_limit: int | None = None
    device: str = CPU
    streaming_mode: StreamingMode = "auto"
    quip_checkpointed: Checkpointed | None = None
    vram_limit: int | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_retreat: Callable[[str], None] | None = None

    def placed(self, work: Work, room: Room) -> Placement:
        """Where and how `work` is done in `room`, run so."""
        return placed(work, self.streaming_mode, room, self.quip_checkpointed)


class Worker:
    """A thread that can be waited for although Ctrl-C may come at any moment.

    An interrupted `Thread.join` marks a running thread as ended (CPython before 3.13), and whoever
    trusts it closes files under the thread's hands.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._done = threading.Event()
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._done.set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done. Raises: KeyboardInterrupt at once."""
        while not self._done.wait(0.2):  # a wait without end would not see Ctrl-C on all systems
            pass

    def wait_out(self) -> None:
        """Wait until the work is done, whatever is pressed; not at all if it never began."""
        while self._thread.ident is not None and not self._done.is_set():
            with suppress(KeyboardInterrupt):
                self._done.wait(0.2)


class Stop(Exception):
    """Raised inside a worker when the work was called off; never leaves this module."""


class Job:
    """What a worker is given: its part, where it is computed if there is a choice, and the means to
    report and to notice a stop."""

    def __init__(
        self, runner: _Runner, index: int, part: Part, placement: Placement | None
    ) -> None:
        self.index = index
        self.part = part
        self.placement = placement
        self.stop = runner.stop
        self._runner = runner

    def pieces(self) -> Iterator[Piece]:
        """The part's pieces, each checked against the part's promise."""
        for piece in checked(self.part):
            if self.stop.is_set():
                raise Stop
            yield piece
            self.advance(piece.tensor.nbytes)

    def advance(self, nbytes: int) -> None:
        """Report `nbytes` of output as done."""
        self._runner.advance(nbytes, self.part.name)


def run(
    parts: Sequence[Part],
    work: Callable[[Job], None],
    settings: Settings,
    *,
    skip: frozenset[int] = frozenset(),
) -> None:
    """Do `work` for every part whose index is not in `skip`, in parallel, within the budget.

    Raises: the first error of any worker, after the others have stopped; ResourceError before any
    work if a part alone exceeds the budget; KeyboardInterrupt after an orderly stop.
    """
    limit = check_budget(parts, settings)
    where = device.found(settings.device)
    room = Room(host=limit, device=where, vram=device.vram(where, settings.vram_limit))
    _Runner(parts, work, settings, room, skip).run()


def check_budget(parts: Sequence[Part], settings: Settings) -> int:
    """The budget in bytes, once it is known that every part fits into it, computed on the CPU, in
    as small portions as the mode allows.

    Raises: ResourceError with the figure needed if a part alone exceeds it.
    """
    limit = memory.default_limit() if settings.memory_limit is None else settings.memory_limit
    whole = settings.streaming_mode == "off"

    def needed(part: Part) -> int:
        if part.work is None or (not whole and part.nbytes_peak <= limit):
            return part.nbytes_peak
        return settings.placed(part.work, Room(host=limit)).nbytes_host

    largest = max(parts, key=needed, default=None)
    if largest is not None and needed(largest) > limit:
        less = "; `--streaming-mode auto` needs less" if whole else ""
        raise ResourceError(
            f"layer `{largest.name}` needs {needed(largest) / 1e6:.1f} MB,"
            f" over the memory limit of {limit / 1e6:.1f} MB",
            hint=f"raise `--memory-limit`{less}",
            code="resource.memory",
        )
    return limit


class _Runner:
    def __init__(
        self,
        parts: Sequence[Part],
        work: Callable[[Job], None],
        settings: Settings,
        room: Room,
        skip: frozenset[int],
    ) -> None:
        self.stop = threading.Event()
        self._work = work
        self._limit = room.host
        self._placed = settings.placed
        self._on_progress = settings.on_progress
        self._on_retreat = settings.on_retreat
        self._queue = [(i, part) for i, part in enumerate(parts) if i not in skip]
        self._next = 0
        self._in_flight = self._in_flight_there = 0
        self._running = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._computes = any(
            part.extent is None and part.constant is None for _, part in self._queue
        )
        self._parts = len(parts)
        self._parts_done = self._parts - len(self._queue)
        self._total = sum(part.nbytes for part in parts)
        self._done = self._total - sum(part.nbytes for _, part in self._queue)
        self._workers = max(1, min(settings.workers or default_workers(), len(self._queue)))
        self._room = replace(room, workers=self._workers)

    def run(self) -> None:
        workers = [Worker(self._worker, f"cq-{i}") for i in range(self._workers)]
        peaks = (part.nbytes_peak for _, part in self._queue)
        memory.fit(self._limit, sum(heapq.nlargest(self._workers, peaks)))
        with single_threaded_torch(self._computes):
            try:
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.wait()
            except KeyboardInterrupt:
                self._halt()
                for worker in workers:
                    worker.wait_out()
                raise
        if self._error is not None:
            raise self._error

    def advance(self, nbytes: int, name: str) -> None:
        with self._changed:
            self._done += nbytes
            event = Progress(self._done, self._total, self._parts_done, self._parts, name)
            if self._on_progress is not None:
                self._on_progress(event)

    def _halt(self) -> None:
        self.stop.set()
        with self._changed:
            self._changed.notify_all()

    def _worker(self) -> None:
        # Once more in the thread itself: what the main thread set reaches BLAS in a new thread only
        # after some other operator ran there, and another thread count is another order of sums.
        if self._computes:
            import torch

            torch.set_num_threads(1)
        while (job := self._take()) is not None:
            try:
                self._do(job)
            except Stop:
                return
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                self._halt()
                return
            finally:
                with self._changed:
                    here, there = _needs(job.part, job.placement)
                    self._in_flight -= here
                    self._in_flight_there -= there
                    self._running -= 1
                    self._parts_done += 1
                    self._changed.notify_all()

    def _do(self, job: Job) -> None:
        if job.placement is None:
            self._work(job)
            return

        def retreat() -> None:
            if self._on_retreat is not None:
                self._on_retreat(job.part.name)

        with offered(job.placement, retreat):
            self._work(job)

    def _take(self) -> Job | None:
        with self._changed:
            while not self.stop.is_set() and self._next < len(self._queue):
                index, part = self._queue[self._next]
                work, room = part.work, self._room
                placement = None if work is None else self._placed(work, room)
                here, there = _needs(part, placement)
                if not self._running or (
                    self._in_flight + here <= self._limit
                    and self._in_flight_there + there <= room.vram
                ):
                    self._next += 1
                    self._running += 1
                    self._in_flight += here
                    self._in_flight_there += there
                    return Job(self, index, part, placement)
                self._changed.wait()
            return None


def _needs(part: Part, placement: Placement | None) -> tuple[int, int]:
    """Bytes of the host and of a device that a part takes."""
    if placement is None:
        return part.nbytes_peak, 0
    return placement.nbytes_host, placement.nbytes_device


def checked(part: Part) -> Iterator[Piece]:
    """The part's pieces, proven to be what its specs promise: dtype, shape, and every row once.

    Raises: InternalError naming the tensor; a broken promise is a bug, never a file.
    """
    rows_done = dict.fromkeys(part.tensors, 0)
    for piece in part.produce():
        spec = part.tensors.get(piece.name)
        actual = spec_of(piece.tensor)
        if spec is None:
            raise InternalError(f"a part produced `{piece.name}`, which it never promised")
        rows = actual.shape[0] if actual.shape else 1
        promised = TensorSpec(spec.dtype, (rows, *spec.shape[1:]) if spec.shape else ())
        if actual != promised or piece.start != rows_done[piece.name]:
            raise InternalError(
                f"tensor `{piece.name}` came out as {actual} at row {piece.start},"
                f" promised was {spec} from row {rows_done[piece.name]} on"
            )
        rows_done[piece.name] += rows
        yield piece
    for name, spec in part.tensors.items():
        if rows_done[name] != (spec.shape[0] if spec.shape else 1):
            raise InternalError(
                f"tensor `{name}` came out with {rows_done[name]} rows, not as {spec}"
            )


@contextmanager
def single_threaded_torch(needed: bool) -> Iterator[None]:
    """Within it torch operators use one thread each: workers are the parallelism, and one thread's
    sums have one order. Does nothing, and imports nothing, unless `needed`."""
    if not needed:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_workers() -> int:
    """Cores that this process may use, as many as its control groups let it keep busy."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return min(len(os.sched_getaffinity(0)), groups.cores() or sys.maxsize)
