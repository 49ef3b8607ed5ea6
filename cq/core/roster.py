"""Which tensors the releases of a family have: its roster, told in the family's file.

Owns the language in which `tensors` lists them, and looking them up by kind: a name whose block
numbers are folded, beside the numbers. Judges nothing. Never imports torch.

The first lines are the releases, `@a NAME: LIST COUNT, …`, each with a letter and the number of
blocks of its lists. Every other line is a layer with the tensors in it, or a tensor of its own, and
ends with the letters of the releases that have it, unless all have it:

    @a flux1-dev: double_blocks. 19, single_blocks. 38
    double_blocks.*.img_attn.qkv: matrix bias
    double_blocks.*.img_attn.norm.key_norm.scale
    guidance_in.in_layer: matrix bias @a

`matrix` is a weight of two dimensions or more, `weight` one of less. `*` is every block of its
list, `[0-3,7]` are those blocks, and a number is that block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import product
from typing import NamedTuple

from cq.core.text import folded

# At most nine digits: what is longer is no block's number.
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?=\.)")
_TOKEN = re.compile(r"(?<![^.])(\*|\[[0-9,-]+\]|[0-9]+)(?=\.)")
_RELEASE = re.compile(r"@(?P<letter>[a-z]) (?P<name>[^:]+):(?P<lists>.*)")
_COUNT = re.compile(r" (?P<list>\S+) (?P<count>[0-9]+)")
_MATRIX = "matrix"
Numbers = tuple[int, ...]


def place(name: str) -> tuple[str, Numbers]:
    """A name's kind and its block numbers; the last part of the name is never one.

    >>> place("double_blocks.17.img_mlp.0")
    ('double_blocks.*.img_mlp.0', (17,))
    """
    parts = _NUMBER.split(name)
    if len(parts) == 1:
        return name, ()
    return "*".join(parts[::2]), tuple(map(int, parts[1::2]))


def filled(kind: str, numbers: Iterable[int]) -> str:
    """The name of that kind with those block numbers.

    >>> filled("double_blocks.*.img_mlp.0", (17,))
    'double_blocks.17.img_mlp.0'
    """
    parts = kind.split("*")
    return (
        "".join(f"{part}{number}" for part, number in zip(parts, numbers, strict=False))
        + (parts[-1])
    )


class Span(NamedTuple):
    """Where a line stands: for each number of its kind the blocks, None for all of the list."""

    blocks: tuple[frozenset[int] | None, ...]
    releases: frozenset[str]

    @property
    def counted(self) -> bool:
        """Whether it stands in every block of its list, and in no list but that."""
        return len(self.blocks) == 1 and self.blocks[0] is None

    def covers(self, numbers: Numbers) -> bool:
        """Whether a tensor of its kind with these numbers stands in it, the list being long
        enough."""
        return all(own is None or n in own for own, n in zip(self.blocks, numbers, strict=True))

    def within(self, blocks: frozenset[int]) -> set[Numbers]:
        """The numbers of its tensors among the `blocks` of its list that are there."""
        own = [blocks if some is None else some for some in self.blocks]
        return (
            set(product(*own))
            if blocks.issuperset(own[0])
            else set(product(own[0] & blocks, *own[1:]))
        )

    @property
    def everywhere(self) -> set[Numbers]:
        """The numbers of its tensors where the blocks of its list are not counted."""
        return set(product(*(some or () for some in self.blocks)))


class Release(NamedTuple):
    """A release: its variant's name, and how many blocks its lists have by their prefix."""

    name: str
    counts: Mapping[str, int]


class Roster:
    """The tensors of a family's releases.

    >>> roster = Roster("@a x: b. 3" + chr(10) + "b.*.up: matrix bias" + chr(10) + "b.*.gate")
    >>> sorted(roster.kinds), sorted(roster.layers)
    (['b.*.gate', 'b.*.up.bias', 'b.*.up.weight'], ['b.*.up'])
    """

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def layers(self) -> frozenset[str]:
        """The folded names of all layers with a weight of two dimensions or more."""
        return frozenset(
            folded(_folded(name)) for name, locals_, _ in self._lines if _MATRIX in locals_
        )

    @cached_property
    def releases(self) -> Mapping[str, Release]:
        """The releases by their letter; several may be of one variant."""
        found = {}
        for row in self._text.splitlines():
            read = _RELEASE.fullmatch(row)
            if read is not None:
                lists = {c["list"]: int(c["count"]) for c in _COUNT.finditer(read["lists"])}
                found[read["letter"]] = Release(read["name"], lists)
        return found

    @cached_property
    def kinds(self) -> Mapping[str, tuple[Span, ...]]:
        """Every kind of tensor, in the order of the file, and where it stands."""
        every = frozenset(self.releases)
        found: dict[str, list[Span]] = {}
        for name, locals_, letters in self._lines:
            span = Span(tuple(map(_blocks, _TOKEN.findall(name))), frozenset(letters) or every)
            kind = _folded(name)
            for local in locals_:
                own = "weight" if local == _MATRIX else local
                found.setdefault(f"{kind}.{own}" if own else kind, []).append(span)
        return {kind: tuple(spans) for kind, spans in found.items()}

    @cached_property
    def lists(self) -> frozenset[str]:
        """The prefixes of names whose blocks are counted."""
        return frozenset(name for release in self.releases.values() for name in release.counts)

    def of(self, variant: str) -> str | None:
        """The letter of a variant's release, None if no release of it is known."""
        return next((x for x, release in self.releases.items() if release.name == variant), None)

    @cached_property
    def _lines(self) -> tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]:
        return tuple(self._read())

    def _read(self) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        for row in self._text.splitlines():
            if row and not row.startswith("@"):
                told, _, letters = row.partition(" @")
                name, colon, locals_ = told.partition(": ")
                yield name, tuple(locals_.split()) if colon else ("",), tuple(letters)


def _folded(name: str) -> str:
    return _TOKEN.sub("*", name)


def _blocks(token: str) -> frozenset[int] | None:
    if token == "*":
        return None
    found: set[int] = set()
    for part in token.strip("[]").split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)
