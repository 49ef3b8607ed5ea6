"""Runs parts on a Ray cluster: tasks that open the manifest and write into the shared partial file.

Owns what is a task, what it asks of a machine, and what becomes of it when a worker dies. The
output is laid out, journalled and committed by whoever asked for it; the workers write at offsets
of the same file, so the file system must be shared. A task that is done twice writes the same bytes
twice. Layers that a GPU is to compute are tasks that ask Ray for one; all others ask for none. Ray
comes with `pip install ray` and is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import orjson

from cq.core import errors, files, manifest
from cq.core.checkpoint import Checkpoint, Part
from cq.core.engine import device, local, memory
from cq.core.errors import CqError, InternalError, PlanError, ResourceError, Unfinished
from cq.core.laid_out import OpenFile, names_of
from cq.core.sink import FileSink
from cq.core.streaming import CPU, Checkpointed, Room
from cq.core.write import fill as fill_here

_RETRIES = 3  # of a task whose worker died
_BATCHES_PER_WORKER = 12  # so that the last ones end together
_BATCH_BYTES = 64 << 20  # of output; what costs more than a task's overhead anyway
_SMALL_BYTES = 1 << 20
_IN_FLIGHT = 2  # tasks per core or GPU, so that none waits for this process
_STORE_BYTES = 80 << 20  # Ray's least; nothing of ours is kept there
_WAIT_SECONDS = 0.5
_CANCEL_SECONDS = 30.0
_CACHED: dict[str, Checkpoint] = {}  # in a worker process: the checkpoint it works on, by its name


class Task(NamedTuple):
    """The parts that are one task, and whether it needs a GPU."""

    indexes: tuple[int, ...]
    gpu: bool = False


def fill(sink: FileSink, checkpoint: Checkpoint, settings: local.Settings) -> None:
    """Run every part that `sink` does not have yet on a Ray cluster: the one that RAY_ADDRESS
    names or this process has joined, else one of this machine alone, of `settings.workers` cores.
    The device `cuda` is one GPU of the cluster for each task that can use it, `auto` the same if it
    has any.

    Raises: ResourceError if Ray is not installed, no machine is large enough or has what was asked
    for, or workers keep dying; the first error of any worker; KeyboardInterrupt after an orderly
    stop.
    """
    parts = checkpoint.parts
    missing = [i for i in range(len(parts)) if i not in sink.finished]
    if not missing:
        return
    with cluster(settings.workers) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cores, gpus = (int(_offered(nodes, kind)) for kind in ("CPU", "GPU"))
        workers = max(1, min(cores, settings.workers or cores))
        settings = replace(settings, device=device_of(settings.device, gpus))
        _check_memory(parts, missing, nodes, settings)
        tasks = tasks_of(parts, missing, settings, workers, gpus)
        limits = settings.workers or workers * _IN_FLIGHT, gpus * _IN_FLIGHT
        _Driver(ray, sink, checkpoint, settings).run(tasks, limits)


def _offered(nodes: Sequence[Any], kind: str) -> float:
    return sum(float(node["Resources"].get(kind, 0)) for node in nodes)


def device_of(asked: str, gpus: int) -> str:
    """The device of tasks that can use one, by what was asked for and the cluster's GPUs."""
    if asked == CPU or (asked == device.AUTO and not gpus):
        return CPU
    if not gpus:
        raise ResourceError(
            "no machine of the Ray cluster offers a GPU",
            hint="leave `--device` out to compute on the CPUs",
            code="resource.device",
        )
    return "cuda"


def _on_gpu(part: Part, settings: local.Settings) -> bool:
    return settings.device != CPU and part.work is not None


def tasks_of(
    parts: Sequence[Part],
    indexes: Sequence[int],
    settings: local.Settings,
    workers: int,
    gpus: int,
) -> tuple[list[Task], list[Task]]:
    """`indexes` as tasks without and with a GPU, for so many workers and GPUs."""
    split: tuple[list[int], list[int]] = [], []
    for index in indexes:
        split[_on_gpu(parts[index], settings)].append(index)
    return (
        [Task(each) for each in batches(parts, split[0], workers)],
        [Task(each, gpu=True) for each in batches(parts, split[1], max(1, gpus))],
    )


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


def needed(part: Part, settings: local.Settings) -> int:
    """Bytes of a machine that the part takes at most, torch included."""
    work, nbytes = part.work, part.nbytes_peak
    if work is not None:
        room = Room(host=settings.memory_limit or sys.maxsize)
        nbytes = settings.placed(work, room).nbytes_host  # also where a GPU has no room for it
        if _on_gpu(part, settings):
            nbytes = max(nbytes, work.beside_device(work.segments, 0))
    return nbytes + memory.LIBRARY_BYTES


