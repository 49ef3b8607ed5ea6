"""The plug table: names without imports, one import on use.

A plug is a module with a `PLUG` object, or a TOML file; its file name is its name. A *home* is a
package whose files are the plugs of one kind (entry-point group `cq.homes`, name = kind); entry
points in `cq.<kind>` add plugs from anywhere, such as third parties. Owns discovery only: what a
plug must offer is said by the Protocol of its kind.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from cq.core.errors import PlanError

KINDS = ("formats", "optimizers", "adapters", "methods", "models", "stages", "checks", "commands")

_registered: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


@cache
def _all_entry_points() -> Any:
    return metadata.entry_points()  # looks into every installed package, so once


def entry_points(*, group: str) -> metadata.EntryPoints:
    """The entry points of a group."""
    found: metadata.EntryPoints = _all_entry_points().select(group=group)
    return found


@cache
def _found(kind: str) -> dict[str, tuple[str, EntryPoint | None]]:
    # name -> (where it lies, entry point or None for a file of a home)
    found: dict[str, tuple[str, EntryPoint | None]] = {}
    for name, place, entry in (*_in_homes(kind), *_entries(kind)):
        if name in found and found[name][0] != place:
            raise PlanError(
                f"two plugs are named `{name}`: `{found[name][0]}` and `{place}`",
                hint="uninstall one of the packages that offer them",
                code="plan.plug_twice",
            )
        found[name] = (place, entry)
    return dict(sorted(found.items()))


def _in_homes(kind: str) -> Iterator[tuple[str, str, None]]:
    for home in entry_points(group="cq.homes"):
        if home.name != kind:
            continue
        try:
            package = importlib.import_module(home.value)
        except ImportError as error:
            raise PlanError(
                f"the home of {kind} `{home.value}` cannot be imported: {error}",
                hint="update or uninstall the package that offers it",
                code="plan.plug_broken",
            ) from error
        for directory in filter(os.path.isdir, package.__path__):
            for path in sorted(Path(directory).iterdir()):
                if path.suffix in {".py", ".toml"} and not path.stem.startswith("_"):
                    place = f"{home.value}.{path.stem}" if path.suffix == ".py" else str(path)
                    yield path.stem, place, None


def _entries(kind: str) -> Iterator[tuple[str, str, EntryPoint]]:
    for entry in entry_points(group=f"cq.{kind}"):
        yield entry.name, entry.value, entry


def names(kind: str) -> tuple[str, ...]:
    """The names of all plugs of `kind`, sorted; nothing is imported but their packages."""
    return tuple(sorted({*_found(kind), *_registered[kind]}))


def origin(kind: str, name: str) -> str:
    """Where the plug lies: a module path, or a file."""
    if name in _registered[kind]:
        return type(_registered[kind][name]).__module__
    return _found(kind)[name][0]


def load(kind: str, name: str) -> Any:
    """The plug `name` of `kind`.

    Raises: PlanError with near names if there is none, or if importing it fails.
    """
    if name in _registered[kind]:
        return _registered[kind][name]
    if name not in _found(kind):
        check(kind, name)
    place, entry = _found(kind)[name]
    try:
        if entry is not None and ":" in entry.value:
            found = entry.load()
            # What is a plug only with something around it, such as a layout, says so by `as_plug`.
            return found.as_plug() if hasattr(found, "as_plug") else found
        if place.endswith(".toml"):
            return tomllib.loads(Path(place).read_text(encoding="utf-8"))
        return importlib.import_module(place).PLUG
    except (ImportError, AttributeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(
            f"the plug `{name}` (`{place}`) cannot be loaded: {error}",
            hint="update or uninstall the package that offers it",
            code="plan.plug_broken",
        ) from error


def check(kind: str, name: str) -> None:
    """See that there is a plug `name` of `kind`. Raises: PlanError with near names if not."""
    found = names(kind)
    if name not in found:
        near = _near(name, found)
        singular = kind.removesuffix("s")
        raise PlanError(
            f"there is no {singular} `{name}`",
            hint=(
                f"did you mean {' or '.join(f'`{n}`' for n in near)}?"
                if near
                else f"there are: {', '.join(f'`{n}`' for n in found) or 'none'}"
            ),
            code=f"plan.no_{singular}",
        )


def _near(word: str, found: Iterable[str]) -> list[str]:
    """The names that `word` may mean: those that contain it, as people shorten them, or that are
    spelt alike."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower().replace("float", "fp"))

    known = {name: plain(name) for name in found}
    holding = [n for n, text in known.items() if plain(word) and plain(word) in text]
    holding.sort(key=lambda n: not known[n].startswith(plain(word)))
    return holding[:4] or difflib.get_close_matches(word.lower(), known, n=3)


def register(kind: str, name: str, plug: Any) -> None:
    """Add a plug of this process, such as one that `--plugin` brought.

    Raises: PlanError if another plug has the name.
    """
    if name in _found(kind) or _registered[kind].get(name, plug) is not plug:
        raise PlanError(
            f"there is a {kind.removesuffix('s')} `{name}` already",
            hint="give yours another name",
            code="plan.plug_twice",
        )
    _registered[kind][name] = plug
