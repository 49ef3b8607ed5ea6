"""Where factors can move from one layer into another without a change to what a model computes.

Owns the folds of families as data (`[[folds]]` in their files), and finding them in a checkpoint. A
fold says that each input channel of some layers, the consumers, is made by a channel of others, the
producers, and by nothing else: dividing the producers' channels and multiplying the consumers'
columns by the same factors leaves the model's outputs as they are. Names tensors and rows, never
reads one; never imports torch.

A table has `kind`, `producers` and `consumers` (names of layers, `*` is a block's number, the same
in all), perhaps `columns` of the consumers, and by its kind

    modulation   `shift` and `scale`: rows of one producer, for y = (1 + scale) x + shift
    rows         `rows` of each producer that reach the consumers channel by channel
    norm         nothing: `weight`, and `bias` if there is one, are the channels

Rows and columns are `FROM:TO` in counts of N, the layer's rows, and K, its columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cq.core.dialects import Name, Size
from cq.core.dtypes import TensorSpec

Kind = Literal["modulation", "rows", "norm"]
_ROWS: Mapping[str, tuple[str, ...]] = {
    "modulation": ("shift", "scale"),
    "rows": ("rows",),
    "norm": (),
}
_SPAN = re.compile(r"[0-9NK+]+:[0-9NK+]+")
_SWAP = str.maketrans("NK", "KN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A fold of a family. `rows` are spans by their word (`shift`, `scale` or `rows`)."""

    kind: Kind
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    rows: Mapping[str, str]
    columns: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Channels of one tensor: its rows or columns `start` to `stop`; with `plus_one` what counts is
    one more than the tensor's values."""

    name: str
    start: int
    stop: int
    plus_one: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A fold in a checkpoint: the tensors whose rows are divided, and the weights whose columns are
    multiplied; as many channels everywhere. `plus_one` says that one more than a row counts
    somewhere."""

    divided: tuple[Spot, ...]
    multiplied: tuple[Spot, ...]

    @property
    def channels(self) -> int:
        """How many factors there are."""
        return self.multiplied[0].stop - self.multiplied[0].start

    @property
    def plus_one(self) -> bool:
        """Whether one more than a tensor's values counts somewhere."""
        return any(spot.plus_one for spot in self.divided)


def parse(tables: Iterable[Any]) -> tuple[Fold, ...]:
    """The folds of a family's file. Raises: ValueError for what is none."""
    return tuple(map(_parsed, tables))


def _parsed(table: Any) -> Fold:
    if not isinstance(table, dict) or table.get("kind") not in _ROWS:
        raise ValueError(f"a fold's `kind` is one of {', '.join(_ROWS)}")
    kind = table["kind"]
    words = _ROWS[kind]
    for key in table:
        if key not in {"kind", "producers", "consumers", "columns", *words}:
            raise ValueError(f"a fold by {kind} has a key `{key}`, which means nothing")
    names = []
    for key in ("producers", "consumers"):
        value = table.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise ValueError(f"a fold's `{key}` are names of layers")
        names.append(tuple(value))
    if len({name.count("*") for name in (*names[0], *names[1])}) != 1:
        raise ValueError(
            f"the layers of a fold, such as `{names[0][0]}`, have not the same numbers"
        )
    spans = {key: table.get(key) for key in (*words, *(["columns"] if "columns" in table else []))}
    for key, span in spans.items():
        if not isinstance(span, str) or _SPAN.fullmatch(span) is None:
            raise ValueError(f"a fold's `{key}` is `FROM:TO`, not `{span}`")
    if kind == "modulation" and len(names[0]) != 1:
        raise ValueError("a fold by modulation has one producer")
    return Fold(
        kind=kind,
        producers=names[0],
        consumers=names[1],
        rows={key: str(spans[key]) for key in words},
        columns=table.get("columns"),
    )


def find(folds: Iterable[Fold], specs: Mapping[str, TensorSpec], prefix: str) -> Iterator[Found]:
    """The folds that a checkpoint has under `prefix`, of which every tensor is there and fits."""
    for fold in folds:
        for numbers in _numbers(fold.producers[0], specs, prefix):
            found = _found(fold, numbers, specs, prefix)
            if found is not None:
                yield found


def _numbers(pattern: str, specs: Mapping[str, TensorSpec], prefix: str) -> list[tuple[str, ...]]:
    """What the stars of a layer's pattern stand for in a checkpoint."""
    test = re.compile(re.escape(f"{prefix}{pattern}.weight").replace(r"\*", "([0-9]+)"))
    return [match.groups() for match in map(test.fullmatch, specs) if match is not None]


def _found(
    fold: Fold, numbers: tuple[str, ...], specs: Mapping[str, TensorSpec], prefix: str
) -> Found | None:
    def full(pattern: str) -> str:
        for number in numbers:
            pattern = pattern.replace("*", number, 1)
        return prefix + pattern

    divided: list[Spot] = []
    for layer in map(full, fold.producers):
        spots = _produced(fold, layer, specs)
        if spots is None:
            return None
        divided += spots
    multiplied = []
    for layer in map(full, fold.consumers):
        spec = specs.get(f"{layer}.weight")
        if spec is None or len(spec.shape) != 2 or not spec.is_float:
            return None
        columns = (0, spec.shape[1])
        if fold.columns is not None:
            # A span is one of rows, so that its letters change places for columns.
            turned = Size(spec.shape[1], spec.shape[0])
            spans = Name("", fold.columns.translate(_SWAP)).spans(turned)
            if spans is None:
                return None
            columns = spans[0]
        multiplied.append(Spot(name=f"{layer}.weight", start=columns[0], stop=columns[1]))
    sizes = {spot.stop - spot.start for spot in (*divided, *multiplied)}
    return Found(divided=tuple(divided), multiplied=tuple(multiplied)) if len(sizes) == 1 else None


def _produced(fold: Fold, layer: str, specs: Mapping[str, TensorSpec]) -> list[Spot] | None:
    """The rows of a producer that are divided; None if it is not as the fold says."""
    weight, bias = specs.get(f"{layer}.weight"), specs.get(f"{layer}.bias")
    if weight is None or not weight.is_float or (bias is not None and not bias.is_float):
        return None
    if len(weight.shape) != (1 if fold.kind == "norm" else 2):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    if fold.kind == "modulation" and bias is None:
        return None  # (1 + scale) / s needs a place for 1 / s - 1
    spans = {"rows": (0, weight.shape[0])}
    if fold.kind != "norm":
        read = {
            word: Name("", span).spans(Size(weight.shape[0], weight.shape[1]))
            for word, span in fold.rows.items()
        }
        if None in read.values():
            return None
        spans = {word: found[0] for word, found in read.items() if found is not None}
    return [
        Spot(
            name=f"{layer}.{own}",
            start=start,
            stop=stop,
            plus_one=word == "scale" and own == "bias",
        )
        for own in (("weight",) if bias is None else ("weight", "bias"))
        for word, (start, stop) in spans.items()
    ]
