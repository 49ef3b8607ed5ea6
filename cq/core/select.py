"""Patterns over names: globs, and regular expressions after `re:`.

A glob must match the whole name (`double_blocks.*`); a regular expression may match anywhere in it
(`re:blocks\\.1\\.`). A pattern that matches nothing is an error that offers the nearest names.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from cq.core.errors import InputError, PlanError, UsageError


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches `pattern`.

    Raises: UsageError if what follows `re:` is not a regular expression.

    >>> matcher("double_blocks.*.qkv")("double_blocks.0.img_attn.qkv")
    True
    >>> matcher("re:blocks[.]1[.]")("blocks.10.mlp")
    False
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(
                f"`{pattern}` is not a regular expression: {error}", code="usage.pattern"
            ) from error
        return lambda name: expression.search(name) is not None
    glob = re.compile(fnmatch.translate(pattern))
    return lambda name: glob.match(name) is not None


def select(patterns: Sequence[str], names: Iterable[str], *, what: str) -> dict[str, str]:
    """Names that match, each with the first pattern that it matches.

    Raises: PlanError if a pattern matches none of `names`; `what` says what the names are.
    """
    candidates = list(names)
    tests = [(pattern, matcher(pattern)) for pattern in patterns]
    for pattern, test in tests:
        if not any(test(name) for name in candidates):
            raise PlanError(
                f"the pattern `{pattern}` matches no {what}",
                hint=nearest(pattern, candidates),
                code="plan.pattern",
            )
    chosen = {}
    for name in candidates:
        first = next((pattern for pattern, test in tests if test(name)), None)
        if first is not None:
            chosen[name] = first
    return chosen


def nearest(word: str, names: Iterable[str]) -> str | None:
    """A hint with the names nearest to `word`, or None if none is near."""
    plain = re.sub(r"[*?\\^$]|^re:", "", word)
    candidates = list(names)
    near = difflib.get_close_matches(plain, candidates[:5000], n=3, cutoff=0.5)
    for length in range(len(plain), min(3, len(plain)), -1):
        near = near or [name for name in candidates if plain[:length] in name][:3]
    return "did you mean " + ", ".join(f"`{n}`" for n in near) + "?" if near else None


def refuse_unknown(found: Iterable[str], known: Iterable[str], what: str) -> None:
    """Check the keys of a stage's arguments.

    Raises: InputError with near names for one that `what` does not have.
    """
    listed = list(known)
    for key in found:
        if key not in listed:
            raise InputError(
                f"{what} has no argument `{key}`",
                hint=nearest(key, listed) or "it has " + ", ".join(f"`{k}`" for k in listed),
                code="input.manifest",
            )
