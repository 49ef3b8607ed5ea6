"""Adapter files and their strengths, from a person's words or from a manifest.

Owns the word `path:strength`, that every strength is a finite number, and which file beside an
adapter is read with it. Opens headers, computes nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cq.core import select
from cq.core.errors import InputError, UsageError
from cq.core.source import FINGERPRINT, Source, check_fingerprint, open_source
from cq.core.text import printable
from cq_merge.contents import Contents, peft_config
from cq_merge.conversions import contents

_KEYS = ("path", "strength", "config", *FINGERPRINT)
_PEFT_STEM = "adapter_model"  # as PEFT names what stands beside its `adapter_config.json`
_PEFT_CONFIG = "adapter_config.json"
_LARGEST_CONFIG = 1 << 20
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)")

AdapterWord = str | os.PathLike[str]
"""A path, or as a string `path:strength`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter file that is open, its strength, and the fingerprint that it was opened with."""

    path: str
    strength: float
    fingerprint: Mapping[str, Any] = field(hash=False)
    contents: Contents = field(compare=False, repr=False)

    def to_manifest(self) -> dict[str, Any]:
        """The file as a manifest names it."""
        config = {"config": dict(self.contents.config)} if self.contents.config else {}
        return {"path": self.path, "strength": self.strength, **config, **self.fingerprint}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint from which differences of whole models are taken."""

    path: str
    fingerprint: Mapping[str, Any] = field(hash=False)
    source: Source = field(compare=False, repr=False)

    def to_manifest(self) -> dict[str, Any]:
        """The file as a manifest names it."""
        return {"path": self.path, **self.fingerprint}


def parse_adapter(text: str) -> tuple[str, float]:
    """The path and strength in `path:strength`; a path alone has strength 1.

    Raises: UsageError if the strength is not a finite number.

    >>> parse_adapter("style.safetensors:-0.5")
    ('style.safetensors', -0.5)
    >>> parse_adapter("style.safetensors")
    ('style.safetensors', 1.0)
    """
    path, colon, word = text.rpartition(":")
    if Path(text).exists():
        return text, 1.0
    if not path and _NUMBER.fullmatch(word):
        raise UsageError(
            f"`{text}` is no adapter",
            hint="a strength is written behind the adapter's name, as in `style.safetensors:0.8`",
            code="usage.strength",
        )
    if not colon or not path:
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


def opened(path: str, strength: float) -> AdapterFile:
    """The adapter at `path`, with what a PEFT configuration beside it says. Raises: InputError."""
    source = _opened(path)
    return _file(source, strength, _config_beside(source.path))


def opened_origin(path: str | os.PathLike[str]) -> Origin:
    """The checkpoint at `path`. Raises: InputError."""
    source = _opened(path)
    return Origin(
        path=os.path.abspath(source.path), fingerprint=source.fingerprint(), source=source
    )


def _opened(path: str | os.PathLike[str]) -> Source:
    """The file at `path`. Raises: InputError, which says more of what only BASE can be."""
    try:
        return open_source(path)
    except InputError as error:
        if os.fspath(path) == "-":
            error.hint = "`-` can stand for BASE alone"
        elif error.code == "input.header" and _is_json(path):
            error.hint = "only BASE can be a manifest: write its result first, with"
            error.hint += " `cq run MANIFEST -o FILE`"
        raise


def _is_json(path: str | os.PathLike[str]) -> bool:
    with suppress(OSError), Path(path).open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")
    return False


def from_manifest(entry: Any) -> AdapterFile:
    """The adapter that an entry of the merge stage names.

    Raises: InputError if it is none, PlanError if the file has changed since.
    """
    _check(entry, "adapters", _KEYS)
    strength, config = number(entry, "strength"), entry.get("config", {})
    if not isinstance(config, dict):
        raise ill_typed("config", config)
    return _file(_source(entry), strength, config)


def origin_from_manifest(entry: Any) -> Origin:
    """The origin that the merge stage names. Raises: as `from_manifest`."""
    _check(entry, "origin", ("path", *FINGERPRINT))
    source = _source(entry)
    return Origin(
        path=os.path.abspath(source.path), fingerprint=source.fingerprint(), source=source
    )


def _check(entry: Any, what: str, keys: tuple[str, ...]) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ill_typed(what, entry)
    select.refuse_unknown(entry, keys, f"`{what}` of the merge stage")


def _source(entry: Mapping[str, Any]) -> Source:
    source = open_source(entry["path"])
    expected = {key: entry[key] for key in FINGERPRINT if key in entry}
    if expected:
        check_fingerprint(source, expected)
    return source


def _file(source: Source, strength: float, config: Mapping[str, Any]) -> AdapterFile:
    return AdapterFile(
        path=os.path.abspath(source.path),
        strength=strength,
        fingerprint=source.fingerprint(),
        contents=contents(source, config),
    )


def _config_beside(path: Path) -> Mapping[str, Any]:
    if not path.name.startswith(_PEFT_STEM):
        return {}
    beside = path.with_name(_PEFT_CONFIG)
    try:
        if beside.stat().st_size > _LARGEST_CONFIG:
            return {}
        return peft_config(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def number(values: Mapping[str, Any], key: str) -> float:
    """The argument `key`, 1 if it is not there. Raises: InputError if it is not finite."""
    value = values.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ill_typed(key, value)
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """The argument `key`. Raises: InputError if it is not a truth value."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ill_typed(key, value)
    return value


def texts(values: Mapping[str, Any], key: str) -> Mapping[str, str]:
    """The argument `key`, names by name. Raises: InputError if it is anything else."""
    value = values.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ill_typed(key, value)
    return value


def ill_typed(key: str, value: Any) -> InputError:
    """The error for an argument of the merge stage that cannot be used."""
    return InputError(
        f"the merge stage's argument `{key}` cannot be `{printable(repr(value))}`",
        code="input.manifest",
    )
