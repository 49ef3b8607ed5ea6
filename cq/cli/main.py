"""The root of `cq`: finds commands, runs one, and ends with a documented exit code."""

from __future__ import annotations

import _thread
import gc
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from cq.cli import options
from cq.cli.options import Terminating, guard, use_terminal
from cq.cli.output import Terminal
from cq.core import catalog
from cq.core.engine import memory
from cq.core.errors import CqError, Interrupted, Terminated, UsageError
from cq.version import VERSION

_AGAIN_SECONDS = 0.02
_GARBAGE_OBJECTS = 1_000_000
_HELP = """Quantize diffusion-model checkpoints so that ComfyUI loads them natively.

\b
  cq merge flux.safetensors style.safetensors:0.8 | cq quant -o out.safetensors
  cq quant flux.safetensors -o flux-int8.safetensors
  cq verify flux-int8.safetensors --against flux.safetensors --min-sqnr 28

\b
Exit codes: 0 done, 1 findings, 2 usage, 3 input unreadable or invalid, 4 cannot plan,
5 resources, 70 a bug, 130 interrupted, 141 lost the reader of bytes, 143 terminated.
"""


def make_app() -> typer.Typer:
    """The command tree, with every command that is installed."""
    app = typer.Typer(
        name="cq",
        help=_HELP,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    ) -> int | None:
        if version:
            typer.echo(f"cq {VERSION}")
            raise typer.Exit
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())
            raise typer.Exit(2)
        return None

    for name in catalog.names("commands"):
        try:
            register = catalog.load("commands", name)
        except CqError as error:  # one broken plug must not take the others down
            options.terminal().say(f"warning: {error.message}; {error.hint}")
        else:
            register(app)
    return app


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Run one command line on `terminal` and return its exit code."""
    token = use_terminal(terminal)
    terminal.json = "--json" in argv  # for errors before the command's own options are read
    try:
        return guard(terminal, lambda: _dispatch(list(argv)))
    finally:
        token.var.reset(token)


def _dispatch(argv: list[str]) -> int:
    app = make_app()
    try:
        result = app(args=argv, prog_name="cq", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Typer's usage errors, told by their shape: its vendored click is private.
        if not hasattr(error, "format_message"):
            raise
        raise _usage(error) from error
    return result if isinstance(result, int) else 0


def _usage(error: Any) -> UsageError:
    message: str = error.format_message()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "cq"
    near: list[str] = list(getattr(error, "possibilities", None) or [])
    import difflib

    unknown = getattr(error, "option_name", None)
    wanted = re.search(r"requires (an|\d+) argument", message)
    if unknown and wanted:
        what = "a value" if wanted[1] == "an" else f"{wanted[1]} values"
        message = f"the option `{unknown}` needs {what}"
    elif unknown:
        message = f"`{path}` has no option `{unknown}`"
    elif message.startswith("No such command"):
        word = message.split("'")[1]
        message = f"`cq` has no command `{word}`"
        known = [name for name in catalog.names("commands") if name != word]
        near = difflib.get_close_matches(word, known, n=3)
    else:
        message = message[:1].lower() + message[1:].rstrip(".").replace("'", "`")
    hint = f"see `{path} --help`"
    if "unexpected extra argument" in message:
        hint = (
            "one input at a time, an output after `-o`, patterns and names with spaces in quotes; "
            + hint
        )
    if near:
        hint = "did you mean " + " or ".join(f"`{n}`" for n in near) + "?"
    return UsageError(message, hint=hint)


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Ctrl-C comes again, shortly after it came where no exception can leave.

    Python drops what is raised in a callback of its import locks or in a finalizer, and prints a
    traceback: the work would go on as if nobody had asked it to stop.
    """
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGTERM if issubclass(lost.exc_type, Terminating) else signal.SIGINT
    again = threading.Timer(_AGAIN_SECONDS, _interrupt_main, (number,))
    again.daemon = True
    again.start()


def _interrupt_main(number: signal.Signals) -> None:
    if hasattr(signal, "pthread_kill"):  # wakes it up from a wait, too
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(number)


def _stop(number: int, _: object) -> None:
    error = Terminating() if number == signal.SIGTERM else KeyboardInterrupt()
    options.asked_to_stop.append(error)
    raise error


def main() -> None:
    """The console script."""
    memory.keep_freed()
    # A header of many tensors is a million objects without a cycle among them; looking for cycles
    # at Python's own rate takes longer than reading it.
    gc.set_threshold(_GARBAGE_OBJECTS)
    sys.unraisablehook = _unraisable
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # What was ignored stays so: whoever started us wants it.
            if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
                signal.signal(number, _stop)
        code = run(sys.argv[1:], Terminal())
        # The work is over; what libraries do at exit would trip over a late Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except Terminating:
        code = Terminated.exit_code
    except KeyboardInterrupt:  # between two lines of ours, outside the guard
        code = Interrupted.exit_code
    sys.exit(code)