def _check_memory(
    parts: Sequence[Part], indexes: Sequence[int], nodes: Sequence[Any], settings: local.Settings
) -> None:
    """Ray lets a task that no machine can take wait for ever; this one is refused."""
    if settings.memory_limit is not None:
        local.check_budget(parts, settings)
    nbytes, largest = max((needed(parts[i], settings), i) for i in indexes)
    there = max((n["Resources"].get("memory", 0) for n in nodes), default=0)
    if nbytes > there:
        raise ResourceError(
            f"layer `{parts[largest].name}` needs {nbytes / 1e6:.1f} MB, torch included, and the"
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
    ) -> None:
        self._ray = ray
        self._sink = sink
        self._parts = checkpoint.parts
        self._outcomes = checkpoint.outcomes
        self._settings = settings
        self._order = ray.put(order_of(checkpoint, sink, settings))
        self._remote = ray.remote(max_retries=_RETRIES, num_cpus=1)(fill_batch)
        self._pending: dict[Any, Task] = {}
        self._done = sum(self._parts[i].nbytes for i in sink.finished)
        self._total = sum(part.nbytes for part in self._parts)

    def run(self, tasks: Sequence[Sequence[Task]], limits: Sequence[int]) -> None:
        """Tasks without and with a GPU, at most so many of each handed out at a time."""
        waiting = [deque(each) for each in tasks]
        try:
            while any(waiting) or self._pending:
                for kind, (queue, limit) in enumerate(zip(waiting, limits, strict=True)):
                    out = sum(task.gpu == bool(kind) for task in self._pending.values())
                    for task in [queue.popleft() for _ in range(min(len(queue), limit - out))]:
                        self._hand_out(task)
                ready, _ = self._ray.wait(list(self._pending), timeout=_WAIT_SECONDS)
                for remote in ready:
                    self._take(remote)
        finally:
            self._call_off()

    def _hand_out(self, task: Task) -> None:
        nbytes = max(needed(self._parts[i], self._settings) for i in task.indexes)
        remote = self._remote.options(memory=nbytes, num_gpus=int(task.gpu))
        self._pending[remote.remote(self._order, task)] = task

    def _take(self, remote: Any) -> None:
        batch = self._pending.pop(remote).indexes
        try:
            told = self._ray.get(remote)
        except self._ray.exceptions.RayError as error:
            raise Unfinished(
                f"the workers that computed `{self._parts[batch[0]].name}` died, {_RETRIES + 1}"
                " times in a row",
                hint="look at Ray's logs, out of memory is the usual reason; what is finished is"
                " kept",
                code="resource.worker",
            ) from error
        if told["error"] is not None:
            raise _error(told["error"])
        for name in told["retreated"]:
            if self._settings.on_retreat is not None:
                self._settings.on_retreat(name)
        for outcome, known in zip(self._outcomes, told["outcomes"], strict=True):
            outcome.take_over(known)
        for index in batch:
            self._sink.part_done(index)
            self._done += self._parts[index].nbytes
        if self._settings.on_progress is not None:
            done = len(self._sink.finished)
            name = self._parts[batch[-1]].name
            event = local.Progress(self._done, self._total, done, len(self._parts), name)
            self._settings.on_progress(event)

    def _call_off(self) -> None:
        """Leave nobody writing: the partial file may be somebody else's next."""
        if not self._pending:
            return
        for remote in self._pending:
            with suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(remote, force=True)
        with suppress(self._ray.exceptions.RayError):
            self._ray.wait(
                list(self._pending), num_returns=len(self._pending), timeout=_CANCEL_SECONDS
            )


@contextmanager
def cluster(workers: int | None) -> Iterator[Any]:
    """Ray, connected; within another `cluster` to the same one.

    Raises: ResourceError if it is not installed or cannot be started.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ResourceError(
            "`--engine ray` needs the package `ray`, which is not installed",
            hint="install it: `pip install ray`",
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


def order_of(checkpoint: Checkpoint, sink: FileSink, settings: local.Settings) -> dict[str, Any]:
    """What workers must know to do any task of the work."""
    return {
        "manifest": orjson.dumps(manifest.document(checkpoint)),
        "work": names_of(checkpoint, sink.head)[2],
        "tensors": orjson.dumps(list(checkpoint.specs)),
        "partial": str(sink.partial),
        "memory_limit": settings.memory_limit,
        "device": settings.device,
        "streaming_mode": settings.streaming_mode,
        "quip_checkpointed": settings.quip_checkpointed,
        "vram_limit": settings.vram_limit,
    }


def _settings(order: Mapping[str, Any], parts: Sequence[Part], task: Task) -> local.Settings:
    """How a worker runs: one part at a time, since Ray has admitted the task by its largest."""
    wide = order["quip_checkpointed"]
    asked = local.Settings(
        workers=1,
        memory_limit=order["memory_limit"],
        device=order["device"] if task.gpu else CPU,
        streaming_mode=order["streaming_mode"],
        quip_checkpointed=None if wide is None else Checkpointed(*wide),
        vram_limit=order["vram_limit"],
    )
    return replace(asked, memory_limit=max(needed(parts[i], asked) for i in task.indexes))


def fill_batch(order: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """In a worker process: write the parts of the task into the partial file and bring them to the
    disk. What went wrong, if anything, the layers for which a GPU had no room, and what came of the
    others."""
    told: dict[str, Any] = {"error": None, "retreated": [], "outcomes": []}
    try:
        checkpoint = _checkpoint(order)
        settings = _settings(order, checkpoint.parts, task)
        settings = replace(settings, on_retreat=told["retreated"].append)
        with _Placed(checkpoint, order["partial"]) as file:
            fill_here(file, checkpoint, settings, only=task.indexes)
            os.fsync(file.fd)
        told["outcomes"] = [outcome.handed_over() for outcome in checkpoint.outcomes]
    except CqError as error:
        told["error"] = {"class": type(error).__name__, **error.to_dict()}
    except OSError as error:
        failure = ResourceError(
            f"cannot write `{order['partial']}` on `{socket.gethostname()}`:"
            f" {(error.strerror or str(error)).lower()}",
            hint="free some space; see that all machines share the file system",
            code="resource.output",
        )
        told["error"] = {"class": "ResourceError", **failure.to_dict()}
    return told


def _checkpoint(order: Mapping[str, Any]) -> Checkpoint:
    name = order["work"]
    if name not in _CACHED:
        _CACHED.clear()
        found = manifest.load(order["manifest"], where="the manifest of the task")
        # Of several files, one holds some of the tensors.
        found = found.narrowed(orjson.loads(order["tensors"]))
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
