"""`cq merge`: options to `merge`, and what each adapter does as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cq.cli import options

_COLUMNS = ("adapter", "kind", "rank>", "alpha>", "strength>", "layers>", "unmatched>")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "merge")
    def merge(
        base: Annotated[
            str, typer.Argument(metavar="BASE|-", help="A checkpoint, a manifest, or `-`.")
        ],
        adapters: Annotated[
            list[str],
            typer.Argument(metavar="ADAPTER[:STRENGTH]…", help="LoRA files, merged in this order."),
        ],
        scale: Annotated[
            float, typer.Option("--scale", metavar="X", help="Multiplies every strength.")
        ] = 1.0,
        dampen: Annotated[
            bool | None,
            typer.Option(
                "--dampen/--no-dampen",
                help="The n-th adapter at 0.9^(n-1); on for several adapters.",
            ),
        ] = None,
        allow_unmatched: Annotated[
            bool,
            typer.Option("--allow-unmatched", help="Leave out adapter keys that fit no layer."),
        ] = False,
        output: options.Output = None,
        force: options.Force = False,
        restart: options.Restart = False,
        dry_run: options.DryRun = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
    ) -> int:
        """Merge LoRA adapters into a checkpoint, in float32, layer by layer.

        Without -o it passes the result on as a manifest: nothing is computed until a later step
        asks. At a terminal it shows the plan.

        \b
          cq merge flux.safetensors style.safetensors:0.8 -o merged.safetensors
          cq merge flux.safetensors style.safetensors hero.safetensors:0.6 | cq quant
        """
        from cq.cli.deliver import Delivery, deliver
        from cq_merge import merge as merge_adapters

        checkpoint = merge_adapters(
            options.open_input(base, what="BASE"),
            adapters,
            scale=scale,
            dampen=dampen,
            allow_unmatched=allow_unmatched,
        )
        return deliver(
            checkpoint,
            Delivery(
                output=output,
                force=force,
                restart=restart,
                dry_run=dry_run,
                workers=workers,
                memory_limit=options.parse_size(memory_limit),
            ),
            command="merge",
            remarks=[_remark(note) for note in checkpoint.notes],
            columns=_COLUMNS,
            rows=_rows(checkpoint.notes),
        )


def _remark(note: Any) -> str:
    text = f"`{Path(note['path']).name}` changes {len(note['layers'])} layers"
    if note["unmatched"]:
        text += (
            f"; {len(note['unmatched'])} of its keys fit no layer and are left out,"
            f" such as `{note['unmatched'][0]}`"
        )
    return text


def _rows(notes: Any) -> Iterator[tuple[str, ...]]:
    for note in notes:
        yield (
            Path(note["path"]).name,
            note["kind"],
            ",".join(map(str, note["ranks"])),
            ",".join(f"{a:g}" for a in note["alphas"]) or "none",
            f"{note['effective_strength']:g}",
            str(len(note["layers"])),
            str(len(note["unmatched"])),
        )
