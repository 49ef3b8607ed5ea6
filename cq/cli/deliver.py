"""What becomes of a checkpoint at the end of a command: a plan, a manifest, a file, or bytes.

Owns the table "Streams and pipes" of the reference: one implementation for every command that makes
a checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cq.cli import placing
from cq.cli.options import terminal
from cq.cli.output import LostReader, size
from cq.core import shards, sink
from cq.core.checkpoint import Checkpoint
from cq.core.engine.local import Progress, Settings, check_budget
from cq.core.errors import Interrupted, PlanError, UsageError
from cq.core.header import total_nbytes
from cq.core.streaming import CPU, Checkpointed, StreamingMode
from cq.core.text import as_text
from cq.core.write import Engine, Written, stream, write


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How a command was asked to deliver: its shared options. `named` says that a person named the
    output, rather than the command; `in_place` that the output is the input. With
    `max_shard_size`, in bytes, it is several files and an index; `device`, `streaming_mode`,
    `quip_checkpointed` and `vram_limit`, in bytes, say where layers are computed, and how much of
    them at a time."""

    output: str | None = None
    named: bool = True
    force: bool = False
    restart: bool = False
    in_place: bool = False
    max_shard_size: int | None = None
    dry_run: bool = False
    workers: int | None = None
    memory_limit: int | None = None
    engine: Engine = "local"
    device: str = CPU
    streaming_mode: StreamingMode = "auto"
    quip_checkpointed: Checkpointed | None = None
    vram_limit: int | None = None

    def settings(
        self, device: str, on_progress: Callable[[Progress], None] | None = None
    ) -> Settings:
        """How the engine runs, on the `device` that was found."""
        return Settings(
            workers=self.workers,
            memory_limit=self.memory_limit,
            device=device,
            streaming_mode=self.streaming_mode,
            quip_checkpointed=self.quip_checkpointed,
            vram_limit=self.vram_limit,
            on_progress=on_progress,
        )


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
    check(checkpoint, asked)
    check_name(asked)
    for remark in (*remarks, *_remarks(asked), *placing.remarks(checkpoint, asked)):
        here.say(f"{command}: {remark}")
    if asked.dry_run or (asked.output is None and (here.is_tty or here.json)):
        _show_plan(checkpoint, asked, command, columns, rows)
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
    written = written_file(checkpoint, asked, asked.output, command)
    if here.json:
        outcomes = [outcome.to_dict() for outcome in checkpoint.outcomes]
        told = {"outcomes": outcomes} if outcomes else {}
        plan = plan_document(checkpoint, command, asked)
        here.document({**plan, "written": written.to_dict(), **told})
    elif not here.is_tty:
        here.document(written.manifest())
    return 0


def written_file(checkpoint: Checkpoint, asked: Delivery, output: str, command: str) -> Written:
    """Write `checkpoint` to `output` as `asked`, with progress, and say so."""
    here = terminal()
    where = placing.found(asked, command)
    with here.progress(command) as progress:
        try:
            if asked.max_shard_size is not None:
                written = shards.write_shards(
                    checkpoint,
                    output,
                    max_bytes=asked.max_shard_size,
                    force=asked.force,
                    restart=asked.restart,
                    workers=asked.workers,
                    memory_limit=asked.memory_limit,
                    engine=asked.engine,
                    device=where,
                    streaming_mode=asked.streaming_mode,
                    quip_checkpointed=asked.quip_checkpointed,
                    vram_limit=asked.vram_limit,
                    on_progress=progress.on_progress,
                )
            else:
                written = write(
                    checkpoint,
                    output,
                    force=asked.force,
                    restart=asked.restart,
                    in_place=asked.in_place,
                    workers=asked.workers,
                    memory_limit=asked.memory_limit,
                    engine=asked.engine,
                    device=where,
                    streaming_mode=asked.streaming_mode,
                    quip_checkpointed=asked.quip_checkpointed,
                    vram_limit=asked.vram_limit,
                    on_progress=progress.on_progress,
                )
        except KeyboardInterrupt as error:
            raise Interrupted(
                "interrupted", hint="run the same command again to go on with what is finished"
            ) from error
    resumed = f", {written.parts_resumed} parts were ready" if written.parts_resumed else ""
    shown = output if asked.max_shard_size is None else str(written.path)
    here.say(
        f"{command}: wrote `{shown}`, {size(written.nbytes)} in {written.seconds:.1f} s{resumed}"
    )
    say_retreats(written, where, command)
    say_outcomes(checkpoint, command)
    return written


def say_retreats(written: Written, where: str, command: str) -> None:
    """Say for which layers the memory of the device `where` ran out."""
    if written.retreated:
        terminal().say(
            f"{command}: the memory of `{where}` ran out for {len(written.retreated)} layers, such"
            f" as `{written.retreated[0]}`: the CPU went on with them"
        )


