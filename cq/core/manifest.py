"""Manifests: a checkpoint as one line of JSON, and back; and the provenance that files carry.

Owns the document's shape and versions. A manifest names sources (with fingerprints) and stages
(with arguments); the same two make the work digest by which interrupted work is recognized.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import orjson

from cq.core import catalog, files
from cq.core.checkpoint import Checkpoint, Stage, from_source
from cq.core.errors import InputError, UsageError
from cq.core.source import (
    check_fingerprint,
    not_a_name,
    open_source,
    open_stream,
    unreadable,
)
from cq.core.text import as_text, printable
from cq.version import VERSION

MANIFEST_VERSION = 1
# Raised whenever equal stages would give other bytes than before, so that no old work is resumed.
WORK_FORMAT = 1
HISTORY_KEY = "cq.history"
_MAX_MANIFEST_BYTES = 64 << 20
_KNOWN_KEYS = frozenset({"cq", "kind", "source", "stages", "digest"})


def document(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest of `checkpoint`. Paths are absolute.

    Raises: UsageError if a source came from a pipe, which nobody can open again.
    """
    sources = []
    for source in checkpoint.sources:
        if source.spooled:
            raise UsageError(
                f"bytes from {source.shown} cannot be named in a manifest",
                hint="add `-o FILE`, or give the checkpoint as a file",
                code="usage.stdin_bytes",
            )
        sources.append({"path": os.path.abspath(source.path), **source.fingerprint()})
    found = {
        "cq": MANIFEST_VERSION,
        "kind": "checkpoint",
        "source": sources,
        "stages": [stage_document(stage) for stage in checkpoint.stages],
        **checkpoint.extra,
    }
    try:
        orjson.dumps(found)
    except TypeError as error:
        raise UsageError(
            "a file's name is not UTF-8 text, so it cannot be named in a manifest",
            hint="rename the file, or write the result with `-o FILE` in the same step",
            code="usage.path",
        ) from error
    return found


def stage_document(stage: Stage) -> dict[str, Any]:
    """A stage as it stands in a manifest."""
    return {"op": stage.name, **stage.arguments()}


def work_digest(checkpoint: Checkpoint) -> str:
    """Names the work: equal digests promise equal bytes.

    A sink remembers the inputs' modification times besides it: touching a source costs a fresh
    start, never a file mixed from two versions of it.
    """
    identity = {
        "work_format": WORK_FORMAT,
        "inputs": [
            {"header": file.header_digest, "nbytes": file.nbytes} for file in checkpoint.inputs
        ],
        "sources": [source.fingerprint() for source in checkpoint.sources],
        "stages": [stage_document(stage) for stage in checkpoint.stages],
    }
    # The standard library's JSON, which can say file names that are not text.
    return "sha256:" + hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def history(checkpoint: Checkpoint) -> str:
    """The provenance for the output's header: the stages and sources that made it, as JSON text.

    A source that carries a history of its own is continued, so that working through an intermediate
    file and working in one go leave the same record. Paths are shortened to names and there is no
    time stamp: equal work gives equal bytes anywhere.
    """
    sources: list[Any] = []
    stages: list[Any] = []
    for source in checkpoint.sources:
        earlier = _earlier_history(source.metadata)
        if earlier is None:
            sources.append({"name": as_text(source.path.name), **source.fingerprint()})
        else:
            sources += earlier["sources"]
            stages += earlier["stages"]
    for stage in checkpoint.stages:
        stages.append({**_short_paths(stage_document(stage)), "version": VERSION})
    record = {"cq": MANIFEST_VERSION, "sources": sources, "stages": stages}
    return orjson.dumps(record, option=orjson.OPT_SORT_KEYS).decode()


