"""Checkpoint to file: the sink filled by the engine, and what is said about it afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from cq.core import manifest
from cq.core.checkpoint import Checkpoint
from cq.core.engine import local
from cq.core.engine.device import parse_device
from cq.core.sink import FileSink, Sink, StreamSink
from cq.core.streaming import CPU, Checkpointed, StreamingMode
from cq.core.text import as_text

Engine = Literal["local", "ray"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file that was written: its path, size, the seconds it took, the parts that an interrupted
    run had left ready, and the digest that names the work. `retreated` are parts for which a device
    had no memory, so that they were computed on the CPU, wholly or in part."""

    path: Path
    nbytes: int
    seconds: float
    parts: int
    parts_resumed: int
    digest: str
    retreated: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "path": as_text(str(self.path.resolve())),
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "parts": self.parts,
            "parts_resumed": self.parts_resumed,
            "digest": self.digest,
            **({"retreated": list(self.retreated)} if self.retreated else {}),
        }

    def manifest(self) -> dict[str, Any]:
        """The manifest that names the file, with the digest of the work that made it."""
        return {
            **manifest.document(manifest.open_checkpoint(self.path)),
            "digest": self.digest,
        }


def write(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    restart: bool = False,
    in_place: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
    engine: Engine = "local",
    device: str = CPU,
    streaming_mode: StreamingMode = "auto",
    quip_checkpointed: Checkpointed | None = None,
    vram_limit: int | None = None,
    on_progress: Callable[[local.Progress], None] | None = None,
) -> Written:
    """Write `checkpoint` to `path`, going on from where an interrupted run of the same work
    stopped.

    `force` replaces an existing file once the new one is complete, `in_place` the input itself;
    `restart` discards unfinished work of another command. `memory_limit` is in bytes. `engine` says
    where the parts run: on threads here, or on a Ray cluster that shares the file system. `device`
    (`cpu`, `auto`, `cuda`, `cuda:N`) computes what it can, within `vram_limit` bytes, in portions
    of the `streaming_mode`, smaller ones where a layer is `quip_checkpointed` (see
    docs/devices.md).

    Raises: PlanError, InputError or ResourceError; afterwards nothing is left under `path`.
    KeyboardInterrupt keeps what is finished for the next run.
    """
    retreated: list[str] = []
    settings = local.Settings(
        workers=workers,
        memory_limit=memory_limit,
        device=parse_device(device),
        streaming_mode=streaming_mode,
        quip_checkpointed=quip_checkpointed,
        vram_limit=vram_limit,
        on_progress=on_progress,
        on_retreat=retreated.append,
    )
    started = time.monotonic()
    target = Path(path)
    with FileSink(checkpoint, target, force=force, restart=restart, in_place=in_place) as sink:
        resumed = len(sink.finished)
        if engine == "ray":
            from cq.core.engine import ray

            ray.fill(sink, checkpoint, settings)
        else:
            fill(sink, checkpoint, settings)
        nbytes = sink.header.nbytes_file
    return Written(
        path=target,
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        parts=len(checkpoint.parts),
        parts_resumed=resumed,
        digest=sink.digest,
        retreated=tuple(sorted(set(retreated))),
    )


def connected(engine: Engine, workers: int | None) -> AbstractContextManager[Any]:
    """Within it several outputs are written by one connection to the cluster, if it is one."""
    if engine == "local":
        return nullcontext()
    from cq.core.engine import ray

    return ray.cluster(workers)


def stream(checkpoint: Checkpoint, out: IO[bytes], settings: local.Settings) -> None:
    """Write the safetensors bytes of `checkpoint` to `out`, in file order."""
    with StreamSink(checkpoint, out) as sink:
        fill(sink, checkpoint, settings)


def fill(
    sink: Sink,
    checkpoint: Checkpoint,
    settings: local.Settings,
    *,
    only: Sequence[int] | None = None,
) -> None:
    """Run every part that `sink` does not have yet into it; of those whose index is in `only`, if
    that is given."""
    chosen = range(len(checkpoint.parts)) if only is None else only

    def work(job: local.Job) -> None:
        if job.part.extent is not None:
            sink.copy(job.part.name, job.part.extent, job.stop)
            if job.stop.is_set():
                raise local.Stop
            job.advance(job.part.nbytes)
        elif job.part.constant is not None:  # needs no torch
            sink.put(job.part.name, job.part.constant)
            job.advance(job.part.nbytes)
        else:
            for piece in job.pieces():
                sink.write(piece)
        sink.part_done(chosen[job.index])

    parts = [checkpoint.parts[index] for index in chosen]
    ready = frozenset(at for at, index in enumerate(chosen) if index in sink.finished)
    local.run(parts, work, settings, skip=ready)
