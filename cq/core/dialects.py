"""The other names of a family's tensors: how diffusers, trainers and older files spell them, and
which rows of the native tensor each of them is.

Owns the language in which a family's file lists them (`other_names`), and reading it both ways:
from native tensors to their other names, and from a file with other names to native tensors, fused
weights among them. Knows no adapter and no prefix of whole models. Never imports torch.

A line is `NATIVE = NAME, NAME, …` where a name may be rows of the native tensor, `NAME[0:K]`, and
several names may make it up, `NAME[0:K] + NAME[K:2K]`. Bounds are counts of rows in N, the native
tensor's rows, and K, its columns (of a bias, its weight's), such as `2K` and `(N+K)/2`.
`NAME[swapped]` has the halves in the other order, `NAME[swapped if N=2K]` only if that holds;
`NAME[flat]` is a matrix whose values the native vector has in the same order. Names are those of
layers or of whole tensors; `*` is a block's number, the same on both sides. Lines
`<word> NATIVE = NAME` list blocks, over which a line with `<word>.` on both sides goes. A first
line `as FAMILY` takes over that family's lines; a line that gives one of its names again replaces
what that line said of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from cq.core.dtypes import TensorSpec

_ENDS = (".weight", ".bias")
_FLAT, _SWAPPED = "flat", "swapped"
_LINE = re.compile(r"(?:<(?P<word>\w+)> )?(?P<native>\S+) = (?P<names>\S.*)")
_NAME = re.compile(r"(?P<name>[^\[\]\s]+)(?:\[(?P<rows>[^\[\]]+)\])?")
_BOUND = re.compile(r"\(?(?P<terms>[0-9NK+]+)\)?(?:/(?P<over>[1-9][0-9]*))?")
_TERM = re.compile(r"(?P<times>[0-9]*)(?P<of>[NK]?)")
_ROWS = re.compile(r"flat|swapped(?: if [^=]+=[^=]+)?|[^:]+:[^:]+")
_WORD = re.compile(r"<(\w+)>")


class Target(NamedTuple):
    """Rows of a tensor that rows of a change belong to: `count` rows of `tensor` from `start` on
    take the change's rows from `first` on. A 0-d tensor has one row."""

    tensor: str
    start: int
    count: int  # type: ignore[assignment]  # hides the method of tuples
    first: int


class Size(NamedTuple):
    """Rows and columns of a native tensor; columns are those of the weight beside a bias, None if
    there is none."""

    rows: int
    columns: int | None


@dataclass(frozen=True, slots=True)
class Name:
    """A pattern for another name, and the rows of the native tensor that it is."""

    pattern: str
    rows: str | None

    def spans(self, size: Size) -> tuple[tuple[int, int], ...] | None:
        """The native rows `(start, stop)` in the order of the name's own; None if a tensor of that
        size has no such rows."""
        if self.rows is None:
            return ((0, size.rows),)
        if self.rows == _FLAT:
            return None
        if self.rows.startswith(_SWAPPED):
            _, _, condition = self.rows.partition(" if ")
            left, _, right = condition.partition("=")
            if condition and _value(left, size) != _value(right, size):
                return ((0, size.rows),)
            half, odd = divmod(size.rows, 2)
            return None if odd else ((half, size.rows), (0, half))
        left, _, right = self.rows.partition(":")
        start, stop = _value(left, size), _value(right, size)
        if start is None or stop is None or not 0 <= start < stop <= size.rows:
            return None
        return ((start, stop),)


class Line(NamedTuple):
    """A native pattern and its other names: choices, each one name or several that make it up."""

    native: str
    choices: tuple[tuple[Name, ...], ...]


class Layout(NamedTuple):
    """Where a native tensor's rows lie in a file, whatever the file calls it.

    `rows` are targets whose `first` is the native row, `spec` and `columns` are the native
    tensor's. A `flat` one has the values of `rows` as a vector.
    """

    rows: tuple[Target, ...]
    spec: TensorSpec
    columns: int | None
    flat: bool = False

    @property
    def size(self) -> Size:
        """The native tensor's size, as bounds count it."""
        return Size(_rows(self.spec), self.columns)

    def places(self, spans: Iterable[tuple[int, int]]) -> tuple[Target, ...]:
        """The rows that a name with these native `spans` names, in the order of its own rows."""
        found = []
        first = 0
        for start, stop in spans:
            for target in self.rows:
                low, high = max(start, target.first), min(stop, target.first + target.count)
                if low < high:
                    at = target.start + low - target.first
                    found.append(Target(target.tensor, at, high - low, first + low - start))
            first += stop - start
        return tuple(found)


