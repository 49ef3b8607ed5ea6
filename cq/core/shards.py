"""A checkpoint as several files and an index, as libraries other than ComfyUI read them.

Owns which tensors share a file, the files' names, and that the index, which makes a checkpoint of
them, is written last. Each file is an output of its own, resumed and committed like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cq.core import files, laid_out, manifest, sink
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.engine.local import Progress
from cq.core.errors import InputError, PlanError, ResourceError, UsageError
from cq.core.source import INDEX_SUFFIX
from cq.core.streaming import CPU, Checkpointed, StreamingMode
from cq.core.text import as_text
from cq.core.write import Engine, Written, connected, write

_SUFFIX = ".safetensors"
# What a tensor's entry in a header takes at most, beside its name and the sizes in its shape
_ENTRY_BYTES, _SIDE_BYTES = 128, 21
_BEGINS = (b'{"work":', b'{\n  "metadata"')  # of notes and of an index


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
    return tuple(
        Shard(index.with_name(f"{stem}-{i:05}-of-{count:05}{_SUFFIX}"), checkpoint.narrowed(names))
        for i, names in enumerate(groups, 1)
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
) -> tuple[Shard, ...]:
    """The shards, once it is known that their files and the index may be written. `restart` is to
    give up what an interrupted run has left.

    Raises: as `cq.core.sink.check_target`, for each of them; UsageError for a name that is no text.
    """
    index = index_path(output)
    if as_text(index.name) != index.name:
        raise UsageError(
            f"`{as_text(str(index))}` is not UTF-8 text, so an index cannot name its files",
            hint="choose another name",
            code="usage.path",
        )
    shards = plan(checkpoint, index, max_bytes)
    own = _left(index) if restart else _finished(index, _digest(checkpoint, max_bytes), shards)
    for shard in shards:
        sink.check_target(checkpoint, shard.path, force=force or shard.path.name in own)
    sink.check_target(checkpoint, index, force=force)
    return shards


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

    Raises: as `cq.core.write.write`. Before the index is there, the shards are no checkpoint.
    """
    started = time.monotonic()
    index = index_path(output)
    digest = _digest(checkpoint, max_bytes)
    shards = check_targets(checkpoint, output, max_bytes, force=force, restart=restart)
    left = _left(index) if restart else frozenset()
    if restart:
        _discard(index)
    done = _finished(index, digest, shards)
    nbytes = parts = resumed = written_bytes = 0
    total = sum(shard.checkpoint.nbytes for shard in shards)
    retreated: set[str] = set()
    with connected(engine, workers):
        for shard in shards:
            own = len(shard.checkpoint.parts)
            if shard.path.name in done:
                _drop(sink.working_files(shard.path)[1])  # left by a kill right after the name
                nbytes += shard.path.stat().st_size
                resumed += own
            else:
                # A kill may come between the shard's name and the next note.
                begun = {"shard": shard.path.name, "in_the_way": _identity(shard.path)}
                _put(index, {"work": digest, "finished": done, "begun": begun}, _notes(index))
                try:
                    written = write(
                        shard.checkpoint,
                        shard.path,
                        force=force or shard.path.name in left,
                        restart=restart,
                        workers=workers,
                        memory_limit=memory_limit,
                        engine=engine,
                        device=device,
                        streaming_mode=streaming_mode,
                        quip_checkpointed=quip_checkpointed,
                        vram_limit=vram_limit,
                        on_progress=_shifted(on_progress, written_bytes, total, parts),
                    )
                except (InputError, ResourceError):
                    if not done:  # nothing to go on from
                        _drop(_notes(index))
                    raise
                nbytes += written.nbytes
                resumed += written.parts_resumed
                retreated.update(written.retreated)
                done[shard.path.name] = _identity(shard.path)
            parts += own
            written_bytes += shard.checkpoint.nbytes
    _end(index, {"work": digest, "finished": done}, shards, total)
    return Written(
        path=index,
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        parts=parts,
        parts_resumed=resumed,
        digest=manifest.work_digest(checkpoint),
        retreated=tuple(sorted(retreated)),
    )


def _end(index: Path, notes: Mapping[str, Any], shards: Iterable[Shard], total: int) -> None:
    """Make a checkpoint of whole shards: write the index, and drop the notes."""
    placed = {name: shard.path.name for shard in shards for name in shard.checkpoint.specs}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    # Killed between the index's name and the end of the notes, these speak of nothing unfinished.
    _put(index, {**notes, "ended": hashlib.sha256(_text(document)).hexdigest()}, _notes(index))
    _put(index, document, index)
    files.sync_directory(index.parent)
    _drop(_notes(index))


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


