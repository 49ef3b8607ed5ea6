"""A checkpoint while it is edited: which tensor comes from which part under which name, the
metadata, and what was changed.

Owns the way back from such a table to parts: what no change touched is handed on as it is, with
its extent, so that the kernel copies it unread. Knows no kind of change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cq.core import comfy, select
from cq.core.checkpoint import Checkpoint, Part, Piece, constant_part
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.source import SourceFile
from cq.core.stored import by_layer, header_settings, is_optional, is_owned
from cq.core.text import printable


class _Held(NamedTuple):
    """A tensor's part, and its name there."""

    part: Part
    own: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One line of the difference between before and after.

    `change` is `remove`, `add`, `replace`, `rename`, `cast`, `reshape`, `marker`, `header` or
    `metadata`; `name` a tensor, or for the last two a layer and a key. `to` is a new name.
    """

    change: str
    name: str
    to: str | None = None
    before: str | None = None
    after: str | None = None
    nbytes: int = 0
    nbytes_after: int = 0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {key: getattr(self, key) for key in self.__slots__}


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized layer, by its names alone: full names of its tensors by local name, and what
    showed that it is quantized (see `cq.core.comfy.Quantized`)."""

    name: str
    tensors: Mapping[str, str]
    evidence: str

    @property
    def owned(self) -> dict[str, str]:
        """The tensors that are there because it is quantized: weight, scales, marker, records."""
        return {local: name for local, name in self.tensors.items() if is_owned(local)}

    @property
    def needed(self) -> dict[str, str]:
        """The owned tensors without which it would decode otherwise, or not at all."""
        return {local: name for local, name in self.owned.items() if not is_optional(local)}


