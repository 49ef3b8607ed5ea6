"""`cq run`: a manifest to a file, or a share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cq.cli import options
from cq.core.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from cq.cli.deliver import Delivery
    from cq.core.checkpoint import Checkpoint
    from cq.core.shares import Share, ShareDone

Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Fill the I-th of N shares of FILE, beside other processes; the last makes it whole.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "run")
    def run(
        manifest: Annotated[
            str | None,
            typer.Argument(metavar="[MANIFEST|-]", help="A manifest; left out, it is piped in."),
        ] = None,
        output: options.Output = None,
        shard: Shard = None,
        force: options.Force = False,
        restart: options.Restart = False,
        max_shard_size: options.MaxShardSize = None,
        dry_run: options.DryRun = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
        engine: options.Engine = "local",
        device: options.Device = "cpu",
        streaming_mode: options.Streaming = "auto",
        quip_checkpointed: options.QuipCheckpointed = False,
        threshold: options.CheckpointedThreshold = None,
        segments: options.CheckpointedSegments = None,
        vram_limit: options.VramLimit = None,
    ) -> int:
        """Carry out a manifest: read the sources that it names, apply its stages, write a file.

        With `--shard` several processes write one file: in a job array, on several machines, each
        does its share of the work. A share that died is started again and does what is missing.

        \b
          cq merge flux.safetensors style.safetensors > plan.json
          cq run plan.json -o merged.safetensors
          cq run plan.json -o merged.safetensors --shard $SLURM_ARRAY_TASK_ID/4
        """
        from cq.cli.deliver import Delivery, deliver
        from cq.cli.placing import checkpointed

        asked = Delivery(
            output=output,
            force=force,
            restart=restart,
            max_shard_size=options.parse_size(max_shard_size),
            dry_run=dry_run,
            workers=workers,
            memory_limit=options.parse_size(memory_limit),
            engine=engine,
            device=device,
            streaming_mode=streaming_mode,
            quip_checkpointed=checkpointed(quip_checkpointed, threshold, segments),
            vram_limit=options.parse_size(vram_limit),
        )
        if shard is None:
            checkpoint = options.open_input(manifest, what="MANIFEST")
            return deliver(checkpoint, asked, command="run")
        from cq.core.shares import parse_share

        share = parse_share(shard)
        if engine != "local":
            raise UsageError(
                "`--shard` and `--engine` contradict each other",
                hint="a share is computed by the process that fills it",
            )
        if max_shard_size is not None:
            raise UsageError(
                "`--shard` and `--max-shard-size` contradict each other: shares fill one file",
                hint="`cq edit --max-shard-size` makes several of it",
            )
        if output in {None, "-"}:
            raise UsageError(
                "`--shard` fills a file", hint="add `-o FILE`, the same one for all shares"
            )
        if restart:
            raise UsageError(
                "`--shard` and `--restart` contradict each other: a share never discards"
                " what others do",
                hint=f"remove `{output}.shares` when nothing writes to it any more",
            )
        return _run_share(options.open_input(manifest, what="MANIFEST"), share, asked)


def _run_share(checkpoint: Checkpoint, share: Share, asked: Delivery) -> int:
    from cq.cli import placing
    from cq.cli.deliver import (
        check_name,
        deliver,
        plan_document,
        refuse_inputs,
        say_outcomes,
        say_retreats,
    )
    from cq.core.engine.local import check_budget
    from cq.core.shares import write_share

    here = options.terminal()
    assert asked.output is not None
    if asked.dry_run:
        return deliver(checkpoint, asked, command="run")
    check_name(asked)
    refuse_inputs(asked)
    placing.check(asked)
    for remark in placing.remarks(checkpoint, asked):
        here.say(f"run: {remark}")
    where = placing.found(asked, "run")
    check_budget(checkpoint.parts, asked.settings(where))
    with here.progress(f"run {share}") as progress:
        try:
            done = write_share(
                checkpoint,
                asked.output,
                share,
                force=asked.force,
                settings=asked.settings(where, progress.on_progress),
            )
        except KeyboardInterrupt as error:
            raise Interrupted(
                "interrupted", hint="run the same share again to go on with what is finished"
            ) from error
    here.say(f"run: {_told(done, share, asked.output)}")
    say_retreats(done.written, where, "run")
    say_outcomes(checkpoint, "run")
    if here.json:
        progress_of = {
            "number": share.number,
            "count": share.count,
            "missing": [each.number for each in done.missing],
        }
        whole = {} if done.missing else {"written": done.written.to_dict()}
        here.document({**plan_document(checkpoint, "run"), "shard": progress_of, **whole})
    elif not here.is_tty and not done.missing:
        here.document(done.written.manifest())
    return 0


def _told(done: ShareDone, share: Share, output: str) -> str:
    if done.ready:
        return f"`{output}` is complete already"
    seconds, parts = done.written.seconds, done.written.parts
    resumed = f", {done.written.parts_resumed} of them were ready" * bool(
        done.written.parts_resumed
    )
    own = f"share {share} is done: {parts} parts in {seconds:.1f} s{resumed}"
    if not done.missing:
        return f"{own}; wrote `{output}`"
    shown = ", ".join(str(each) for each in done.missing[:8])
    more = f" and {len(done.missing) - 8} more" * (len(done.missing) > 8)
    return f"{own}; `{output}` appears when {shown}{more} are done, too"
