"""Runs parts on a Ray cluster: tasks that open the manifest and write into the shared partial file.

Owns what is a task, what it asks of a machine, and what becomes of it when a worker dies. The
output is laid out, journalled and committed by whoever asked for it; the workers write at offsets
of the same file, so the file system must be shared. A task that is done twice writes the same bytes
twice. Ray comes with `pip install 'cq[ray]'` and is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import orjson

from cq.core import errors, files, manifest
from cq.core.checkpoint import Checkpoint, Part
from cq.core.engine import local, memory
from cq.core.errors import CqError, InternalError, PlanError, ResourceError
from cq.core.laid_out import OpenFile, names_of
from cq.core.sink import FileSink
from cq.core.write import fill as fill_here

_RETRIES = 3  # of a task whose worker died
_BATCHES_PER_WORKER = 12  # so that the last ones end together
_BATCH_BYTES = 64 << 20  # of output; what costs more than a task's overhead anyway
_SMALL_BYTES = 1 << 20
_IN_FLIGHT = 2  # tasks per core, so that none waits for this process
_STORE_BYTES = 80 << 20  # Ray's least; nothing of ours is kept there
_WAIT_SECONDS = 0.5
_CANCEL_SECONDS = 30.0
_CACHED: dict[str, Checkpoint] = {}  # in a worker process: the checkpoint it works on, by its name


def fill(sink: FileSink, checkpoint: Checkpoint, settings: local.Settings) -> None:
    """Run every part that `sink` does not have yet on a Ray cluster: the one that RAY_ADDRESS
    names or this process has joined, else one of this machine alone, of `settings.workers` cores.

    Raises: ResourceError if Ray is not installed, no machine is large enough, or workers keep
    dying; the first error of any worker; KeyboardInterrupt after an orderly stop.
    """
    raw = orjson.dumps(manifest.document(checkpoint))
    _, _, dated = names_of(checkpoint, sink.head)
    order = {"manifest": raw, "work": dated, "partial": str(sink.partial)}
    missing = [i for i in range(len(checkpoint.parts)) if i not in sink.finished]
    if not missing:
        return
    with _cluster(settings.workers) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cores = int(sum(node["Resources"].get("CPU", 0) for node in nodes))
        workers = max(1, min(cores, settings.workers or cores))
        tasks = batches(checkpoint.parts, missing, workers)
        _check_memory(checkpoint.parts, missing, nodes, settings.memory_limit)
        limit = settings.workers or workers * _IN_FLIGHT
        _Driver(ray, sink, checkpoint, settings, order).run(tasks, limit)


def batches(parts: Sequence[Part], indexes: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """`indexes` in tasks: enough of them to share out, none too small to be worth it, and the
    largest first, so that no worker ends long after the others."""
    total = sum(parts[i].nbytes for i in indexes)
    aim = max(_SMALL_BYTES, min(_BATCH_BYTES, total // (workers * _BATCHES_PER_WORKER)))
    found: list[list[int]] = []
    size = aim
    for index in indexes:
        if size >= aim:
            found.append([])
            size = 0
        found[-1].append(index)
        size += parts[index].nbytes
    found.sort(key=lambda batch: -sum(parts[i].nbytes for i in batch))
    return [tuple(batch) for batch in found]


def _needed(parts: Sequence[Part], indexes: Sequence[int]) -> int:
    return max(parts[i].nbytes_peak for i in indexes) + memory.LIBRARY_BYTES


def _check_memory(
    parts: Sequence[Part], indexes: Sequence[int], nodes: Sequence[Any], limit: int | None
) -> None:
    """Ray lets a task that no machine can take wait for ever; this one is refused."""
    if limit is not None:
        local.check_budget(parts, limit)
    largest = max(indexes, key=lambda i: parts[i].nbytes_peak)
    needed = _needed(parts, [largest])
    there = max((n["Resources"].get("memory", 0) for n in nodes), default=0)
    if needed > there:
        raise ResourceError(
            f"layer `{parts[largest].name}` needs {needed / 1e6:.1f} MB, torch included, and the"
            f" largest machine of the cluster offers {there / 1e6:.1f} MB",
            hint="add a larger machine to the cluster",
            code="resource.memory",
        )


class _Driver:
    """Hands tasks out and takes in what they have finished."""

    def __init__(
        self,
        ray: Any,
        sink: FileSink,
        checkpoint: Checkpoint,
        settings: local.Settings,
        order: Mapping[str, Any],
    ) -> None:
        self._ray = ray
        self._sink = sink
        self._parts = checkpoint.parts
        self._on_progress = settings.on_progress
        self._order = ray.put(dict(order))
        self._remote = ray.remote(max_retries=_RETRIES, num_cpus=1)(fill_batch)
        self._pending: dict[Any, tuple[int, ...]] = {}
        self._done = sum(self._parts[i].nbytes for i in sink.finished)
        self._total = sum(part.nbytes for part in self._parts)

    def run(self, tasks: Sequence[tuple[int, ...]], limit: int) -> None:
        waiting = deque(tasks)
        try:
            while waiting or self._pending:
                while waiting and len(self._pending) < limit:
                    batch = waiting.popleft()
                    remote = self._remote.options(memory=_needed(self._parts, batch))
                    self._pending[remote.remote(self._order, batch)] = batch
                ready, _ = self._ray.wait(list(self._pending), timeout=_WAIT_SECONDS)
                for task in ready:
                    self._take(task)
        finally:
            self._call_off()

    def _take(self, task: Any) -> None:
        batch = self._pending.pop(task)
        try:
            failure = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            raise ResourceError(
                f"the workers that computed `{self._parts[batch[0]].name}` died, {_RETRIES + 1}"
                " times in a row",
                hint="look at Ray's logs; out of memory is the usual reason",
                code="resource.worker",
            ) from error
        if failure is not None:
            raise _error(failure)
        for index in batch:
            self._sink.part_done(index)
            self._done += self._parts[index].nbytes
        if self._on_progress is not None:
            done = len(self._sink.finished)
            name = self._parts[batch[-1]].name
            event = local.Progress(self._done, self._total, done, len(self._parts), name)
            self._on_progress(event)

    def _call_off(self) -> None:
        """Leave nobody writing: the partial file may be somebody else's next."""
        if not self._pending:
            return
        for task in self._pending:
            with suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(task, force=True)
        with suppress(self._ray.exceptions.RayError):
            self._ray.wait(
                list(self._pending), num_returns=len(self._pending), timeout=_CANCEL_SECONDS
            )