def check(checkpoint: Checkpoint, asked: Delivery) -> None:
    """What must hold before any work, in a dry run as well."""
    here = terminal()
    placing.check(asked)
    if asked.engine == "ray":
        _check_ray(asked)
    if asked.max_shard_size is not None and asked.output in {None, "-"}:
        raise UsageError(
            "several files need a name",
            hint="add `-o NAME.safetensors.index.json`",
            code="usage.shards",
        )
    if asked.output == "-":
        for name, given in (("--force", asked.force), ("--restart", asked.restart)):
            if given:
                raise UsageError(f"`-o -` writes no file, so it takes no `{name}`")
        if here.json and not asked.dry_run:
            raise UsageError("`-o -` and `--json` both want stdout", hint="use one of them")
    elif asked.output is not None:
        target = Path(asked.output)
        try:
            if asked.max_shard_size is not None:
                shards.check_targets(
                    checkpoint,
                    target,
                    asked.max_shard_size,
                    force=asked.force,
                    restart=asked.restart,
                )
            else:
                sink.check_target(checkpoint, target, force=asked.force, in_place=asked.in_place)
        except PlanError as error:
            if asked.named or not asked.dry_run or error.code != "plan.output_exists":
                raise
            here.say(f"`{target}` exists already: writing it will ask for `--force`")
        if not asked.in_place:
            refuse_inputs(asked)
    if asked.engine == "local":  # the memory of other machines is theirs to tell
        check_budget(checkpoint.parts, asked.settings(CPU))


def refuse_inputs(asked: Delivery) -> None:
    """Raises: PlanError if the output is a file that the command reads, such as its plan."""
    target = Path(str(asked.output))
    if asked.max_shard_size is not None:
        target = shards.index_path(target)
    with suppress(OSError):
        if any(os.path.samestat(target.stat(), opened) for opened in terminal().opened):
            raise PlanError(
                f"`{target}` is the input itself",
                hint="choose another output; cq never overwrites what it reads",
                code="plan.output_is_input",
            )


def check_name(asked: Delivery) -> None:
    """See that the manifest that goes to stdout can name the output.

    Raises: UsageError if the name is not text, which a manifest is.
    """
    here = terminal()
    if asked.output in {None, "-"} or here.json or here.is_tty:
        return
    whole = os.path.abspath(str(asked.output))
    if as_text(whole) != whole:
        raise UsageError(
            f"`{as_text(whole)}` is not UTF-8 text, so the manifest on stdout cannot name it",
            hint="choose another name, or add `--json`, which passes no manifest on",
            code="usage.path",
        )


def _remarks(asked: Delivery) -> Iterator[str]:
    if asked.max_shard_size is not None:
        yield "ComfyUI reads single files only; `cq edit --unshard` makes one of these again"


def _check_ray(asked: Delivery) -> None:
    if asked.output == "-":
        raise UsageError("`-o -` is written by this machine alone", hint="leave `--engine ray` out")
    if terminal().plugins:
        raise UsageError(
            "`--plugin` brings a module to this process alone",
            hint="install it as a package on all machines, or leave `--engine ray` out",
        )


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
    where = placing.found(asked, command)
    with here.progress(command) as progress:
        try:
            stream(checkpoint, here.byte_stream(), asked.settings(where, progress.on_progress))
        except BrokenPipeError as error:
            raise LostReader("the reader of the bytes went away") from error
    say_outcomes(checkpoint, command)


def say_outcomes(checkpoint: Checkpoint, command: str) -> None:
    """Say what came of the work."""
    for outcome in checkpoint.outcomes:
        for remark in outcome.remarks():
            terminal().say(f"{command}: {remark}")


def plan_document(
    checkpoint: Checkpoint, command: str, asked: Delivery | None = None
) -> dict[str, Any]:
    """The plan as a program reads it; with what was `asked`, also where layers are computed."""
    placements = [] if asked is None else placing.placements(checkpoint, asked)
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
        "nbytes_peak": placing.peak(checkpoint, asked),
        "decisions": [dict(note) for note in checkpoint.notes],
        **({"placements": placements} if placements else {}),
    }


def _show_plan(
    checkpoint: Checkpoint,
    asked: Delivery,
    command: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> None:
    here = terminal()
    if here.json:
        here.document(plan_document(checkpoint, command, asked))
        return
    if columns:
        here.table(columns, rows)
        here.data("")
    before = sum(total_nbytes(s.spec(n) for n in s.owner) for s in checkpoint.sources)
    here.data(
        f"{size(before)} of tensors become {_files(checkpoint, asked)};"
        f" memory: torch, and {placing.memory_told(checkpoint, asked)}"
    )


def _files(checkpoint: Checkpoint, asked: Delivery) -> str:
    if asked.max_shard_size is None or asked.output is None:
        return f"a file of {size(sink.nbytes_file(checkpoint))}"
    found = shards.plan(checkpoint, shards.index_path(asked.output), asked.max_shard_size)
    sizes = [sink.nbytes_file(shard.checkpoint) for shard in found]
    count = "1 file" if len(found) == 1 else f"{len(found)} files"
    return f"{count} of up to {size(max(sizes, default=0))} and an index"