def _partial(index: Path) -> Path:
    """What becomes the notes or the index by its name; beside a link, not behind it."""
    return index.with_name(index.name + ".partial")


def _notes(index: Path) -> Path:
    """Where it stands which shards are whole, as long as the index is not written."""
    return index.with_name(index.name + ".partial.journal")


def _finished(index: Path, digest: str, shards: Iterable[Shard]) -> dict[str, list[int] | None]:
    """The shards that an interrupted run of the same work has left whole, and which files they are.

    Raises: PlanError if the notes are of other work, or are somebody else's file.
    """
    _check_partial(index)
    found = _noted(index)
    if found is None:
        return {}
    with suppress(OSError):
        if found.get("ended") == hashlib.sha256(index.read_bytes()).hexdigest():
            return {}
    if found.get("work") != digest:
        raise PlanError(
            f"`{_notes(index)}` speaks of unfinished work of another command",
            where=str(_notes(index)),
            hint="run that command again to finish it, or add `--restart` to discard it",
            code="plan.other_partial",
        )
    done: dict[str, list[int] | None] = dict(_unchanged(index, found))
    begun = found.get("begun")
    for shard in shards:
        # Where a file was in the way, a file there proves nothing: it is written again.
        if begun == {"shard": shard.path.name, "in_the_way": None} and _is_whole(shard):
            done[shard.path.name] = _identity(shard.path)
    return done


def _noted(index: Path) -> dict[str, Any] | None:
    """The notes beside an index, if there are any. Raises: PlanError if they are not cq's."""
    try:
        found = orjson.loads(_notes(index).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, orjson.JSONDecodeError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("finished"), dict):
        raise _in_the_way(_notes(index))
    return found


def _unchanged(index: Path, found: Mapping[str, Any]) -> dict[str, list[int]]:
    """The files that the notes call finished and that are still what they were."""
    return {
        name: was
        for name, was in found["finished"].items()
        if was is not None and Path(name).name == name and was == _identity(index.with_name(name))
    }


def _left(index: Path) -> frozenset[str]:
    """Shards of an interrupted run of whatever work, which it may be told to give up."""
    try:
        found = _noted(index)
    except PlanError:
        return frozenset()
    return frozenset() if found is None else frozenset(_unchanged(index, found))


def _is_whole(shard: Shard) -> bool:
    """Whether the file under a shard's name is what was to get it: nothing is left of the work on
    it, and it has the size and the head that it will have."""
    laid = laid_out.OpenFile(shard.checkpoint)
    try:
        if sink.working_files(shard.path)[0].exists():
            return False
        with shard.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == laid.header.nbytes_file and file.read(len(laid.head)) == laid.head
    except OSError:
        return False


def _check_partial(index: Path) -> None:
    """Raises: PlanError if the file through which notes are written is somebody else's."""
    path = _partial(index)
    try:
        with path.open("rb") as file:
            head = file.read(max(map(len, _BEGINS)))
    except FileNotFoundError:
        if path.is_symlink():
            raise _in_the_way(path) from None
        return
    except NotADirectoryError:
        return
    except OSError as error:
        raise _in_the_way(path) from error
    if path.is_symlink() or not any(
        head.startswith(begin) or begin.startswith(head)  # also one that was torn
        for begin in _BEGINS
    ):
        raise _in_the_way(path)


def _discard(index: Path) -> None:
    try:
        for path in (_partial(index), _notes(index)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise sink.unwritable(str(index), error) from error


def _identity(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino, found.st_mtime_ns]


def _text(document: Mapping[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)


def _put(index: Path, document: Mapping[str, Any], target: Path) -> None:
    """Write a document under the name `target`, which is the old or the new one at every moment."""
    raw = _text(document) if target == index else orjson.dumps(document)
    partial = _partial(index)
    try:
        fd = os.open(partial, files.OWN_FLAGS, 0o666)
    except OSError as error:
        raise sink.unwritable(str(index), error) from error
    try:
        try:
            os.ftruncate(fd, 0)
            files.write_at(fd, memoryview(raw), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.replace(target)
    except OSError as error:
        _drop(partial)
        raise sink.unwritable(str(index), error) from error


def _drop(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _in_the_way(path: Path) -> PlanError:
    return PlanError(
        f"`{path}` is in the way, and it is not cq's",
        where=str(path),
        hint="move it away, or add `--restart` to discard it",
        code="plan.other_partial",
    )