class Dialect:
    """A family's lines, looked up by native names and by other ones.

    >>> flux = Dialect(parse("a.*.qkv = b.*.to_q[0:K] + b.*.to_k[K:2K] + b.*.to_v[2K:3K]"))
    >>> [name for name, _, _ in flux.others("a.7.qkv.weight")]
    ['b.7.to_q.weight', 'b.7.to_k.weight', 'b.7.to_v.weight']
    >>> flux.natives("b.7.to_k.bias")
    ['a.7.qkv.bias']
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = tuple(lines)

    @cached_property
    def _by_native(self) -> dict[str, list[Line]]:
        found: dict[str, list[Line]] = {}
        for line in self.lines:
            found.setdefault(_folded(line.native), []).append(line)
        return found

    @cached_property
    def _by_other(self) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for line in self.lines:
            for name in (name for choice in line.choices for name in choice):
                found.setdefault(_folded(name.pattern), []).append((name.pattern, line.native))
        return found

    def choices(self, native: str) -> Iterator[tuple[tuple[str, Name], ...]]:
        """The choices of names, in full, that the native tensor has."""
        for stem, end in _stems(native):
            for line in self._by_native.get(_folded(stem), ()):
                found = _compiled(line.native).fullmatch(stem)
                if found is not None:
                    for choice in line.choices:
                        yield tuple((_filled(n.pattern, found) + end, n) for n in choice)

    def others(self, native: str) -> Iterator[tuple[str, Name, bool]]:
        """The other names that the native tensor has, in full, and whether one is whole."""
        for choice in self.choices(native):
            for name, how in choice:
                yield name, how, len(choice) == 1

    def natives(self, other: str) -> list[str]:
        """The native tensors of which `other` may be a name."""
        found: dict[str, None] = {}
        for stem, end in _stems(other):
            for pattern, native in self._by_other.get(_folded(stem), ()):
                match = _compiled(pattern).fullmatch(stem)
                if match is not None:
                    found[_filled(native, match) + end] = None
        return list(found)

    def layout(self, native: str, specs: Mapping[str, TensorSpec], prefix: str) -> Layout | None:
        """Where the native tensor's rows lie among `specs`, whose names stand under `prefix`; None
        if neither it nor all of a choice of its other names is there."""
        own = specs.get(prefix + native)
        if own is not None:
            rows = (Target(prefix + native, 0, _rows(own), 0),)
            return Layout(rows, own, _columns(native, own, self, specs, prefix))
        for choice in self.choices(native):
            parts = [(prefix + name, specs.get(prefix + name), how) for name, how in choice]
            there = [(name, spec, how) for name, spec, how in parts if spec is not None]
            if len(there) == len(parts):
                found = self._joined(native, there, specs, prefix)
                if found is not None:
                    return found
        return None

    def _joined(
        self,
        native: str,
        parts: list[tuple[str, TensorSpec, Name]],
        specs: Mapping[str, TensorSpec],
        prefix: str,
    ) -> Layout | None:
        first = parts[0][1]
        if parts[0][2].rows == _FLAT:
            rows = (Target(parts[0][0], 0, _rows(first), 0),)
            return Layout(rows, TensorSpec(first.dtype, (first.numel,)), None, flat=True)
        if any(s.dtype != first.dtype or s.shape[1:] != first.shape[1:] for _, s, _ in parts):
            return None
        if len(parts) > 1 and not first.shape:
            return None
        if len(parts) == 1 and ":" in (parts[0][2].rows or ""):
            return None  # rows of a tensor whose other rows are nowhere
        count = sum(_rows(spec) for _, spec, _ in parts)
        spec = TensorSpec(first.dtype, (count, *first.shape[1:])) if first.shape else first
        columns = _columns(native, spec, self, specs, prefix)
        found = []
        for name, part, how in parts:
            spans = how.spans(Size(count, columns))
            if spans is None or sum(stop - start for start, stop in spans) != _rows(part):
                return None
            at = 0
            for start, stop in spans:
                found.append(Target(name, at, stop - start, start))
                at += stop - start
        found.sort(key=lambda target: target.first)
        ends = [0, *(target.first + target.count for target in found)]
        if [target.first for target in found] != ends[:-1] or ends[-1] != count:
            return None
        return Layout(tuple(found), spec, columns)


class NativeView(Mapping[str, TensorSpec]):
    """The specs of a checkpoint under native names, each found when it is asked for."""

    def __init__(self, dialect: Dialect, specs: Mapping[str, TensorSpec], prefix: str) -> None:
        self._dialect = dialect
        self._specs = specs
        self._prefix = prefix

    def __getitem__(self, name: str) -> TensorSpec:
        layout = self._dialect.layout(name, self._specs, self._prefix)
        if layout is None:
            raise KeyError(name)
        return layout.spec

    def __iter__(self) -> Iterator[str]:
        seen: dict[str, None] = {}
        for name in self._specs:
            if name.startswith(self._prefix):
                bare = name.removeprefix(self._prefix)
                for native in (bare, *self._dialect.natives(bare)):
                    if native not in seen and native in self:
                        seen[native] = None
                        yield native

    def __len__(self) -> int:
        return sum(1 for _ in self)


def parse(text: str, inherited: Iterable[Line] = ()) -> tuple[Line, ...]:
    """The lines of a family's `other_names`, those of the family that it is `as` first.

    Raises: ValueError with the line that cannot be read.
    """
    blocks: dict[str, list[tuple[str, str]]] = {}
    own: list[Line] = []
    for row in filter(None, (row.strip() for row in text.splitlines())):
        found = _LINE.fullmatch(row)
        if found is None:
            raise ValueError(f"`{row}` is not `NATIVE = NAME, NAME`")
        native, names = found["native"], found["names"]
        if found["word"]:
            blocks.setdefault(found["word"], []).append((native, names))
            continue
        word = _WORD.search(native)
        for here, there in blocks.get(word[1], []) if word else [("", "")]:
            mark = word[0] if word else "<>"
            choices = _choices(names.replace(mark, there), row)
            own.append(Line(native.replace(mark, here), choices))
    for line in own:
        if any(n.pattern.count("*") != line.native.count("*") for c in line.choices for n in c):
            raise ValueError(f"`{line.native}` has other numbers than one of its names")
    again = {name.pattern for line in own for choice in line.choices for name in choice}
    kept = (
        Line(i.native, tuple(c for c in i.choices if c[0].pattern not in again)) for i in inherited
    )
    return (*(line for line in kept if line.choices), *own)


def _choices(names: str, row: str) -> tuple[tuple[Name, ...], ...]:
    choices = []
    for choice in names.split(", "):
        read = [_NAME.fullmatch(name) for name in choice.split(" + ")]
        if None in read:
            raise ValueError(f"`{choice}` in `{row}` is not `NAME` or `NAME[rows]`")
        bad = next((n["rows"] for n in read if n and n["rows"] and not _are_rows(n["rows"])), None)
        if bad is not None:
            raise ValueError(f"`{bad}` in `{row}` names no rows")
        choices.append(tuple(Name(name["name"], name["rows"]) for name in read if name))
    return tuple(choices)


def _are_rows(text: str) -> bool:
    if _ROWS.fullmatch(text) is None:
        return False
    bounds = text.partition(" if ")[2].split("=") if text.startswith(_SWAPPED) else text.split(":")
    some = Size(12, 6)  # any size by which a well-formed bound has a value
    return text in {_FLAT, _SWAPPED} or all(_value(bound, some) is not None for bound in bounds)


def _value(text: str, size: Size) -> int | None:
    """A bound in rows; None if it counts in columns that are not known, or is no whole number."""
    found = _BOUND.fullmatch(text)
    if found is None:
        return None
    total = 0
    for term in found["terms"].split("+"):
        read = _TERM.fullmatch(term)
        of = {"N": size.rows, "K": size.columns, "": 1}[read["of"]] if read and term else None
        if read is None or of is None:
            return None
        total += int(read["times"] or 1) * of
    whole, rest = divmod(total, int(found["over"] or 1))
    return None if rest else whole


def _rows(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1


def _columns(
    native: str, spec: TensorSpec, dialect: Dialect, specs: Mapping[str, TensorSpec], prefix: str
) -> int | None:
    if len(spec.shape) > 1:
        return spec.shape[1]
    if not native.endswith("bias"):
        return None
    weight = dialect.layout(native.removesuffix("bias") + "weight", specs, prefix)
    return None if weight is None else weight.columns


def _stems(tensor: str) -> Iterator[tuple[str, str]]:
    """The names that patterns may be for: the tensor's own, and its layer's."""
    yield tensor, ""
    for end in _ENDS:
        if tensor.endswith(end):
            yield tensor.removesuffix(end), end


def _folded(name: str) -> str:
    """The name with all its numbers folded: a pattern and what matches it have the same."""
    return ".".join(
        "*" if part.isascii() and part.isdecimal() else part for part in name.split(".")
    )


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    # When first asked for: most lines of most families never are.
    return re.compile(re.escape(pattern).replace(r"\*", "([0-9]+)"))


def _filled(pattern: str, found: re.Match[str]) -> str:
    numbers = iter(found.groups())
    return re.sub(r"\*", lambda _: next(numbers), pattern)
