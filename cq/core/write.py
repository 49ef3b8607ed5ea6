"""Checkpoint to file: the sink filled by the engine, and what is said about it afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cq.core import manifest
from cq.core.checkpoint import Checkpoint
from cq.core.engine import local
from cq.core.sink import FileSink, Sink, StreamSink
from cq.core.text import as_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file that was written: its path, size, the seconds it took, the parts that an interrupted
    run had left ready, and the digest that names the work."""

    path: Path
    nbytes: int
    seconds: float
    parts: int
    parts_resumed: int
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "path": as_text(str(self.path.resolve())),
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "parts": self.parts,
            "parts_resumed": self.parts_resumed,
            "digest": self.digest,
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
    workers: int | None = None,
    memory_limit: int | None = None,
    on_progress: Callable[[local.Progress], None] | None = None,
) -> Written:
    """Write `checkpoint` to `path`, going on from where an interrupted run of the same work
    stopped.

    `force` replaces an existing file once the new one is complete; `restart` discards unfinished
    work of another command. `memory_limit` is in bytes.

    Raises: PlanError, InputError or ResourceError; afterwards nothing is left under `path`.
    KeyboardInterrupt keeps what is finished for the next run.
    """
    settings = local.Settings(workers=workers, memory_limit=memory_limit, on_progress=on_progress)
    started = time.monotonic()
    target = Path(path)
    with FileSink(checkpoint, target, force=force, restart=restart) as sink:
        resumed = len(sink.finished)
        fill(sink, checkpoint, settings)
        nbytes = sink.header.nbytes_file
    return Written(
        path=target,
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        parts=len(checkpoint.parts),
        parts_resumed=resumed,
        digest=sink.digest,
    )


def stream(checkpoint: Checkpoint, out: IO[bytes], settings: local.Settings) -> None:
    """Write the safetensors bytes of `checkpoint` to `out`, in file order."""
    with StreamSink(checkpoint, out) as sink:
        fill(sink, checkpoint, settings)


def fill(sink: Sink, checkpoint: Checkpoint, settings: local.Settings) -> None:
    """Run every part that `sink` does not have yet into it."""

    def work(job: local.Job) -> None:
        if job.part.extent is not None:
            sink.copy(job.part.name, job.part.extent, job.stop)
            if job.stop.is_set():
                raise local.Stop
            job.advance(job.part.nbytes)
        else:
            for piece in job.pieces():
                sink.write(piece)
        sink.part_done(job.index)

    local.run(checkpoint.parts, work, settings, skip=frozenset(sink.finished))
