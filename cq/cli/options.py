"""What commands share: options by one spelling each, opening the input, and the guard around a
body.

A command module offers `register(app)` and decorates its function with `command(app, …)`, which
adds `--json`, `-q`, `--plugin` and `--debug` and turns everything that can go wrong into one
message and an exit code.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, cast

import typer
from typer.core import TyperCommand

from cq.cli.output import LostReader, Terminal, UnwritableStdout
from cq.core.errors import (
    CqError,
    InternalError,
    Interrupted,
    ResourceError,
    Terminated,
    UsageError,
)
from cq.version import VERSION

if TYPE_CHECKING:
    from cq.core.checkpoint import Checkpoint

_current: contextvars.ContextVar[Terminal] = contextvars.ContextVar("terminal")

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write FILE; `-` streams to stdout."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard unfinished work of another command on FILE.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, metavar="N", help="Threads; default one per core.")
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        help="Memory for layers in flight, such as 8GiB; default half of what is free.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="cpu|auto|cuda[:N]",
        help="What rounds layers; auto is a GPU if torch has one.",
    ),
]
Streaming = Annotated[
    Literal["auto", "off", "minimal", "balanced", "aggressive"],
    typer.Option(
        "--streaming-mode", help="How finely layers are cut: off not at all, aggressive most."
    ),
]
QuipCheckpointed = Annotated[
    bool,
    typer.Option(
        "--quip-checkpointed",
        help="Round wide layers with a calibration in small portions of rows: less memory, the"
        " same integers.",
    ),
]
CheckpointedThreshold = Annotated[
    int | None,
    typer.Option(
        "--quip-checkpointed-threshold",
        min=1,
        metavar="N",
        help="Columns from which on a layer is wide; default 8192.",
    ),
]
CheckpointedSegments = Annotated[
    int | None,
    typer.Option(
        "--quip-checkpointed-segments",
        min=2,
        metavar="N",
        help="Portions of a wide layer; default 16.",
    ),
]
VramLimit = Annotated[
    str | None,
    typer.Option(
        "--vram-limit",
        metavar="SIZE",
        help="Memory of the GPU for layers in flight; default most of what is free.",
    ),
]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--engine", help="Where layers are computed: threads here, or a Ray cluster (RAY_ADDRESS)."
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size", metavar="SIZE", help="Write files of at most SIZE, such as 5GB."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop before writing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No talk and no progress on stderr.")]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Import a module or FILE.py that brings formats; repeatable.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show Python's traceback with an error.")]

# Options whose values are plug names, for completion without running Python.
PLUG_OPTIONS = {
    "--format": "formats",
    "--among": "formats",
    "--method": "methods",
    "--optimizer": "optimizers",
    "--quant-filter": "formats",
    "--family": "models",
}
FILE_OPTIONS = frozenset(
    {
        *("--output", "-o", "--against", "--plugin", "--recipe", "--report"),
        "--add-keys",
        *("--extract", "--from", "--map"),
        *("--calibration", "--calibration-lora"),
        *("--base", "--junit", "--images", "--contact-sheet", "--workflow", "--prompts"),
    }
)


def terminal() -> Terminal:
    """The terminal of the command that is running."""
    return _current.get()


def use_terminal(new: Terminal) -> contextvars.Token[Terminal]:
    """Make `new` the terminal of what runs from here on in this context."""
    return _current.set(new)


def command(
    app: typer.Typer, name: str, *, json: bool = True, cls: type[TyperCommand] | None = None
) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Register a function as the command `name`, guarded, with the options that all commands
    have; `cls` is what Typer makes of it, if that is not its own."""

    def decorate(function: Callable[..., int | None]) -> Callable[..., int]:
        added = {
            **({"json": Json} if json else {}),
            "plugin": Plugin,
            "quiet": Quiet,
            "debug": Debug,
        }

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> int:
            here = terminal()
            here.quiet = kwargs.pop("quiet")
            here.debug = kwargs.pop("debug") or bool(os.environ.get("CQ_DEBUG"))
            here.json = kwargs.pop("json", False)
            plugins: list[str] = kwargs.pop("plugin") or []

            def body() -> int | None:
                _check_directory()
                load_plugins(plugins)
                here.plugins = bool(plugins)
                return function(*args, **kwargs)

            return guard(here, body)

        signature = inspect.signature(function, eval_str=True)
        parameters = [
            inspect.Parameter(
                n,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if n == "plugin" else False,
                annotation=a,
            )
            for n, a in added.items()
        ]
        guarded.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *parameters]
        )
        guarded.__annotations__ = {**function.__annotations__, **added}
        app.command(name, cls=cls)(guarded)
        return guarded

    return decorate


def _check_directory() -> None:
    """Raises: ResourceError if the current directory was removed: no path counts from it any more,
    and libraries that torch loads end the process over it."""
    try:
        os.getcwd()  # noqa: PTH109 - it is asked for its failure
    except OSError as error:
        raise ResourceError(
            "the current directory does not exist any more",
            hint="change to one that does, such as `cd ~`",
            code="resource.directory",
        ) from error


