"""Tensors of another file: `--add-keys FILE[:PATTERN]`.

Owns the file's words and its fingerprint, and that no value comes in that is none. With a quantized
weight come its scales and its marker, and its entry in the header where there is such a form; the
file's other metadata stays behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cq.core import comfy, select
from cq.core.checkpoint import Part, Piece, from_source
from cq.core.dtypes import DTYPES
from cq.core.errors import InputError, PlanError
from cq.core.source import FINGERPRINT, Source, check_fingerprint, largest_cut, open_source
from cq.core.stored import is_optional, is_owned, is_scale
from cq.core.text import printable
from cq_edit import headers
from cq_edit.choosing import together
from cq_edit.draft import Draft, matching

_KEYS = ("path", "pattern", *FINGERPRINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A file that is open, the tensors of it that are asked for (None: all), and the fingerprint
    that it was opened with."""

    path: str
    pattern: str | None
    fingerprint: Mapping[str, Any] = field(hash=False)
    source: Source = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Addition:
        """The addition `FILE` or `FILE:PATTERN`. Raises: InputError if the file cannot be read."""
        path, pattern = split_path(text)
        return cls.opened(path, pattern)

    @classmethod
    def opened(
        cls, path: str, pattern: str | None, expected: Mapping[str, Any] | None = None
    ) -> Addition:
        """The addition of a file. Raises: InputError; PlanError if it is not as `expected`."""
        if pattern is not None:
            select.matcher(pattern)
        source = open_source(path)
        if expected:
            check_fingerprint(source, expected)
        return cls(
            path=os.path.abspath(source.path),
            pattern=pattern,
            fingerprint=source.fingerprint(),
            source=source,
        )

    @classmethod
    def from_manifest(cls, entry: Any) -> Addition:
        """The addition of a manifest's entry. Raises: as `opened`."""
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise _ill_typed(entry)
        select.refuse_unknown(entry, _KEYS, "an added file of the edit stage")
        pattern = entry.get("pattern")
        if pattern is not None and not isinstance(pattern, str):
            raise _ill_typed(entry)
        return cls.opened(
            entry["path"], pattern, {key: entry[key] for key in FINGERPRINT if key in entry}
        )

    def to_dict(self) -> dict[str, Any]:
        """The addition as a manifest has it."""
        pattern = {} if self.pattern is None else {"pattern": self.pattern}
        return {"path": self.path, **pattern, **self.fingerprint}


def _ill_typed(value: object) -> InputError:
    return InputError(
        f"the edit stage's argument `add_keys` cannot hold `{printable(repr(value))}`",
        code="input.manifest",
    )


def split_path(text: str) -> tuple[str, str | None]:
    """Path and pattern in `FILE:PATTERN`; colons may stand in both.

    >>> split_path("no-such.safetensors:re:^a:b$")
    ('no-such.safetensors', 're:^a:b$')
    """
    if os.path.exists(text):
        return text, None
    places = [i for i, sign in enumerate(text) if sign == ":" and i]
    for place in reversed(places):
        if os.path.exists(text[:place]):
            return text[:place], text[place + 1 :] or None
    # No such file: the name ends where names of files do, for an error that says what is missing.
    for place in places:
        if Path(text[:place]).suffix in {".safetensors", ".json"}:
            return text[:place], text[place + 1 :] or None
    return text, None


