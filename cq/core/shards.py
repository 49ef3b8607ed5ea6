"""A checkpoint as several files and an index, as libraries other than ComfyUI read them.

Owns which tensors share a file, and the files' names. Each file is made like any other output, in
`cq.core.workplace`, which gives all of them their names at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import orjson

from cq.core import laid_out, manifest, sink
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.engine.local import Progress
from cq.core.errors import PlanError, UsageError
from cq.core.source import INDEX_SUFFIX
from cq.core.streaming import CPU, Checkpointed, StreamingMode
from cq.core.text import as_text
from cq.core.workplace import Workplace
from cq.core.write import Engine, Written, connected, write

_SUFFIX = ".safetensors"
# What a tensor's entry in a header takes at most, beside its name and the sizes in its shape
_ENTRY_BYTES, _SIDE_BYTES = 128, 21


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of several, and what it holds."""

    path: Path
    checkpoint: Checkpoint


def index_path(output: str | os.PathLike[str]) -> Path:
    """The index that an output is written with: `NAME.safetensors.index.json`, which
    `NAME.safetensors` stands for as well.

    Raises: UsageError for a name that is neither.
    """
    path = Path(output)
    if path.name.endswith(INDEX_SUFFIX) and path.name != INDEX_SUFFIX:
        return path
    if path.name.endswith(_SUFFIX) and path.name != _SUFFIX:
        return path.with_name(path.name.removesuffix(_SUFFIX) + INDEX_SUFFIX)
    raise UsageError(
        f"`{path}` cannot name several files",
        hint=f"name the output `NAME{_SUFFIX}` or `NAME{INDEX_SUFFIX}`",
        code="usage.shards",
    )


def plan(checkpoint: Checkpoint, index: Path, max_bytes: int) -> tuple[Shard, ...]:
    """The shards of a checkpoint, each a file of at most `max_bytes`, or of one layer that is
    larger. A layer stays together, and so do tensors that are produced together.

    Raises: UsageError for a size that is not positive.
    """
    if max_bytes <= 0:
        raise UsageError("a shard cannot be of 0 bytes", hint="write a size such as `5GB`")
    head = len(orjson.dumps(laid_out.final_metadata(checkpoint))) + 64
    groups: list[list[str]] = []
    size = 0
    for names in _together(checkpoint):
        nbytes = sum(_nbytes(name, checkpoint.specs[name]) for name in names)
        if not groups or head + size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1] += names
        size += nbytes
    stem, count = index.name.removesuffix(INDEX_SUFFIX), len(groups)
    of = {name: number for number, names in enumerate(groups) for name in names}
    return tuple(
        Shard(index.with_name(f"{stem}-{i:05}-of-{count:05}{_SUFFIX}"), own)
        for i, own in enumerate(checkpoint.divided(of, count), 1)
    )


def _together(checkpoint: Checkpoint) -> list[list[str]]:
    """Names by layer; layers in the order of their names, numbers counted."""
    layers: dict[str, list[str]] = {}
    for name in sorted(checkpoint.specs, key=_natural):
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return list(layers.values())


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(w)) if w.isdecimal() else (1, w) for w in name.split("."))


def _nbytes(name: str, spec: TensorSpec) -> int:
    """What a tensor takes in a file, at most."""
    return spec.nbytes + len(json.dumps(name)) + _ENTRY_BYTES + _SIDE_BYTES * len(spec.shape)


