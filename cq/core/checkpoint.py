"""The idea of cq: a checkpoint is a lazy view whose names, dtypes and shapes are known before its
bytes.

Owns the protocol between rooms: `Checkpoint` (the view), `Part` (tensors produced together),
`Piece` (row segments of a tensor), `Stage` (a checkpoint to a checkpoint), `Extent` (bytes that
already lie in a file). Knows no command, no format and no optimizer; torch only in annotations and
reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.errors import InternalError
from cq.core.header import Entry
from cq.core.source import Source, SourceFile, cuts, largest_cut

if TYPE_CHECKING:
    import torch

    from cq.core.streaming import Work


class Piece(NamedTuple):
    """Rows of the tensor `name`, from row `start` on; a 0-d tensor is one piece that starts at
    0."""

    name: str
    start: int
    tensor: torch.Tensor


class Extent(NamedTuple):
    """Bytes that lie ready in a file: `nbytes` from `offset`, counted from the file's start."""

    file: SourceFile
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors that are produced together: the unit of work, memory, progress and resuming.

    `produce()` yields every row of every tensor once, rows in order within a tensor. It may be
    called any number of times, from any thread, and always yields the same values. `nbytes_peak`
    bounds the memory it holds at any moment. With an `extent` the bytes of the one tensor lie ready
    in a file and are copied without being looked at; with `constant` they are known already. With
    `work` it can be computed in other places and portions than `nbytes_peak` is told for.
    """

    tensors: Mapping[str, TensorSpec]
    nbytes_peak: int
    produce: Callable[[], Iterator[Piece]]
    extent: Extent | None = None
    constant: bytes | None = None
    work: Work | None = None

    @property
    def name(self) -> str:
        """The part's first tensor, which names it in messages."""
        return next(iter(self.tensors))

    @property
    def nbytes(self) -> int:
        """Bytes that the part writes."""
        return sum(spec.nbytes for spec in self.tensors.values())


def narrowed(part: Part, names: Iterable[str]) -> Part:
    """`part` without the tensors that are not in `names`."""
    kept = {name: part.tensors[name] for name in names}
    return Part(
        tensors=kept,
        nbytes_peak=part.nbytes_peak,
        produce=lambda: (piece for piece in part.produce() if piece.name in kept),
    )


class Stage(Protocol):
    """Maps a checkpoint to a checkpoint. Plans from specs alone; computes when bytes are asked for.

    `name` is the `op` in a manifest and the entry point in `cq.stages`. `arguments()` is plain JSON
    from which `from_arguments` makes an equal stage; paths stand under the key `path`, so that
    provenance can shorten them.
    """

    name: ClassVar[str]

    def arguments(self) -> dict[str, Any]:
        """The stage as plain JSON, without its name."""
        ...

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage that `arguments()` described. Raises: InputError for anything unknown."""
        ...

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint after this stage. Raises: PlanError with the reason it cannot be."""
        ...