@dataclass(slots=True)
class Draft:
    """The checkpoint `source` on its way through an edit.

    `header` are the entries of `_quantization_metadata` by full layer names, None without that
    form. `moved` says of tensors and layers that were renamed what they were called.
    """

    source: Checkpoint
    metadata: dict[str, str]
    header: dict[str, dict[str, Any]] | None
    changes: list[Change] = field(default_factory=list)
    inputs: list[SourceFile] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    _held: dict[str, _Held] = field(default_factory=dict)
    _current: Checkpoint | None = None
    _layers: dict[str, Layer] | None = None

    @classmethod
    def of(cls, source: Checkpoint, *, without_header: bool = False) -> Draft:
        """The draft of `source`.

        Raises: InputError if its header form cannot be read, unless it is given up anyway.
        """
        draft = cls(source, dict(source.metadata), None)
        draft._held = {n: _Held(part, n) for part in source.parts for n in part.tensors}
        if comfy.HEADER_KEY in source.metadata:
            try:
                draft.header = {
                    layer: dict(settings)
                    for layer, settings in header_settings(source, by_layer(source)).items()
                }
            except InputError as error:
                if not without_header:
                    error.hint = error.hint or "remove it with `--drop-quant-metadata`"
                    raise
                draft.header = {}
            draft._note_stale()
        return draft

    def _note_stale(self) -> None:
        try:
            stated = comfy.header_layers(self.source.metadata)
        except InputError:
            return
        if self.header is not None and stated != self.header:
            for name in stated.keys() - self.header.keys():
                after = self._renamed_entry(name)
                reason = "is named as the file names it" if after else "there is no such layer"
                self.changes.append(
                    Change(change="header", name=printable(name), to=after, reason=reason)
                )

    def _renamed_entry(self, name: str) -> str | None:
        """The layer that an entry with another prefix speaks of."""
        from cq.core.recipe import without_prefix

        bare = without_prefix(name)
        return next((n for n in self.header or {} if without_prefix(n) == bare), None)

    @property
    def shown(self) -> str:
        """What messages call the checkpoint."""
        return " and ".join(f"`{source.shown}`" for source in self.source.sources) or "the input"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Spec of every tensor by its name now."""
        return {name: held.part.tensors[held.own] for name, held in self._held.items()}

    def spec(self, name: str) -> TensorSpec:
        """The spec of the tensor `name`."""
        held = self._held[name]
        return held.part.tensors[held.own]

    def part(self, name: str) -> Part:
        """The tensor `name` as a part of its own, under that name."""
        held = self._held[name]
        return _share(held.part, {held.own: name})

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a small tensor, such as a marker."""
        alone = Checkpoint(parts=(self.part(name),), metadata={}, sources=())
        return alone.read_bytes(name)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def checkpoint(self) -> Checkpoint:
        """The checkpoint so far, header form included; without a stage."""
        if self._current is None:
            groups: dict[int, tuple[Part, dict[str, str]]] = {}
            for name, held in self._held.items():
                groups.setdefault(id(held.part), (held.part, {}))[1][held.own] = name
            self._current = Checkpoint(
                parts=tuple(_share(part, names) for part, names in groups.values()),
                metadata=self._metadata(),
                sources=self.source.sources,
                stages=self.source.stages,
                inputs=(*self.source.inputs, *self.inputs),
                extra=self.source.extra,
            )
        return self._current

    def _metadata(self) -> dict[str, str]:
        found = {k: v for k, v in self.metadata.items() if k != comfy.HEADER_KEY}
        if self.header is None:
            return found
        text = self.source.metadata.get(comfy.HEADER_KEY)
        try:
            same = text is not None and comfy.header_layers(self.source.metadata) == self.header
        except InputError:
            same = False
        if same and text is not None:
            return {**found, comfy.HEADER_KEY: text}
        # An empty one would still keep ComfyUI from converting the old `scaled_fp8` form.
        return (
            {**found, comfy.HEADER_KEY: comfy.header_value(self.header)} if self.header else found
        )

    def layers(self) -> dict[str, Layer]:
        """The quantized layers by name."""
        if self._layers is None:
            now = self.checkpoint()
            tensors = by_layer(now)
            self._layers = {
                found.layer: Layer(found.layer, tensors[found.layer], found.evidence)
                for found in comfy.find_quantized(now)
                if found.layer in tensors
            }
        return self._layers

    def settings(self, layer: str) -> dict[str, Any] | None:
        """What header or marker say of a layer; None if neither does. Raises: InputError."""
        if self.header is not None and layer in self.header:
            return dict(self.header[layer])
        return self.marker(layer)

    def marker(self, layer: str) -> dict[str, Any] | None:
        """What the layer's marker says, None without one. Raises: InputError if it is no JSON."""
        name = layer + comfy.MARKER
        if name not in self:
            return None
        return comfy.parse_marker(self.read_bytes(name), layer=layer)

    def set_marker(self, layer: str, settings: Mapping[str, Any], reason: str) -> None:
        """Write the layer's marker anew, as a tensor."""
        name = layer + comfy.MARKER
        raw = comfy.marker_bytes(settings)
        before = self.read_bytes(name) if name in self else None
        if before == raw:
            return
        self._note(
            change="marker",
            name=name,
            before=None if before is None else printable(before.decode("utf-8", "replace")),
            after=raw.decode(),
            nbytes=0 if before is None else len(before),
            nbytes_after=len(raw),
            reason=reason,
        )
        self._put(constant_part(name, raw))

    def set_entry(self, layer: str, settings: Mapping[str, Any] | None, reason: str) -> None:
        """Write the layer's entry in the header form, or remove it with None."""
        if self.header is None:
            self.header = {}
        before = self.header.get(layer)
        if before == settings:
            return
        if settings is None:
            del self.header[layer]
        else:
            self.header[layer] = dict(settings)
        self._note(
            change="header",
            name=layer,
            before=None if before is None else json.dumps(before),
            after=None if settings is None else json.dumps(settings),
            reason=reason,
        )

    def drop_header(self, reason: str) -> None:
        """Remove the header form."""
        if comfy.HEADER_KEY in self.metadata or self.header is not None:
            self._note(change="metadata", name=comfy.HEADER_KEY, reason=reason)
        self.metadata.pop(comfy.HEADER_KEY, None)
        self.header = None

    def set_meta(self, key: str, value: str | None, reason: str) -> None:
        """Set a metadata entry, or remove it with None."""
        before = self.metadata.get(key)
        if before == value:
            return
        shown = (None if text is None else printable(text) for text in (before, value))
        self._note(
            change="metadata", name=key, before=next(shown), after=next(shown), reason=reason
        )
        if value is None:
            del self.metadata[key]
        else:
            self.metadata[key] = value

    def remove(self, names: Mapping[str, str]) -> None:
        """Remove tensors, each for a reason; entries of layers without a weight go with them."""
        for name, reason in names.items():
            spec = self.spec(name)
            self._note(
                change="remove", name=name, before=str(spec), nbytes=spec.nbytes, reason=reason
            )
            del self._held[name]
        gone = {n.removesuffix(comfy.WEIGHT) for n in names if n.endswith(comfy.WEIGHT)}
        for layer in gone & set(self.header or {}):
            self.set_entry(layer, None, "its layer is removed")

    def add(self, part: Part, reason: str) -> None:
        """Add the tensors of a part, in the place of those that have their names."""
        for name, spec in part.tensors.items():
            before = self.spec(name) if name in self else None
            self._note(
                change="add" if before is None else "replace",
                name=name,
                before=None if before is None else str(before),
                after=str(spec),
                nbytes=0 if before is None else before.nbytes,
                nbytes_after=spec.nbytes,
                reason=reason,
            )
        self._put(part)

    def replace(self, change: str, part: Part, reason: str) -> None:
        """Put a part of one tensor in the place of the tensor of its name."""
        before, after = self.spec(part.name), part.tensors[part.name]
        self._note(
            change=change,
            name=part.name,
            before=str(before),
            after=str(after),
            nbytes=before.nbytes,
            nbytes_after=after.nbytes,
            reason=reason,
        )
        self._put(part)

    def rename(self, names: Mapping[str, str], reason: str) -> None:
        """Rename tensors, and with whole layers their entries in the header.

        Raises: PlanError if two tensors would have one name.
        """
        found: dict[str, _Held] = {}
        was: dict[str, str] = {}
        for name, held in self._held.items():
            new = names.get(name, name)
            if new in found:
                raise PlanError(
                    f"both `{printable(was[new])}` and `{printable(name)}` of {self.shown} would"
                    f" be called `{printable(new)}`",
                    where=name,
                    hint="remove one of them first, with `--remove-keys`",
                    code="plan.collision",
                )
            found[new], was[new] = held, name
        moves = {
            layer.name: names[layer.tensors["weight"]].removesuffix(comfy.WEIGHT)
            for layer in self.layers().values()
            if layer.tensors.get("weight") in names
        }
        for name, new in names.items():
            spec = self.spec(name)
            self._note(
                change="rename",
                name=name,
                to=new,
                nbytes=spec.nbytes,
                nbytes_after=spec.nbytes,
                reason=reason,
            )
        if self.header is not None:
            self.header = {moves.get(n, n): settings for n, settings in self.header.items()}
        self._follow(was)
        self._held = found
        self._forget()

    def _follow(self, was: Mapping[str, str]) -> None:
        """Remember what tensors and layers were called, by tensors' names before a renaming."""
        before = self.moved
        self.moved = {}
        for new, old in was.items():
            for ending in ("", "." + new.rpartition(".")[2]):
                now, then = new.removesuffix(ending), old.removesuffix(ending)
                if then != old or not ending:
                    self.moved[now] = before.get(then, then)

    def _put(self, part: Part) -> None:
        self._held |= {name: _Held(part, name) for name in part.tensors}
        self._forget()

    def _note(self, **what: Any) -> None:
        self.changes.append(Change(**what))
        self._forget()

    def _forget(self) -> None:
        self._current = self._layers = None