def add(draft: Draft, addition: Addition, *, replace: bool, allow_broken: bool) -> None:
    """Add an addition's tensors.

    Raises: PlanError for a name that is taken, unless `replace`, for a pattern that matches
    nothing, and for scales or markers without the weight that they belong to; InputError for
    markers that cannot be read.
    """
    other = Draft.of(from_source(addition.source))
    shown = addition.source.shown
    try:
        headers.settle(other, None)
    except PlanError as error:
        error.hint = f"settle it first, with `cq edit {shown} --prefer header|markers`"
        raise
    names = list(other.specs)
    if addition.pattern is not None:
        named = set(matching([addition.pattern], names, what=f"tensor of `{shown}`"))
        named |= together(other.layers().values(), named)
        names = [name for name in names if name in named]
    taken = [name for name in names if name in draft]
    if taken and not replace:
        raise PlanError(
            f"`{printable(taken[0])}` of `{shown}` is in {draft.shown} already"
            + (f", as {len(taken) - 1} others are" if len(taken) > 1 else ""),
            where=taken[0],
            hint="add `--replace` to put the added ones in their place, or name fewer with"
            f" `{shown}:PATTERN`",
            code="plan.tensor_exists",
        )
    if not allow_broken:
        _refuse_torn(draft, other, shown, set(names))
    _make_room(draft, taken)
    reason = f"from `{Path(addition.path).name}`"
    for name in names:
        part = other.part(name)
        draft.add(part if allow_broken else _sound(part, name, shown), reason)
    draft.inputs += addition.source.files
    _carry_markers(draft, other, set(names), reason)


def _sound(part: Part, name: str, shown: str) -> Part:
    """The part, whose values are looked at while they are copied, if its dtype has any that are
    none."""
    dtype = part.tensors[name].dtype
    if not (DTYPES[dtype].is_float or dtype.startswith("F8_")):
        return part
    scale = is_scale(name.rpartition(".")[2])

    def produce() -> Iterator[Piece]:
        import torch

        for piece in part.produce():
            # Float8 knows neither comparison nor sums
            value = piece.tensor.float() if piece.tensor.element_size() == 1 else piece.tensor
            bad = None if bool(torch.isfinite(value).all()) else "NaN or infinite values"
            if bad is None and scale:
                # Block scales, which have fewer bits, are zero for equal weights.
                wrong = value <= 0 if piece.tensor.element_size() >= 4 else value < 0
                bad = "scales that are zero or negative" if bool(wrong.any()) else None
            if bad is not None:
                raise InputError(
                    f"tensor `{printable(name)}` of `{shown}` holds {bad}",
                    where=name,
                    hint=f"mend the file, or add fewer tensors with `{shown}:PATTERN`;"
                    " `--allow-broken` adds them all the same",
                    code="input.nonfinite",
                )
            yield piece

    elements = largest_cut(part.tensors[name])
    return Part(
        tensors=part.tensors,
        nbytes_peak=part.nbytes_peak + elements * 5,  # in float32, and which are finite
        produce=produce,
    )


def _refuse_torn(draft: Draft, other: Draft, shown: str, names: set[str]) -> None:
    """Raises: PlanError if a quantized layer would have a part of another file beside its codes."""
    sound = {n for layer in other.layers().values() for n in layer.owned.values()}
    layers = draft.layers()
    for name in sorted(names):
        layer, _, local = name.rpartition(".")
        if layer not in layers or not is_owned(local):
            continue
        alone = layers[layer].tensors.get("weight") not in names
        if alone and (name not in sound or not is_optional(local)):
            raise PlanError(
                f"`{printable(name)}` of `{shown}` would be read with the codes of {draft.shown},"
                " to which it does not belong",
                where=name,
                hint=f"add the layer, with `{shown}:{printable(layer)}.*` and `--replace`;"
                " `--allow-broken` does it all the same",
                code="plan.torn_layer",
            )


def _make_room(draft: Draft, taken: list[str]) -> None:
    """Take away what belonged to quantized weights that are replaced."""
    weights = {name for name in taken if name.endswith(comfy.WEIGHT)}
    gone = together(draft.layers().values(), weights) - set(taken)
    draft.remove(dict.fromkeys(gone, "belongs to a weight that is replaced"))
    for name in weights:
        layer = name.removesuffix(comfy.WEIGHT)
        if draft.header is not None and layer in draft.header:
            draft.set_entry(layer, None, "its weight is replaced")


def _carry_markers(draft: Draft, other: Draft, names: set[str], reason: str) -> None:
    for layer in other.layers():
        marker = layer + comfy.MARKER
        settings = other.settings(layer)
        if settings is None or not names & {layer + comfy.WEIGHT, marker}:
            continue
        if draft.header is not None:
            draft.set_entry(layer, settings, reason)
        if marker not in draft:
            draft.set_marker(layer, settings, reason)