class Outcome(Protocol):
    """What is known only when parts have been produced, such as how well they came out."""

    def remarks(self) -> list[str]:
        """Sentences for the user; none before any part was produced."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        ...

    def handed_over(self) -> Any:
        """What is known here, for the same outcome in another process, as plain JSON; it is
        forgotten here."""
        ...

    def take_over(self, known: Any) -> None:
        """Add what another process has handed over."""
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class Checkpoint:
    """Every tensor's name, dtype and shape, and the metadata, without having read a weight.

    `sources` and `stages` say where it comes from; together they are its manifest. `inputs` are all
    files that it reads, adapters as well. `notes` carries what the last stage decided (JSON
    objects, for plans and reports), `outcomes` tell afterwards what came of it, and `extra` has a
    manifest's keys that this cq does not know; none of them reaches a file.
    """

    parts: tuple[Part, ...]
    metadata: Mapping[str, str]
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...] = ()
    inputs: tuple[SourceFile, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Spec of every tensor by name."""
        found: dict[str, TensorSpec] = {}
        count = 0
        for part in self.parts:
            found.update(part.tensors)
            count += len(part.tensors)
        if len(found) != count:
            raise InternalError("two parts of a checkpoint produce the same tensor")
        return MappingProxyType(found)

    @cached_property
    def _part_of(self) -> Mapping[str, Part]:
        return {name: part for part in self.parts for name in part.tensors}

    def __repr__(self) -> str:
        steps = [", ".join(source.shown for source in self.sources), *(s.name for s in self.stages)]
        return f"<Checkpoint {' | '.join(steps)}: {len(self.specs)} tensors, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, without the header."""
        return sum(part.nbytes for part in self.parts)

    def narrowed(self, names: Iterable[str]) -> Checkpoint:
        """This checkpoint without the tensors that are not in `names`."""
        return self.divided(dict.fromkeys(names, 0), 1)[0]

    def divided(self, of: Mapping[str, int], count: int) -> tuple[Checkpoint, ...]:
        """This checkpoint as `count` of some of its tensors each; `of` tells the number of the one
        that a tensor goes to, from 0 on."""
        groups: list[list[Part]] = [[] for _ in range(count)]
        for part in self.parts:
            numbers = {name: of[name] for name in part.tensors if name in of}
            for number in sorted(set(numbers.values())):
                own = [name for name, its in numbers.items() if its == number]
                groups[number].append(
                    part if len(own) == len(part.tensors) else narrowed(part, own)
                )
        return tuple(dataclasses.replace(self, parts=tuple(parts)) for parts in groups)

    def part(self, name: str) -> Part:
        """The part that produces the tensor `name`."""
        return self._part_of[name]

    def pieces(self, name: str) -> Iterator[Piece]:
        """The tensor `name`, row segment by row segment; bounded memory for a tensor of any
        size."""
        for piece in self._part_of[name].produce():
            if piece.name == name:
                yield piece

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several whole tensors, each part among them produced once."""
        import torch

        wanted = list(names)
        collected: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
        parts = {id(self._part_of[name]): self._part_of[name] for name in wanted}
        for part in parts.values():
            for piece in part.produce():
                if piece.name in collected:
                    collected[piece.name].append(piece.tensor)
        for name in wanted:
            if not collected[name]:  # no rows, so no pieces
                spec = self.specs[name]
                collected[name].append(torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)))
        return {
            name: pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            for name, pieces in collected.items()
        }

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a small tensor, such as a marker; without torch unless they are computed."""
        part = self._part_of[name]
        if part.constant is not None:
            return part.constant
        if part.extent is not None:
            buffer = bytearray(part.extent.nbytes)
            part.extent.file.read_into(memoryview(buffer), part.extent.offset, tensor=name)
            return bytes(buffer)
        import torch

        return bytes(self.read(name).reshape(-1).view(torch.uint8).tolist())

    def after(self, stage: Stage, **changes: Any) -> Checkpoint:
        """This checkpoint's successor by `stage`: what `changes` does not name stays as it is."""
        return dataclasses.replace(
            self, **{"stages": (*self.stages, stage), "notes": (), **changes}
        )

    def manifest(self) -> dict[str, Any]:
        """The checkpoint as the JSON object that a pipe carries: sources and stages, not bytes."""
        from cq.core import manifest

        return manifest.document(self)


def from_source(source: Source) -> Checkpoint:
    """The checkpoint that a file or shard set holds."""
    parts = tuple(
        _file_part(file, name, entry)
        for file in source.files
        for name, entry in file.header.entries.items()
        if source.owner[name] is file
    )
    return Checkpoint(parts=parts, metadata=source.metadata, sources=(source,), inputs=source.files)


def _file_part(file: SourceFile, name: str, entry: Entry) -> Part:
    spec = entry.spec
    return Part(
        tensors={name: spec},
        nbytes_peak=_nbytes_largest_cut(spec),
        produce=partial(_file_pieces, file, name, spec),
        extent=Extent(file, file.header.data_start + entry.start, spec.nbytes),
    )


def _file_pieces(file: SourceFile, name: str, spec: TensorSpec) -> Iterator[Piece]:
    for start, stop in cuts(spec):
        yield Piece(name, start, file.rows(name, start, stop))


@lru_cache(maxsize=1 << 12)
def _nbytes_largest_cut(spec: TensorSpec) -> int:
    return TensorSpec(spec.dtype, (largest_cut(spec),)).nbytes


def constant_part(name: str, value: bytes) -> Part:
    """A part of one 1-D U8 tensor whose bytes are known while planning, such as a layer's
    marker."""

    return Part(
        tensors={name: _bytes_spec(len(value))},
        nbytes_peak=len(value),
        produce=partial(_constant_piece, name, value),
        constant=value,
    )


def _constant_piece(name: str, value: bytes) -> Iterator[Piece]:
    import torch

    yield Piece(name, 0, torch.tensor(list(value), dtype=torch.uint8))


@lru_cache(maxsize=1 << 10)
def _bytes_spec(nbytes: int) -> TensorSpec:
    return TensorSpec("U8", (nbytes,))