def load_plugins(names: Iterable[str]) -> None:
    """Import the modules that `--plugin` names, so that the catalogue has their formats."""
    for name in names:
        from cq.layouts.kitchen import left_out
        from cq.layouts.plugin import load_plugin

        with left_out():  # commands store, they do not compute with what they have stored
            load_plugin(name)


def guard(here: Terminal, body: Callable[[], int | None]) -> int:
    """Run `body`; whatever it raises becomes one message on stderr and the exit code returned.

    It stands inside Typer, which would turn a broken pipe into exit 1, findings in our words.
    """
    try:
        return body() or 0
    except LostReader as error:
        here.abandon(here.stdout)
        return error.exit_code
    except BrokenPipeError:
        here.abandon(here.stdout)  # as in `cq plugins | head -1`: what was wanted was delivered
        return 0
    except KeyboardInterrupt as error:
        stopped = _stopped(error, Interrupted("interrupted"))
        here.error(stopped)
        return stopped.exit_code
    except Interrupted as error:
        stopped = _stopped(error.__cause__, error)
        here.error(stopped)
        return stopped.exit_code
    except UnwritableStdout as error:
        here.abandon(here.stdout)
        here.error(error)
        return error.exit_code
    except CqError as error:
        if here.debug:
            here.traceback()
        here.error(_reportable(error))
        return error.exit_code
    except MemoryError as error:
        if here.debug:
            here.traceback()
        failure = ResourceError(
            f"there is not enough memory: {error}",
            hint="lower `--workers` or `--memory-limit`",
            code="resource.memory",
        )
        here.error(failure)
        return failure.exit_code
    except Exception as error:  # the last guard: a bug must not look like a finding
        if here.debug:
            here.traceback()
        if asked_to_stop:
            stopped = _stopped(asked_to_stop[0], Interrupted("interrupted"))
            here.error(stopped)
            return stopped.exit_code
        bug = InternalError(f"{type(error).__name__}: {error}")
        here.error(_reportable(bug))
        return bug.exit_code


class Terminating(KeyboardInterrupt):
    """SIGTERM, as it comes to the code that is running: whatever Ctrl-C does, it does."""


asked_to_stop: list[KeyboardInterrupt] = []
"""What signals have raised in this process. Libraries make other exceptions of it: numpy, cut off
in its import, cannot be imported again."""


def _stopped(signal: BaseException | None, error: Interrupted) -> Interrupted:
    return Terminated("terminated", hint=error.hint) if isinstance(signal, Terminating) else error


def _reportable(error: CqError) -> CqError:
    if not isinstance(error, InternalError):
        return error
    return InternalError(
        f"this is a bug in cq {VERSION}: {error.message}",
        where=error.where,
        hint="run the command again with `--debug` and report what it prints to the authors of cq",
    )


def open_input(path: str | None, *, what: str = "MODEL", beside: str | None = None) -> Checkpoint:
    """Open a command's input: a path, `-`, or what is piped in if it was left out. No output may
    replace it, nor what is read `beside` it.

    Raises: UsageError rather than waiting for a person to type a checkpoint.
    """
    from cq.core.manifest import open_checkpoint, open_checkpoint_stream

    here = terminal()
    _reads(beside)
    if path is None:
        if not here.stdin_is_piped():
            raise UsageError(
                f"missing argument `{what}`",
                hint="name a file, or pipe a step of cq into this one",
                code="usage.missing",
            )
        path = "-"
    if path == "-":
        if here.stdin.isatty():
            raise UsageError(
                "stdin is a terminal, not a checkpoint", hint="name a file", code="usage.terminal"
            )
        named = here.stdin_path()
        if named is None:
            return open_checkpoint_stream(cast(TextIO, here.stdin).buffer)
        path = named
    _reads(path)
    return open_checkpoint(path)


def _reads(path: str | None) -> None:
    if path is not None:
        with suppress(OSError, ValueError):
            terminal().opened.append(os.stat(path))  # noqa: PTH116 - compared with the output


def parse_size(text: str | None) -> int | None:
    """Bytes in a size such as `8GiB`, `512MB` or `1.5G`.

    Raises: UsageError for anything else.

    >>> parse_size("8GiB"), parse_size("512MB"), parse_size(None)
    (8589934592, 512000000, None)
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(
            f"`{text}` is not a size", hint="write a number and a unit, such as `8GiB`"
        )
    number, prefix, binary = found.groups()
    if not prefix and "b" not in text.lower():
        raise UsageError(f"`{text}` has no unit", hint="write one, such as `8GiB` or `512MB`")
    base = 1024 if binary else 1000
    return int(float(number) * base ** " kmgt".index(prefix.lower() or " "))
