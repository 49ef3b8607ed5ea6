"""What becomes of a checkpoint at the end of a command: a plan, a manifest, a file, or bytes.

Owns the table "Streams and pipes" of the reference: one implementation for every command that makes
a checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cq.cli.options import terminal
from cq.cli.output import LostReader, size
from cq.core import sink
from cq.core.checkpoint import Checkpoint
from cq.core.engine.local import Settings, check_budget
from cq.core.errors import Interrupted, PlanError, UsageError
from cq.core.header import total_nbytes
from cq.core.write import stream, write


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How a command was asked to deliver: its shared options. `named` says that a person named the
    output, rather than the command."""

    output: str | None = None
    named: bool = True
    force: bool = False
    restart: bool = False
    dry_run: bool = False
    workers: int | None = None
    memory_limit: int | None = None


def deliver(
    checkpoint: Checkpoint,
    asked: Delivery,
    *,
    command: str,
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    remarks: Sequence[str] = (),
) -> int:
    """Deliver `checkpoint` as `asked`; `columns` and `rows` are the plan as a person reads it, and
    `remarks` what is said of it in any case."""
    here = terminal()
    _check(checkpoint, asked)
    for remark in remarks:
        here.say(f"{command}: {remark}")
    if asked.dry_run or (asked.output is None and (here.is_tty or here.json)):
        _show_plan(checkpoint, command, columns, rows)
        here.say("nothing was written")
        if asked.output is None and not asked.dry_run:
            here.say("\nhint: add `-o FILE` to write it")
        return 0
    if asked.output is None:
        here.document(checkpoint.manifest())
        here.say(f"{command}: passed on as a manifest; nothing was written")
        return 0
    if asked.output == "-":
        _stream_bytes(checkpoint, asked, command)
        return 0
    with here.progress(command) as progress:
        try:
            written = write(
                checkpoint,
                asked.output,
                force=asked.force,
                restart=asked.restart,
                workers=asked.workers,
                memory_limit=asked.memory_limit,
                on_progress=progress.on_progress,
            )
        except KeyboardInterrupt as error:
            raise Interrupted(
                "interrupted", hint="run the same command again to go on with what is finished"
            ) from error
    resumed = f", {written.parts_resumed} parts were ready" if written.parts_resumed else ""
    here.say(
        f"{command}: wrote `{asked.output}`, {size(written.nbytes)}"
        f" in {written.seconds:.1f} s{resumed}"
    )
    if here.json:
        here.document({**plan_document(checkpoint, command), "written": written.to_dict()})
    elif not here.is_tty:
        here.document(written.manifest())
    return 0


def _check(checkpoint: Checkpoint, asked: Delivery) -> None:
    """What must hold before any work, in a dry run as well."""
    here = terminal()
    if asked.output == "-":
        for name, given in (("--force", asked.force), ("--restart", asked.restart)):
            if given:
                raise UsageError(f"`-o -` writes no file, so it takes no `{name}`")
        if here.json and not asked.dry_run:
            raise UsageError("`-o -` and `--json` both want stdout", hint="use one of them")
    elif asked.output is not None:
        target = Path(asked.output)
        try:
            sink.check_target(checkpoint, target, force=asked.force)
        except PlanError as error:
            if asked.named or not asked.dry_run or error.code != "plan.output_exists":
                raise
            here.say(f"`{target}` exists already: writing it will ask for `--force`")
        with suppress(OSError):
            if any(os.path.samestat(target.stat(), opened) for opened in here.opened):
                raise PlanError(
                    f"`{target}` is the input itself",
                    hint="choose another output; cq never overwrites what it reads",
                    code="plan.output_is_input",
                )
    check_budget(checkpoint.parts, asked.memory_limit)


def _stream_bytes(checkpoint: Checkpoint, asked: Delivery, command: str) -> None:
    here = terminal()
    if here.is_tty:
        raise UsageError(
            "`-o -` would put tensors on the terminal",
            hint="name a file, or pipe the output into something",
            code="usage.terminal",
        )
    if sys.stdout is None:
        raise UsageError("stdout is closed", hint="name a file")
    with here.progress(command) as progress:
        settings = Settings(
            workers=asked.workers,
            memory_limit=asked.memory_limit,
            on_progress=progress.on_progress,
        )
        try:
            stream(checkpoint, here.byte_stream(), settings)
        except BrokenPipeError as error:
            raise LostReader("the reader of the bytes went away") from error


def plan_document(checkpoint: Checkpoint, command: str) -> dict[str, Any]:
    """The plan as a program reads it."""
    return {
        "cq": 1,
        "kind": "plan",
        "command": command,
        "sources": [
            {"path": source.shown, "nbytes": sum(f.nbytes for f in source.files)}
            for source in checkpoint.sources
        ],
        "tensors": len(checkpoint.specs),
        "nbytes": sink.nbytes_file(checkpoint),
        "nbytes_peak": peak(checkpoint),
        "decisions": [dict(note) for note in checkpoint.notes],
    }


def peak(checkpoint: Checkpoint) -> int:
    """Bytes that the largest part holds at once: what each worker may need beyond torch itself."""
    return max((part.nbytes_peak for part in checkpoint.parts), default=0)


def _show_plan(
    checkpoint: Checkpoint, command: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    here = terminal()
    if here.json:
        here.document(plan_document(checkpoint, command))
        return
    if columns:
        here.table(columns, rows)
        here.data("")
    before = sum(total_nbytes(s.spec(n) for n in s.owner) for s in checkpoint.sources)
    here.data(
        f"{size(before)} of tensors become a file of {size(sink.nbytes_file(checkpoint))};"
        f" memory: torch, and up to {size(peak(checkpoint))} for each worker"
    )