def check_targets(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    max_bytes: int,
    *,
    force: bool,
    restart: bool = False,
) -> tuple[tuple[Shard, ...], Workplace, frozenset[str]]:
    """The shards, where they are to be made, and the names that they may take in any case, once it
    is known that their files and the index may be written. `restart` is to discard what an
    interrupted run has left.

    Raises: as `cq.core.sink.check_target`, for each of them; UsageError for a name that is no text;
    PlanError for unfinished work of another command, without `restart`.
    """
    index = index_path(output)
    if as_text(index.name) != index.name:
        raise UsageError(
            f"`{as_text(str(index))}` is not UTF-8 text, so an index cannot name its files",
            hint="choose another name",
            code="usage.path",
        )
    shards = plan(checkpoint, index, max_bytes)
    place = Workplace(
        index=index,
        digest=_digest(checkpoint, max_bytes),
        names=tuple(shard.path.name for shard in shards),
        restart=restart,
    )
    inputs = [file.path for file in checkpoint.inputs]
    if any(os.path.realpath(path.parent) == os.path.realpath(place.path) for path in inputs):
        raise PlanError(
            f"an input lies in `{place.path}`, where the output is made",
            where=str(index),
            hint="choose another output; cq never overwrites what it reads",
            code="plan.output_is_input",
        )
    allowed = place.look()
    for path in (*(shard.path for shard in shards), index):
        sink.check_target(checkpoint, path, force=force or path.name in allowed)
    return shards, place, allowed


def write_shards(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    *,
    max_bytes: int,
    force: bool = False,
    restart: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
    engine: Engine = "local",
    device: str = CPU,
    streaming_mode: StreamingMode = "auto",
    quip_checkpointed: Checkpointed | None = None,
    vram_limit: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Written:
    """Write `checkpoint` as shards of at most `max_bytes` and an index, going on from where an
    interrupted run stopped; the rest as `cq.core.write.write`. ComfyUI reads single files only.

    Raises: as `cq.core.write.write`. All files get their names at the end, the index the last.
    """
    started = time.monotonic()
    shards, place, allowed = check_targets(
        checkpoint, output, max_bytes, force=force, restart=restart
    )
    laid = {s.path.name: sink.nbytes_file(s.checkpoint) for s in shards}
    parts = resumed = written_bytes = 0
    total = sum(shard.checkpoint.nbytes for shard in shards)
    retreated: set[str] = set()
    with connected(engine, workers), place:
        if place.note.naming is None:
            place.check_room(laid.items())
        for shard in shards:
            own, made = len(shard.checkpoint.parts), place.made(shard.path.name)
            if place.note.naming is not None or made.exists():
                resumed += own
            else:
                written = write(
                    shard.checkpoint,
                    made,
                    workers=workers,
                    memory_limit=memory_limit,
                    engine=engine,
                    device=device,
                    streaming_mode=streaming_mode,
                    quip_checkpointed=quip_checkpointed,
                    vram_limit=vram_limit,
                    on_progress=_shifted(on_progress, written_bytes, total, parts),
                )
                resumed += written.parts_resumed
                retreated.update(written.retreated)
            parts += own
            written_bytes += shard.checkpoint.nbytes
        place.name(
            _index(shards, total),
            force=force,
            allowed=allowed,
            sound=lambda: all(map(_is_whole, shards)),
        )
    return Written(
        path=place.index,
        nbytes=sum(laid.values()),
        seconds=time.monotonic() - started,
        parts=parts,
        parts_resumed=resumed,
        digest=manifest.work_digest(checkpoint),
        retreated=tuple(sorted(retreated)),
    )


def _index(shards: Iterable[Shard], total: int) -> bytes:
    placed = {name: shard.path.name for shard in shards for name in shard.checkpoint.specs}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)


def _shifted(
    on_progress: Callable[[Progress], None] | None, done: int, total: int, parts_done: int
) -> Callable[[Progress], None] | None:
    """Progress over all shards, from that of one."""
    if on_progress is None:
        return None
    return lambda event: on_progress(
        event._replace(
            done=done + event.done, total=total, parts_done=parts_done + event.parts_done
        )
    )


def _digest(checkpoint: Checkpoint, max_bytes: int) -> str:
    times = [file.mtime_ns for file in checkpoint.inputs]
    text = f"{manifest.work_digest(checkpoint)} {max_bytes} {times}"
    return hashlib.sha256(text.encode()).hexdigest()


def _is_whole(shard: Shard) -> bool:
    """Whether the file under a shard's name has the size and the head that it is to have."""
    laid = laid_out.OpenFile(shard.checkpoint)
    try:
        with shard.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == laid.header.nbytes_file and file.read(len(laid.head)) == laid.head
    except OSError:
        return False
