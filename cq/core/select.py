"""Patterns over names: globs, and regular expressions after `re:`.

A glob must match the whole name (`double_blocks.*`); a regular expression may match anywhere in it
(`re:blocks\\.1\\.`). A pattern that matches nothing is an error that offers the nearest names.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from cq.core.errors import InputError, PlanError
from cq.core.expressions import Expression, check


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches `pattern`.

    Raises: UsageError if what follows `re:` is not a regular expression, and so does the test if it
    takes seconds.

    >>> matcher("double_blocks.*.qkv")("double_blocks.0.img_attn.qkv")
    True
    >>> matcher("re:blocks[.]1[.]")("blocks.10.mlp")
    False
    """
    if pattern.startswith("re:"):
        return Expression(pattern[3:]).is_in
    glob = re.compile(fnmatch.translate(pattern))
    return lambda name: glob.match(name) is not None


def any_matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name matches one of `patterns`, all of them tried at once: patterns of cq's own,
    which are trusted to end.

    Raises: UsageError if what follows `re:` is not a regular expression.

    >>> any_matcher(["img_in", "re:^out[.]", "re:norm$"])("out.2")
    True
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            check(pattern[3:])
    globs = [fnmatch.translate(p) for p in patterns if not p.startswith("re:")]
    whole = re.compile("|".join(globs) or "(?!)").match
    anywhere = re.compile(
        "|".join(f"(?:{p[3:]})" for p in patterns if p.startswith("re:")) or "(?!)"
    ).search
    return lambda name: anywhere(name) is not None or whole(name) is not None


def select(patterns: Sequence[str], names: Iterable[str], *, what: str) -> dict[str, str]:
    """Names that match, each with the first pattern that it matches.

    Raises: PlanError if a pattern matches none of `names`; `what` says what the names are.
    """
    candidates = list(names)
    chosen = first_matches(patterns, candidates)
    busy, there = set(chosen.values()), set(candidates)
    for pattern in patterns:
        if pattern in busy or pattern in there:
            continue
        if not any(map(matcher(pattern), candidates)):
            raise PlanError(
                f"the pattern `{pattern}` matches no {what}",
                hint=nearest(pattern, candidates),
                code="plan.pattern",
            )
    return chosen


def first_matches(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Names that match, each with the first pattern that it matches; a pattern may match none.

    >>> first_matches(["b.*", "*"], ["a.0", "b.1"])
    {'a.0': '*', 'b.1': 'b.*'}
    """
    # A recipe may name thousands of layers in full: those are looked up, not tried on all others.
    exact = {name: i for i, name in reversed([*enumerate(patterns)]) if _is_name(name)}
    tests = {i: matcher(pattern) for i, pattern in enumerate(patterns) if pattern not in exact}
    chosen = {}
    for name in names:
        last = exact.get(name, len(patterns))
        first = next((i for i, test in tests.items() if i < last and test(name)), last)
        if first < len(patterns):
            chosen[name] = patterns[first]
    return chosen


def _is_name(pattern: str) -> bool:
    return not pattern.startswith("re:") and not any(sign in pattern for sign in "*?[")


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
