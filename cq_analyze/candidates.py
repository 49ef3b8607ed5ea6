"""What could become of each layer: formats, scalings and rotations that are worth comparing, and
what the quantize stage says to each of them, from headers alone.

Owns no judgement of its own: which layer takes what, and what is advised against, are the stage's
words, found by its name in the catalogue. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cq.core import catalog, comfy, recipe, select
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError
from cq.core.formats import Format
from cq.core.recipe import Rule
from cq_analyze.planning import Settings, planned

_CAST_FROM = frozenset({"F32", "F64"})  # a narrower source is as small as a cast would make it
_CASTS = ("bf16", "fp16")
_HEADER_ENTRY = len('"":{"dtype":"F8_E4M3","shape":[10000,10000],"data_offsets":[,]},')


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way of storing layers: names of plugs and settings, as a recipe's rule has them.
    `optimizer` is None for a plain dtype."""

    format: str
    scaling: str
    optimizer: str | None
    rotate: str = "auto"

    @property
    def name(self) -> str:
        """A short name that no two candidates share.

        >>> Candidate(format="int8_tensorwise", scaling="row", optimizer="quip").name
        'int8_tensorwise+rotation'
        """
        plug: Format = catalog.load("formats", self.format)
        scaling = "" if self.scaling == plug.scalings[0] else f"/{self.scaling}"
        rotated = "+rotation" if self.rotates and plug.rotation == "optional" else ""
        group = "" if self.rotate in {"auto", "off"} else self.rotate
        return self.format + scaling + rotated + group

    @property
    def rotates(self) -> bool:
        """Whether it is meant to be rounded in the rotated basis."""
        if self.optimizer is None:
            return False
        chosen: Any = catalog.load("optimizers", self.optimizer)
        plug: Format = catalog.load("formats", self.format)
        told = self.rotate not in {"auto", "off"}
        return bool(chosen.rotates) or told or plug.rotation == "always"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A candidate for one layer.

    `refused` is why it cannot be, then the rest means nothing; `against` why the plan would not do
    it unasked. `group` is the rotation group, `tensors` what is stored by full name, without the
    marker.
    """

    candidate: Candidate
    refused: str | None = None
    against: str | None = None
    group: int | None = None
    tensors: Mapping[str, TensorSpec]
    marker: TensorSpec | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, marker included, without header."""
        marker = 0 if self.marker is None else self.marker.nbytes
        return marker + sum(spec.nbytes for spec in self.tensors.values())

    @property
    def nbytes_header(self) -> int:
        """About how many bytes of header it takes."""
        added = () if self.marker is None else (next(iter(self.tensors)),)
        return sum(_HEADER_ENTRY + len(name) + 16 for name in (*self.tensors, *added))


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A layer that could be stored otherwise, and every candidate for it, in their order."""

    name: str
    spec: TensorSpec
    options: tuple[Option, ...]

    @property
    def layer(self) -> str:
        """The tensor's name without `.weight`."""
        return self.name.removesuffix(comfy.WEIGHT)


def candidates(
    *, formats: Sequence[str] | None = None, allow_custom_loader: bool = False
) -> tuple[Candidate, ...]:
    """Every way worth comparing: each format in each scaling, in the original basis if it stores
    that, and in the rotated one in its default scaling; then the plain dtypes.

    `formats` are the names to choose from, None for all that a released ComfyUI loads, or that a
    custom loader does with `allow_custom_loader`. Raises: PlanError for a name that is none.
    """
    names = catalog.names("formats") if formats is None else tuple(dict.fromkeys(formats))
    found = []
    for name in names:
        plug: Format = catalog.load("formats", name)
        if plug.casts:
            if formats is not None or name in _CASTS:
                found.append(_candidate(name, plug.scalings[0], None))
            continue
        if formats is None and plug.first_comfyui is None and not allow_custom_loader:
            continue
        if plug.rotation != "always":
            found += [_candidate(name, s, "rtn") for s in plug.scalings]
        if plug.rotation != "never":
            found.append(_candidate(name, plug.scalings[0], "quip"))
    return tuple(sorted(found, key=lambda c: c.optimizer is None))


def _candidate(name: str, scaling: str, optimizer: str | None) -> Candidate:
    return Candidate(format=name, scaling=scaling, optimizer=optimizer)


