"""Writes the key `tensors` of the families' files: the tensors of their skeletons, see
`cq.core.roster`.

Run by hand after a skeleton or a family is added: `.venv/bin/python docs/family_tensors.py`. A test
holds the files against what this makes.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from cq.core import families
from cq.core.dtypes import TensorSpec
from cq.core.roster import Numbers, place

ROOT = Path(__file__).resolve().parent.parent
SKELETONS = ROOT / "tests" / "skeletons"
MODELS = ROOT / "cq" / "core" / "models"
_KEY = re.compile(r"^(?:layers|tensors) = '''\n.*?'''\n", re.MULTILINE | re.DOTALL)
# Tensors of one release: those of each kind, by its numbers; a kind is a name and what it is there.
Kind = tuple[str, str]
Release = dict[Kind, set[Numbers]]


@cache
def releases() -> dict[str, dict[str, Release]]:
    """The tensors of every release by family and variant; skeletons of one variant are equal."""
    found: dict[str, dict[str, Release]] = {name: {} for name in families.names()}
    for path in sorted(SKELETONS.glob("*.json.gz")):
        tensors = json.loads(gzip.decompress(path.read_bytes()))
        specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
        match = families.detect(specs).match
        assert match is not None and match.variant is not None, path.name
        own: Release = defaultdict(set)
        for name, spec in specs.items():
            layer, _, local = name.rpartition(".")
            if local not in {"weight", "bias"}:
                layer, local = name, ""
            elif local == "weight" and len(spec.shape) >= 2:
                local = "matrix"
            kind, numbers = place(layer)
            own[kind, local].add(numbers)
        known = found[match.family.name].setdefault(match.variant, own)
        assert known == own, path.name
    return found


def counts(release: Release) -> dict[str, int]:
    """How many blocks each list of a release has: those of which some kind is in every block."""
    blocks: dict[str, set[int]] = defaultdict(set)
    for (kind, _), places in release.items():
        if "*" in kind:
            blocks[kind.partition("*")[0]] |= {numbers[0] for numbers in places}
    return {
        name: len(own)
        for name, own in blocks.items()
        if own == set(range(len(own)))
        and any(
            kind.partition("*")[0] == name and {n[0] for n in places} == own
            for (kind, _), places in release.items()
            if "*" in kind
        )
    }


def lines(family: dict[str, Release]) -> Iterator[str]:
    """The lines of a family's roster."""
    letters = {variant: chr(ord("a") + i) for i, variant in enumerate(sorted(family))}
    counted = {variant: counts(release) for variant, release in family.items()}
    # A list is one in every release that has it, and grows from one to another or is long.
    lists = {
        name
        for own in counted.values()
        for name, count in own.items()
        if count > 1
        and all(
            name in counted[v]
            for v, release in family.items()
            if any(kind.startswith(f"{name}*") for kind, _ in release)
        )
    }
    having: dict[Kind, set[str]] = defaultdict(set)
    for variant, release in family.items():
        own = {name: counted[variant][name] for name in lists if name in counted[variant]}
        told = ", ".join(f"{name} {count}" for name, count in sorted(own.items()))
        for (kind, local), places in release.items():
            parts = kind.split("*")
            for tokens in encoded(places, own.get(parts[0])):
                name = "".join(p + t for p, t in zip(parts, (*tokens, ""), strict=True))
                having[name, local].add(letters[variant])
        yield f"@{letters[variant]} {variant}: {told}".rstrip()
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (name, local), own_letters in having.items():
        grouped[name, "".join(sorted(own_letters))].append(local)
    for (name, some), locals_ in sorted(grouped.items()):
        ends = f" @{some}" if len(some) < len(family) else ""
        inside = " ".join(sorted(filter(None, locals_), key=("matrix", "weight", "bias").index))
        if inside:
            yield f"{name}: {inside}{ends}"
        if "" in locals_:
            yield f"{name}{ends}"


def encoded(places: set[Numbers], count: int | None) -> list[tuple[str, ...]]:
    """Tokens for each number, in as few lines as their product allows; `count` is that of the first
    number's list."""
    if places == {()}:
        return [()]
    rest: dict[int, set[Numbers]] = defaultdict(set)
    for numbers in places:
        rest[numbers[0]].add(numbers[1:])
    alike: dict[frozenset[Numbers], set[int]] = defaultdict(set)
    for number, own in rest.items():
        alike[frozenset(own)].add(number)
    return [
        (_token(numbers, count), *tokens)
        for own, numbers in sorted(alike.items(), key=lambda item: min(item[1]))
        for tokens in encoded(set(own), None)
    ]


def _token(numbers: Iterable[int], count: int | None) -> str:
    own = sorted(numbers)
    if count is not None and own == list(range(count)):
        return "*"
    if len(own) == 1:
        return str(own[0])
    runs: list[list[int]] = []
    for number in own:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return f"[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)}]"


def written(text: str, rows: Iterable[str]) -> str:
    """A family's file with `rows` as its `tensors`, before its first table."""
    key = "tensors = '''\n" + "".join(f"{row}\n" for row in rows) + "'''\n"
    plain = _KEY.sub("", text)
    at = plain.index("\n[")
    names = plain.find("\nother_names")
    at = names if 0 <= names < at else at
    return plain[: at + 1] + key + plain[at + 1 :]


def main() -> None:
    """Write the files."""
    for name, own in releases().items():
        path = MODELS / f"{name}.toml"
        path.write_text(written(path.read_text(encoding="utf-8"), lines(own)), encoding="utf-8")


if __name__ == "__main__":
    main()
