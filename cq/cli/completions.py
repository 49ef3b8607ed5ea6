"""`cq completions`: a shell's completion script."""

from __future__ import annotations

from typing import Annotated

import typer

from cq.cli import complete, options
from cq.core.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "completions", json=False)
    def completions(
        shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="Your shell.")],
    ) -> None:
        """Print the completion script for a shell, with the plugs that are installed.

        \b
          cq completions bash > ~/.local/share/bash-completion/completions/cq
          cq completions fish > ~/.config/fish/completions/cq.fish
        """
        if shell not in complete.SHELLS:
            raise UsageError(
                f"there is no completion script for `{shell}`",
                hint="choose from " + ", ".join(f"`{s}`" for s in complete.SHELLS),
            )
        options.terminal().data(complete.script(shell, app).rstrip("\n"))