def matching(patterns: Iterable[str], names: Iterable[str], *, what: str) -> dict[str, str]:
    """Tensors that a pattern names, each with the first that does: by its full name, or by that of
    its layer.

    Raises: PlanError with near names for a pattern that matches nothing.
    """
    tensors = list(names)
    layers: dict[str, list[str]] = {}
    for name in tensors:
        layer = name.rpartition(".")[0]
        if layer:
            layers.setdefault(layer, []).append(name)
    chosen = select.select(list(patterns), [*tensors, *layers], what=what)
    found = {
        name: pattern
        for layer, pattern in chosen.items()
        if layer in layers
        for name in layers[layer]
    }
    return found | {name: pattern for name, pattern in chosen.items() if name not in layers}


def _share(part: Part, names: Mapping[str, str]) -> Part:
    """The tensors of `part` that are keys of `names`, under their new names."""
    if len(names) == len(part.tensors) and all(own == name for own, name in names.items()):
        return part

    def produce() -> Iterator[Piece]:
        for piece in part.produce():
            if piece.name in names:
                yield piece._replace(name=names[piece.name])

    return Part(
        tensors={name: part.tensors[own] for own, name in names.items()},
        nbytes_peak=part.nbytes_peak,
        produce=produce,
        extent=part.extent,  # only parts of one tensor have these
        constant=part.constant,
    )