def _earlier_history(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        record = orjson.loads(metadata.get(HISTORY_KEY, ""))
        orjson.dumps(record)  # it reads deeper nesting than it writes
    except (orjson.JSONDecodeError, TypeError):
        return None
    if isinstance(record, dict) and all(
        isinstance(record.get(key), list) for key in ("sources", "stages")
    ):
        return record
    return None


def _short_paths(value: Any) -> Any:
    if isinstance(value, dict):
        short = {key: _short_paths(item) for key, item in value.items() if key != "path"}
        if isinstance(value.get("path"), str):
            return short | {"name": as_text(Path(value["path"]).name)}
        return short
    if isinstance(value, list):
        return [_short_paths(item) for item in value]
    return value


def load(raw: bytes, *, where: str) -> Checkpoint:
    """The checkpoint that a manifest describes; its sources are opened and checked.

    Relative paths in a manifest file count from the current directory.

    Raises: InputError if the text is not a manifest of a version that this cq reads, PlanError if a
    source has changed.
    """
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"`{where}` is not a manifest: {printable(str(error))}",
            where=where,
            code="input.manifest",
        ) from error
    if not isinstance(found, dict) or "cq" not in found:
        raise _not_a_manifest(where, "it has no `cq` version")
    if type(found["cq"]) is not int or found["cq"] != MANIFEST_VERSION:
        raise InputError(
            f"`{where}` is a manifest of version `{printable(str(found['cq']))}`;"
            f" this cq reads version {MANIFEST_VERSION}",
            where=where,
            hint="make the manifest again, or install the cq that made it",
            code="input.manifest_version",
        )
    if found.get("kind") != "checkpoint":
        raise _not_a_manifest(where, f"its kind is `{printable(str(found.get('kind')))}`")
    sources, stages = found.get("source"), found.get("stages", [])
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(stages, list):
        raise _not_a_manifest(where, "it needs one entry in `source` and a list of `stages`")
    entry = sources[0]
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise _not_a_manifest(where, "its source has no `path`")
    source = open_source(entry["path"])
    check_fingerprint(source, entry)
    extra = {k: v for k, v in found.items() if k not in _KNOWN_KEYS}
    checkpoint = dataclasses.replace(from_source(source), extra=extra)
    for value in stages:
        checkpoint = _stage(value, where).apply(checkpoint)
    return checkpoint


def _stage(value: Any, where: str) -> Stage:
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        raise _not_a_manifest(where, "a stage has no `op`")
    stage_class = catalog.load("stages", value["op"])
    arguments = {k: v for k, v in value.items() if k not in {"op", "version"}}
    stage: Stage = stage_class.from_arguments(arguments)
    return stage


def _not_a_manifest(where: str, why: str) -> InputError:
    return InputError(
        f"`{where}` is not a manifest: {why}",
        where=where,
        hint="a manifest is the line that `cq merge` or `cq quant --defer` prints",
        code="input.manifest",
    )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: a safetensors file, shard index, directory, or manifest file.

    Reads headers only; imports no torch. The first bytes tell a manifest from safetensors.

    Raises: InputError with the file's name for anything else.
    """
    shown = os.fspath(path)
    resolved = Path(shown)
    if not os.path.isdir(resolved) and not resolved.name.endswith(".index.json"):
        with _opened(resolved, shown) as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):  # as in `<(cq merge …)`
                return open_checkpoint_stream(file, where=shown)
            raw = _read(file, 9, shown)
            if _is_manifest(raw):
                return load(raw + _read(file, _MAX_MANIFEST_BYTES, shown), where=shown)
    return from_source(open_source(resolved))


def _opened(path: Path, shown: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(shown, error) from error
    except ValueError as error:  # a NUL in the name
        raise not_a_name(shown) from error


def _read(file: IO[bytes], nbytes: int, shown: str) -> bytes:
    try:
        return files.up_to(file, nbytes)
    except OSError as error:
        raise unreadable(shown, error) from error


def open_checkpoint_stream(stream: IO[bytes], *, where: str = "stdin") -> Checkpoint:
    """Open a manifest or safetensors bytes that come through a pipe.

    Raises: InputError; an empty stream says that the step before has failed.
    """
    first = b""
    while len(first) < 9 and (more := stream.read(9 - len(first))):
        first += more
    if not first:
        raise InputError(
            f"{where} is empty: the step before in the pipe has passed nothing on",
            where=where,
            hint="look at that step's error above",
            code="input.empty",
        )
    if _is_manifest(first):
        return load(first + files.up_to(stream, _MAX_MANIFEST_BYTES), where=where)
    return from_source(open_stream(stream, first, shown=where))


def _is_manifest(first: bytes) -> bool:
    # A safetensors header is under 100 MB, so the upper bytes of its length are zero; JSON has
    # none.
    return first.lstrip()[:1] == b"{" and b"\0" not in first[:8]
