"""`cq quant`: options to `quantize`, and its decisions as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cq.cli import options
from cq.cli.output import size
from cq.core.errors import UsageError

if TYPE_CHECKING:
    from cq.core.checkpoint import Checkpoint

_COLUMNS = ("layers>", "layer", "becomes", "rotation>", "saves>", "reason")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "quant")
    def quant(
        model: Annotated[
            str | None,
            typer.Argument(
                metavar="[MODEL|-]", help="A checkpoint or manifest; left out, it is piped in."
            ),
        ] = None,
        format: Annotated[
            str, typer.Option("--format", metavar="NAME", help="How weights are stored.")
        ] = "int8_tensorwise",
        scaling: Annotated[
            str | None,
            typer.Option("--scaling", metavar="tensor|row", help="How far one scale reaches."),
        ] = None,
        optimizer: Annotated[
            str, typer.Option("--optimizer", metavar="NAME", help="How weights are rounded.")
        ] = "quip",
        rotate: Annotated[
            str,
            typer.Option(
                "--rotate",
                metavar="auto|off|256|64|16",
                help="Largest ConvRot group; auto is as the optimizer works.",
            ),
        ] = "auto",
        only: Annotated[
            list[str] | None,
            typer.Option("--only", metavar="PATTERN", help="Quantize these layers; repeatable."),
        ] = None,
        skip: Annotated[
            list[str] | None,
            typer.Option("--skip", metavar="PATTERN", help="Keep these layers; repeatable."),
        ] = None,
        save_quant_metadata: Annotated[
            bool,
            typer.Option("--save-quant-metadata", help="Write the markers to the header as well."),
        ] = False,
        output: options.Output = None,
        defer: Annotated[
            bool, typer.Option("--defer", help="Pass on a manifest instead of writing a file.")
        ] = False,
        force: options.Force = False,
        restart: options.Restart = False,
        dry_run: options.DryRun = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
    ) -> int:
        """Quantize the linear layers of a checkpoint so that ComfyUI loads it natively.

        Without -o it writes NAME-FORMAT.safetensors beside the source. PATTERN is a glob over layer
        names, or a regular expression after `re:`.

        \b
          cq quant flux.safetensors
          cq merge flux.safetensors style.safetensors:0.8 | cq quant -o out.safetensors
          cq quant flux.safetensors --skip 'single_blocks.37.*' --dry-run
        """
        from cq.cli.deliver import Delivery, deliver
        from cq_quant.stage import quantize

        if defer and output is not None:
            raise UsageError("`--defer` writes no file, so it takes no `-o`")
        limit = options.parse_size(memory_limit)
        checkpoint = quantize(
            options.open_input(model),
            format=format,
            scaling=scaling,
            optimizer=optimizer,
            rotate=rotate,
            only=only or (),
            skip=skip or (),
            save_quant_metadata=save_quant_metadata,
        )
        if output is None and not defer:
            output = default_output(checkpoint, format)
        return deliver(
            checkpoint,
            Delivery(
                output=output,
                force=force,
                restart=restart,
                dry_run=dry_run,
                workers=workers,
                memory_limit=limit,
            ),
            command="quant",
            remarks=_remarks(checkpoint),
            columns=_COLUMNS,
            rows=_rows(checkpoint.notes),
        )


def default_output(checkpoint: Checkpoint, format_name: str) -> str:
    """`<source stem>-<format>.safetensors` beside the source; in the current directory for a
    pipe."""
    source = checkpoint.sources[0]
    name = f"{source.stem}-{format_name}.safetensors"
    return name if source.spooled else str(Path(source.path).with_name(name))


def _remarks(checkpoint: Checkpoint) -> list[str]:
    """What was decided, in a sentence, and what a user should know of how it was."""
    chosen = [n for n in checkpoint.notes if n["action"] == "quantize"]
    notes = dict.fromkeys(n["note"] for n in chosen if n["note"])
    counts = {note: sum(n["note"] == note for n in chosen) for note in notes}
    kept = len(checkpoint.notes) - len(chosen)
    return [
        f"{len(chosen)} layers are quantized, {kept} are kept as they are;"
        f" ComfyUI {chosen[0]['first_comfyui']} or newer loads the result",
        *(f"{note} ({count} layers)" for note, count in counts.items()),
    ]


def _rows(notes: Any) -> Iterator[tuple[str, ...]]:
    from cq.cli.deliver import folded

    groups: dict[tuple[str, ...], list[Any]] = {}
    for note in notes:
        becomes = (
            f"{note['format']} {note['scaling']} {note['optimizer']}"
            if note["action"] == "quantize"
            else f"kept as {note['dtype']}"
        )
        rotation = str(note.get("rotation") or "")
        key = (folded(note["layer"]), becomes, rotation, note["reason"])
        groups.setdefault(key, []).append(note)
    for (layer, becomes, rotation, reason), members in groups.items():
        saved = sum(n["nbytes"] - n["nbytes_after"] for n in members if "nbytes_after" in n)
        yield (
            str(len(members)),
            layer,
            becomes,
            rotation,
            size(saved) if saved else "",
            reason,
        )
