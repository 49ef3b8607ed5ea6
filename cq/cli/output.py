"""Terminal: the two streams, and everything that is put on them.

Data goes to stdout, talk goes to stderr. Owns tables, progress and sizes as people read them; rich
is imported when something is drawn. No other module writes to a stream.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

import orjson

from cq.core.errors import CqError
from cq.core.text import as_text

if TYPE_CHECKING:
    from rich.console import Console

    from cq.core.engine.local import Progress

_LINE_SECONDS = 30.0
_SMALL_NBYTES = 50e6  # done before anybody has read a line, unless it takes long after all


class LostReader(CqError):
    """Whoever read the bytes from stdout went away before they were all delivered."""

    exit_code = 141
    default_code = "lost_reader"


class UnwritableStdout(CqError):
    """Stdout takes no more, as on a full disk."""

    exit_code = 5
    default_code = "resource.stdout"


_LEAST_TEXT = 16  # characters of a last column whose text is wrapped


@dataclass(slots=True)
class Terminal:
    """Where a command reads and writes. Tests pass one of their own."""

    stdin: IO[Any] = field(default_factory=lambda: sys.stdin or _nowhere("r"))
    stdout: IO[Any] = field(default_factory=lambda: sys.stdout or _nowhere("w"))
    stderr: IO[Any] = field(default_factory=lambda: sys.stderr or _nowhere("w"))
    quiet: bool = False
    json: bool = False
    debug: bool = False
    opened: list[os.stat_result] = field(default_factory=list)
    """The files that were opened as inputs, which no output may replace."""
    plugins: bool = False
    """Whether modules were brought by `--plugin`, of which other processes know nothing."""

    @property
    def is_tty(self) -> bool:
        """Whether a person reads stdout."""
        return self.stdout.isatty()

    def stdin_is_piped(self) -> bool:
        """Whether stdin is a pipe or a file, so that reading it does not wait for a person.

        Merely not being a terminal is not enough: under cron stdin is /dev/null.
        """
        try:
            mode = os.fstat(self.stdin.fileno()).st_mode
        except (OSError, ValueError, AttributeError):
            return False
        return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)

    def stdin_path(self) -> str | None:
        """The file that stdin was redirected from (`< file`), where the system tells."""
        try:
            found = os.fstat(self.stdin.fileno())
            path = os.path.realpath(f"/proc/self/fd/{self.stdin.fileno()}")
            if stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.stat(path)):  # noqa: PTH116
                return path
        except (OSError, ValueError, AttributeError):
            pass
        return None

    def data(self, text: str) -> None:
        """One document or line on stdout. File names need not be text; what is shown of them is."""
        try:
            self.stdout.write(as_text(text) + "\n")
            self.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UnwritableStdout(
                f"cannot write to stdout: {(error.strerror or str(error)).lower()}"
            ) from error

    def document(self, value: Any) -> None:
        """One JSON document on stdout: a single line in a pipe, indented for a person."""
        option = orjson.OPT_INDENT_2 if self.is_tty else 0
        try:
            text = orjson.dumps(value, option=option).decode()
        except TypeError:  # a file name that is not UTF-8, which only escapes can say
            text = json.dumps(value, indent=2 if self.is_tty else None)
        self.data(text)

    def byte_stream(self) -> IO[bytes]:
        """Stdout for bytes."""
        return cast(TextIO, self.stdout).buffer

    def say(self, text: str) -> None:
        """One line of talk on stderr, unless `-q`."""
        if not self.quiet and not self.json:
            self._complain(text)

    def _complain(self, text: str) -> None:
        try:
            self.stderr.write(text + "\n")
            self.stderr.flush()
        except (OSError, ValueError):  # nobody listens any more; the exit code still speaks
            self.abandon(self.stderr)

    def abandon(self, stream: IO[Any]) -> None:
        """Send what is left in `stream` nowhere, or Python would fail over it once more at exit."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except (OSError, ValueError, AttributeError):
            return

    def error(self, error: CqError) -> None:
        """The one rendering of errors."""
        if self.json:
            self._complain(orjson.dumps(error.to_dict()).decode())
            return
        self._complain(f"error: {error.message}")
        if error.hint:
            self._complain(f"\nhint: {error.hint}")

    def traceback(self) -> None:
        """Python's traceback of the exception being handled, for `--debug`."""
        import traceback

        self._complain(traceback.format_exc())

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table on stdout: drawn for a person, plain aligned text in a pipe.

        In a pipe rich's start-up would be half of the command's time. A column whose name ends in
        `>` is aligned right.
        """
        right = [column.endswith(">") for column in columns]
        names = [column.rstrip(">") for column in columns]
        if not self.is_tty:
            for line in _aligned([names, *rows], right):
                self.data(line)
            return
        from rich.table import Table
        from rich.text import Text

        console, held = self._console(self.stdout), [list(row) for row in rows]
        kept, fits = _fitting([names, *held], right, console.width)
        drawn = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
        for at in kept:
            drawn.add_column(
                names[at].replace(" ", "\n") if right[at] else names[at],
                justify="right" if right[at] else "left",
                no_wrap=right[at] or (fits and at < len(names) - 1),
                overflow="fold",
            )
        for row in held:
            drawn.add_row(*(Text(row[at]) for at in kept))
        console.print(drawn)
        self.stdout.flush()
        if len(kept) < len(names):
            left = ", ".join(name for at, name in enumerate(names) if at not in kept)
            self.say(f"the terminal is too narrow for: {left}")

    def _console(self, stream: IO[Any]) -> Console:
        from rich.console import Console

        return Console(file=stream, highlight=False)

    def progress(self, what: str) -> ProgressReport:
        """Progress on stderr: a bar for a person, else a line each 10 % or 30 seconds, none with
        -q."""
        if self.quiet or self.json:
            return ProgressReport(None, None)
        if self.stderr.isatty() and os.environ.get("TERM") != "dumb":
            return ProgressReport(_Bar(self._console(self.stderr), what), None)
        return ProgressReport(None, _Lines(self.say, what))


def _fitting(
    rows: Sequence[Sequence[str]], right: Sequence[bool], width: int
) -> tuple[list[int], bool]:
    """The columns that a terminal of `width` has room for: of those aligned right the last are left
    out until the others fit; and whether they do. What stands in the last column may be wrapped."""
    names, *cells = rows
    needs = []
    for at, (name, on_the_right) in enumerate(zip(names, right, strict=True)):
        words = max(map(len, name.split(" "))) if on_the_right else len(name)
        need = max([words, *(len(row[at]) for row in cells)])
        needs.append(need if on_the_right or at < len(names) - 1 else min(need, _LEAST_TEXT))
    kept = list(range(len(names)))
    numbers = [at for at in kept if right[at]]

    def fits() -> bool:
        return sum(needs[at] + 2 for at in kept) - 2 <= width

    while len(numbers) > 1 and not fits():
        kept.remove(numbers.pop())
    return kept, fits()


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> Iterator[str]:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if on_the_right else cell.ljust(width)
            for cell, width, on_the_right in zip(row, widths, right, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _nowhere(mode: str) -> IO[Any]:
    # Python has no stream at all where the shell has closed one (`2>&-`).
    return open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123 - lives as long as we


class ProgressReport:
    """A context within which `on_progress` events are shown."""

    def __init__(self, bar: _Bar | None, lines: _Lines | None) -> None:
        self._bar, self._lines = bar, lines

    def __enter__(self) -> ProgressReport:
        return self

    def on_progress(self, event: Progress) -> None:
        """Show `event`; called from any worker, one at a time."""
        if self._bar is not None:
            self._bar.show(event)
        if self._lines is not None:
            self._lines.show(event)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class _Bar:
    def __init__(self, console: Console, what: str) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import (
            Progress as RichProgress,
        )

        self._drawn = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._drawn.add_task(what, total=None)
        self._drawn.start()

    def show(self, event: Progress) -> None:
        self._drawn.update(self._task, completed=event.done, total=event.total)

    def close(self) -> None:
        self._drawn.stop()


class _Lines:
    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what = say, what
        self._tenth = 0
        self._at = time.monotonic()

    def show(self, event: Progress) -> None:
        tenth = 10 * event.done // max(1, event.total)
        now = time.monotonic()
        if (tenth > self._tenth and event.total > _SMALL_NBYTES) or now - self._at > _LINE_SECONDS:
            self._tenth, self._at = tenth, now
            self._say(
                f"{self._what}: {100 * event.done // max(1, event.total)} %"
                f" ({size(event.done)} of {size(event.total)})"
            )


def size(nbytes: float) -> str:
    """A size as people read it, in powers of 1000 as file managers and shops count.

    >>> size(23_802_932_552), size(512)
    ('23.80 GB', '512 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