@contextmanager
def _cluster(workers: int | None) -> Iterator[Any]:
    """Ray, connected."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ResourceError(
            "`--engine ray` needs the package `ray`, which is not installed",
            hint="install it: `pip install 'cq[ray]'`",
            code="resource.ray",
        ) from error
    if ray.is_initialized():  # by whoever calls us
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = {
        "address": "local",
        "num_cpus": workers or local.default_workers(),
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
    }
    there = {"address": os.environ.get("RAY_ADDRESS")}
    try:
        with _signals_later():
            ray.init(
                **(there if there["address"] else here),
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
            )
    except Exception as error:  # Ray has no one class for it
        raise ResourceError(
            f"Ray cannot be started: {str(error).splitlines()[0] if str(error) else error!r}",
            hint="RAY_ADDRESS names a running cluster; without it one is started here",
            code="resource.ray",
        ) from error
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _signals_later() -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM wait: Ray aborts the process if they come while it starts, and
    leaves a handler of its own behind, under which nothing would be kept or told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    for late in came[:1]:
        signal.raise_signal(late)


def fill_batch(order: Mapping[str, Any], indexes: Sequence[int]) -> dict[str, Any] | None:
    """In a worker process: write the parts `indexes` into the partial file and bring them to the
    disk. What went wrong, or None."""
    try:
        checkpoint = _checkpoint(order)
        with _Placed(checkpoint, order["partial"]) as file:
            # One part at a time: Ray has admitted this task by its largest.
            settings = local.Settings(workers=1, memory_limit=_needed(checkpoint.parts, indexes))
            fill_here(file, checkpoint, settings, only=indexes)
            os.fsync(file.fd)
    except CqError as error:
        return {"class": type(error).__name__, **error.to_dict()}
    except OSError as error:
        failure = ResourceError(
            f"cannot write `{order['partial']}` on `{socket.gethostname()}`:"
            f" {(error.strerror or str(error)).lower()}",
            hint="free some space; see that all machines share the file system",
            code="resource.output",
        )
        return {"class": "ResourceError", **failure.to_dict()}
    return None


def _checkpoint(order: Mapping[str, Any]) -> Checkpoint:
    name = order["work"]
    if name not in _CACHED:
        _CACHED.clear()
        found = manifest.load(order["manifest"], where="the manifest of the task")
        if names_of(found, OpenFile(found).head)[2] != name:
            raise PlanError(
                f"the worker on `{socket.gethostname()}` makes something else of the manifest",
                hint="see that all machines have the same cq, the same plugs, and the same sources"
                " with the same modification times",
                code="plan.worker_differs",
            )
        _CACHED[name] = found
    return _CACHED[name]


class _Placed(OpenFile):
    """The partial file of another process, open to write at its offsets."""

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        super().__init__(checkpoint)
        self._path = path

    def __enter__(self) -> _Placed:
        self.fd = os.open(self._path, files.SHARED_FLAGS & ~os.O_CREAT)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self.fd = -1


def _error(failure: Mapping[str, Any]) -> CqError:
    kind = getattr(errors, failure["class"], InternalError)
    found: CqError = kind(
        failure["message"], where=failure["where"], hint=failure["hint"], code=failure["code"]
    )
    return found
