"""`cq run`: a manifest to a file."""

from __future__ import annotations

from typing import Annotated

import typer

from cq.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "run")
    def run(
        manifest: Annotated[
            str | None,
            typer.Argument(metavar="[MANIFEST|-]", help="A manifest; left out, it is piped in."),
        ] = None,
        output: options.Output = None,
        force: options.Force = False,
        restart: options.Restart = False,
        dry_run: options.DryRun = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
    ) -> int:
        """Carry out a manifest: read the sources that it names, apply its stages, write a file.

        \b
          cq merge flux.safetensors style.safetensors > plan.json
          cq run plan.json -o merged.safetensors
        """
        from cq.cli.deliver import Delivery, deliver

        checkpoint = options.open_input(manifest, what="MANIFEST")
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
            command="run",
        )
