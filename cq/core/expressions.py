"""Regular expressions of users, which end.

Owns that no expression holds a command up: some are tried for years, such as `(a|aa)+$` on sixty
letters, and Python's own `re` cannot be told to stop. The library `regex` can; it is imported when
the first expression is used, not where only cq's own are. It writes repeats out that stand within
repeats, which would take all memory, so that such expressions are refused by their size. What
replaces a match is read by its rules, which know a few more escapes.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from cq.core.errors import UsageError
from cq.core.text import printable

_SECONDS = 3.0  # for all names together, of those that take long
_QUICK = 1e-3  # for one; 4 microseconds are usual
# A brace that repeats nothing stands for itself in Python, and for something fuzzy in `regex`.
_UNBOUNDED = 1 << 31
_LONE_BRACE = re.compile(r"(\\N\{[^}]*\}|\\.)|\{(?!\d*(?:,\d*)?\})", re.DOTALL)
_LARGEST = 100_000  # steps, were all repeats written out
_T = TypeVar("_T")


def check(text: str) -> re.Pattern[str]:
    """`text`, the expression itself, as Python compiles it. Raises: UsageError if it is none."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise _refused(text, str(error)) from error


class Expression:
    """An expression that a user has written, without the `re:` before it.

    Raises: UsageError if it is none; its methods, if it takes seconds.
    """

    def __init__(self, text: str) -> None:
        check(text)  # Python's syntax, and its words for what is wrong with it
        import regex

        self._text = text
        try:
            if _written_out(_parsed(text)) > _LARGEST:
                raise _refused(text, "its repeats within repeats are too many")
            self._compiled = regex.compile(_LONE_BRACE.sub(lambda found: found[1] or r"\{", text))
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise _refused(text, str(error) or "it is too large") from error
        self._left = _SECONDS

    def is_in(self, name: str) -> bool:
        """Whether it matches anywhere in `name`."""
        return (
            self._in_time(name, lambda left: self._compiled.search(name, timeout=left)) is not None
        )

    def replaced(self, instead: str, name: str) -> str:
        """`name` with `instead` for whatever it matches there; `\\\\1` stands for its first group.

        Raises: UsageError also for a group that it does not have.
        """
        import regex

        try:
            return self._in_time(name, lambda left: self._compiled.sub(instead, name, timeout=left))
        except (regex.error, IndexError) as error:
            raise UsageError(
                f"`{printable(instead)}` cannot stand for what `re:{printable(self._text)}`"
                f" matches: {error}",
                hint="`\\1` stands for the first group of the expression",
                code="usage.pattern",
            ) from error

    def _in_time(self, name: str, work: Callable[[float], _T]) -> _T:
        began = time.monotonic()
        try:
            return work(max(self._left, 0.01))
        except TimeoutError as error:
            raise UsageError(
                f"`re:{printable(self._text)}` takes too long on `{printable(name, 80)}`",
                hint="write it so that it can match a name in one way only, such as `a+` in place"
                " of `(a|aa)+`",
                code="usage.pattern",
            ) from error
        finally:
            taken = time.monotonic() - began
            self._left -= taken if taken > _QUICK else 0


def _parsed(text: str) -> Any:
    """What Python's parser makes of an expression that it compiles: steps, some with more in them.

    Source: CPython's `re/_parser.py`, class `SubPattern`.
    """
    return importlib.import_module("re._parser").parse(text)


def _written_out(steps: Any) -> int:
    """How many steps there are if every repeat is written out as often as it may or must come."""
    count = 0
    for kind, given in steps:
        if str(kind).endswith("_REPEAT"):
            least, most, inner = given
            count += max(1, least if most >= _UNBOUNDED else most) * _written_out(inner)
        else:
            count += 1 + sum(_written_out(inner) for inner in _within(given))
    return count


def _within(given: Any) -> Iterator[Any]:
    """The steps that stand in what a step is given: those of groups, alternatives, conditions."""
    if hasattr(given, "state"):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _within(one)


def _refused(text: str, why: str) -> UsageError:
    return UsageError(f"`re:{text}` is not a regular expression: {why}", code="usage.pattern")