def consider(
    checkpoint: Checkpoint, ways: Sequence[Candidate], asked: Settings
) -> tuple[Considered, ...]:
    """The layers that some candidate can store, and what the quantize stage says to each candidate,
    in the checkpoint's order; of those that `asked` names, if it names any. Of format, scaling,
    optimizer and rotation `asked` has nothing to say: they are the candidates'.

    Raises: PlanError as the quantize stage does: if the checkpoint is quantized already, a pattern
    matches nothing, or there is no such layer at all.
    """
    ways = (*ways, *(w for w in _ruled(asked.rules) if w not in ways))
    free = replace(asked, recipe=(), only=("*",), skip=())
    plans = [
        (
            way,
            _Plan(checkpoint, way, free),
            None if _is_cast(way) else _Plan(checkpoint, way, asked),
        )
        for way in ways
    ]
    able = {
        name
        for _, possible, advised in plans
        if advised is not None
        for name, note in possible.notes.items()
        if note["action"] == "quantize"
    }
    named = _named(sorted(able), asked)
    found = [
        Considered(
            name=name,
            spec=spec,
            options=tuple(
                _option(name, spec, way, possible, advised)
                for way, possible, advised in plans
                if not (_is_cast(way) and spec.dtype not in _CAST_FROM)
            ),
        )
        for name, spec in checkpoint.specs.items()
        if name in named
    ]
    if not found:
        raise PlanError(
            "there is no layer to compare formats for",
            hint=next((p.nothing for _, p, _ in plans if p.nothing), None),
            code="plan.nothing",
        )
    return tuple(found)


def _is_cast(way: Candidate) -> bool:
    return way.optimizer is None


def _ruled(rules: Sequence[Rule]) -> list[Candidate]:
    """The ways that rules ask for by themselves."""
    found = []
    for rule in rules:
        name = rule.settings.get("format")
        if name is None:
            continue
        plug: Format = catalog.load("formats", name)
        scaling = rule.settings.get("scaling", plug.scalings[0])
        default = None if plug.casts else "rtn" if plug.rotation == "never" else "quip"
        optimizer = rule.settings.get("optimizer", default)
        rotate = rule.settings.get("rotate", "auto")
        found.append(Candidate(format=name, scaling=scaling, optimizer=optimizer, rotate=rotate))
    return found


def _named(layers: Sequence[str], asked: Settings) -> frozenset[str]:
    """The tensors that `only` and `skip` leave."""
    bare = {name.removesuffix(comfy.WEIGHT): name for name in layers}
    if asked.only:
        patterns = [recipe.parse_only(text)[0] for text in asked.only]
        tests = [select.matcher(pattern) for pattern in patterns]
        bare = {b: name for b, name in bare.items() if any(test(b) for test in tests)}
    skipped = [select.matcher(pattern) for pattern in asked.skip]
    return frozenset(n for b, n in bare.items() if not any(test(b) for test in skipped))


class _Plan:
    """A checkpoint as the quantize stage would make it, and its words on each layer."""

    def __init__(self, checkpoint: Checkpoint, way: Candidate, asked: Settings) -> None:
        self.notes: dict[str, Mapping[str, Any]] = {}
        self.nothing: str | None = None
        try:
            self.result: Checkpoint = planned(checkpoint, replace(asked, **asdict(way)))
        except PlanError as error:
            if error.code != "plan.nothing":
                raise
            self.nothing = error.hint
            return
        for note in self.result.notes:
            if note["tensor"].endswith(comfy.WEIGHT):
                self.notes[note["tensor"]] = note


def _option(
    name: str, spec: TensorSpec, way: Candidate, possible: _Plan, advised: _Plan | None
) -> Option:
    note = possible.notes.get(name)
    refused = possible.nothing or "nothing can be stored so" if note is None else None
    if note is not None and note["action"] == "keep":
        refused = str(note["reason"])
    elif note is not None and way.rotates and note["rotation"] is None:
        refused = f"K={spec.shape[-1]} takes no rotation, so it is as without"
    if note is None or refused is not None:
        return Option(candidate=way, refused=refused, tensors={})
    marker = name.removesuffix(comfy.WEIGHT) + comfy.MARKER
    return Option(
        candidate=way,
        against=None if advised is None else _against(note, advised, name),
        group=note["rotation"],
        tensors=possible.result.part(name).tensors,
        marker=possible.result.specs.get(marker),
    )


def _against(note: Mapping[str, Any], advised: _Plan, name: str) -> str | None:
    """Why the plan would not do unasked what `note` says."""
    told = advised.notes.get(name)
    if told is None:
        return advised.nothing or "the plan keeps every layer"
    settings = ("action", "format", "scaling", "optimizer", "rotation")
    same = all(told.get(key) == note.get(key) for key in settings)
    return None if same else str(told["reason"])
