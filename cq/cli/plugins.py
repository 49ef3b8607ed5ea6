"""`cq plugins`: what is installed, by kind, without importing it."""

from __future__ import annotations

import typer

from cq.cli import options
from cq.core import catalog


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "plugins")
    def plugins() -> None:
        """List formats, optimizers, adapters, model families, stages and commands, and their
        origin.

        \b
          cq plugins
          cq plugins --json
        """
        here = options.terminal()
        found = {
            kind: {name: catalog.origin(kind, name) for name in catalog.names(kind)}
            for kind in catalog.KINDS
        }
        if here.json:
            here.document({"cq": 1, "kind": "plugins", "plugins": found})
            return
        here.table(
            ("kind", "name", "origin"),
            ((kind, name, place) for kind, plugs in found.items() for name, place in plugs.items()),
        )
