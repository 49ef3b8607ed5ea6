"""Adapter files and their strengths, from a person's words or from a manifest.

Owns the word `path:strength`, and that every strength is a finite number. Opens headers, computes
nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cq.core import select
from cq.core.errors import InputError, UsageError
from cq.core.source import FINGERPRINT, Source, check_fingerprint, open_source
from cq.core.text import printable

_KEYS = ("path", "strength", *FINGERPRINT)

AdapterWord = str | os.PathLike[str]
"""A path, or as a string `path:strength`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter file that is open, its strength, and the fingerprint that it was opened with."""

    path: str
    strength: float
    fingerprint: Mapping[str, Any] = field(hash=False)
    source: Source = field(compare=False, repr=False)


def parse_adapter(text: str) -> tuple[str, float]:
    """The path and strength in `path:strength`; a path alone has strength 1.

    Raises: UsageError if the strength is not a finite number.

    >>> parse_adapter("style.safetensors:-0.5")
    ('style.safetensors', -0.5)
    >>> parse_adapter("style.safetensors")
    ('style.safetensors', 1.0)
    """
    path, colon, word = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return text, 1.0
    try:
        strength = float(word)
    except ValueError:
        if not Path(path).exists():
            return text, 1.0
        raise UsageError(
            f"`{word}` is not a strength for `{path}`",
            hint=f"write a number after the colon, as in `{path}:0.8`",
            code="usage.strength",
        ) from None
    return path, finite(strength, f"the strength of `{path}`")


def wanted(adapter: AdapterWord | tuple[AdapterWord, float]) -> tuple[str, float]:
    """Path and strength of an adapter in any form that `merge` takes. Raises: UsageError."""
    if isinstance(adapter, str):
        return parse_adapter(adapter)
    if isinstance(adapter, os.PathLike):
        return os.fspath(adapter), 1.0
    if not isinstance(adapter, tuple) or len(adapter) != 2:
        raise UsageError(
            f"`{adapter!r}` is not an adapter",
            hint="give a path, `path:strength`, or a pair of path and strength",
        )
    path, strength = adapter
    return os.fspath(path), finite(strength, f"the strength of `{os.fspath(path)}`")


def finite(value: float, what: str) -> float:
    """`value` as a float. Raises: UsageError if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(
            f"{what} cannot be `{value}`", hint="it is a finite number", code="usage.strength"
        )
    return float(value)


def opened(path: str, strength: float, expected: Mapping[str, Any] | None = None) -> AdapterFile:
    """The adapter at `path`. Raises: InputError; PlanError if it is not as `expected`."""
    source = open_source(path)
    if expected:
        check_fingerprint(source, expected)
    return AdapterFile(
        path=os.path.abspath(source.path),
        strength=strength,
        fingerprint=source.fingerprint(),
        source=source,
    )


def from_manifest(entry: Any) -> AdapterFile:
    """The adapter that an entry of the merge stage names. Raises: as `opened`, or InputError."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ill_typed("adapters", entry)
    select.refuse_unknown(entry, _KEYS, "an adapter of the merge stage")
    return opened(
        entry["path"],
        number(entry, "strength"),
        {key: entry[key] for key in FINGERPRINT if key in entry},
    )


def number(values: Mapping[str, Any], key: str) -> float:
    """The argument `key`, 1 if it is not there. Raises: InputError if it is not finite."""
    value = values.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ill_typed(key, value)
    return float(value)


def ill_typed(key: str, value: Any) -> InputError:
    """The error for an argument of the merge stage that cannot be used."""
    return InputError(
        f"the merge stage's argument `{key}` cannot be `{printable(repr(value))}`",
        code="input.manifest",
    )
