"""The merge stage: which adapters, how strongly, and the tensors that they change.

Owns dampening and the check that base and adapters agree. Plans from headers and scalars alone.
Knows nothing of adapter kinds (`cq_merge.adapters`), of names (`cq.core.names`), of the arithmetic
(`cq_merge.weights`) or of quantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from cq.core import catalog, comfy, select
from cq.core.checkpoint import Checkpoint, Part, Stage, from_source, narrowed
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError, UsageError
from cq.core.names import Names, Target
from cq.core.source import Source
from cq.core.text import printable
from cq_merge import adapters as kinds
from cq_merge import inputs
from cq_merge.adapters.checkpoint import CheckpointChange
from cq_merge.contents import Contents
from cq_merge.methods import Method
from cq_merge.notes import AdapterPlan, layer_of
from cq_merge.precedence import Claimed, doubled, superseded
from cq_merge.weights import Merged, Placed

DAMPENING = 0.9  # of each adapter against the one before it
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStage:
    """Adds adapters to the weights of a checkpoint. See `merge` for the fields."""

    name: ClassVar[str] = "merge"

    adapters: tuple[inputs.AdapterFile, ...]
    origin: inputs.Origin | None = None
    scale: float = 1.0
    dampen: bool = False
    allow_unmatched: bool = False
    alpha: float | Literal["tensors"] | None = None
    as_comfyui: bool = False
    method: str = "sum"
    density: float | None = None
    seed: int = 0
    dtype: str | None = None
    names: Mapping[str, str] = field(default_factory=dict, hash=False)

    def arguments(self) -> dict[str, Any]:
        """The fields as plain JSON; paths are absolute. What is as it would be unsaid is left out,
        but for what older versions say."""
        found: dict[str, Any] = {
            "adapters": [adapter.to_manifest() for adapter in self.adapters],
            "scale": self.scale,
            "dampen": self.dampen,
            "allow_unmatched": self.allow_unmatched,
        }
        if self.origin is not None:
            found["origin"] = self.origin.to_manifest()
        if self.names:
            found["names"] = dict(self.names)
        others = {key: getattr(self, key) for key in _DEFAULTS}
        return found | {key: value for key, value in others.items() if value != _DEFAULTS[key]}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest.

        Raises: InputError for an unknown or ill-typed argument or an adapter that cannot be read,
        PlanError if an adapter has changed since the manifest was made.
        """
        select.refuse_unknown(arguments, (*_KEYS, *_DEFAULTS), "the merge stage")
        entries = arguments.get("adapters")
        if not isinstance(entries, list) or not entries:
            raise inputs.ill_typed("adapters", entries)
        files = tuple(inputs.from_manifest(entry) for entry in entries)
        origin = arguments.get("origin")
        return cls(
            adapters=files,
            origin=None if origin is None else inputs.origin_from_manifest(origin),
            scale=inputs.number(arguments, "scale"),
            dampen=inputs.flag(arguments, "dampen", len(files) > 1),
            allow_unmatched=inputs.flag(arguments, "allow_unmatched", False),
            names=inputs.texts(arguments, "names"),
            **{key: _typed(key, arguments[key]) for key in _DEFAULTS if key in arguments},
        )

    def effective_strengths(self) -> tuple[float, ...]:
        """Each adapter's strength after scale and dampening, in the order given."""
        return tuple(
            adapter.strength * self.scale * (DAMPENING**n if self.dampen else 1.0)
            for n, adapter in enumerate(self.adapters)
        )

    def plan(self, source: Checkpoint) -> MergePlan:
        """What each adapter changes. Raises: PlanError if an adapter does not fit, InputError if it
        is not sound, UsageError if there is an origin and no whole model."""
        adapters = tuple(self._match(source))
        if self.origin is not None and not any(kinds.CHECKPOINT in a.kinds for a in adapters):
            raise UsageError(
                f"`{printable(self.origin.path)}` is what whole models would differ from, and no"
                " adapter is one",
                hint="leave `--from` out",
            )
        return MergePlan(source, self, adapters)

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The merged checkpoint. Raises: as `plan`; PlanError if a weight to be changed is
        quantized."""
        plan = self.plan(source)
        _refuse_quantized(source, plan)
        return source.after(
            self,
            parts=tuple(_parts(source, plan.merged)),
            inputs=(*source.inputs, *(file for a in self.beside() for file in a.files)),
            notes=tuple(adapter.note() for adapter in plan.adapters),
        )

    def beside(self) -> Iterator[Source]:
        """The opened files beside the base."""
        for adapter in self.adapters:
            yield adapter.contents.source
        if self.origin is not None:
            yield self.origin.source

    def _match(self, source: Checkpoint) -> Iterator[AdapterPlan]:
        names = Names(source.specs, extra=self.names)
        reading = kinds.Reading(as_comfyui=self.as_comfyui, alpha=self.alpha)
        strengths = self.effective_strengths()
        for number, (adapter, strength) in enumerate(zip(self.adapters, strengths, strict=True)):
            claims = kinds.claim_all(adapter.contents, reading)
            if any(kind == kinds.CHECKPOINT for kind, _ in claims):
                claims = self._second_model(adapter, claims)
            found = _matched(adapter, claims, names, source, as_comfyui=self.as_comfyui)
            if found.unmatched and not (found.matched and self.allow_unmatched):
                raise _unmatched(adapter.contents, names, source, found, len(claims))
            placed = [
                (target.tensor, Placed(change, number, strength, *target[1:]))
                for n, (change, targets) in enumerate(found.matched)
                if n not in found.left_out
                for target in targets
            ]
            yield replace(found, strength=strength, placed=tuple(placed))

    def _second_model(
        self, adapter: inputs.AdapterFile, claims: list[tuple[str, kinds.Change]]
    ) -> list[tuple[str, kinds.Change]]:
        """The tensors of a whole model, as what they add to the base or differ from the origin."""
        found = comfy.find_quantized(from_source(adapter.contents.source))
        if found:
            raise PlanError(
                f"`{adapter.contents.shown}` is quantized, such as `{found[0].layer}`"
                f" (by its {found[0].evidence}), so its weights cannot be merged as they are",
                where=found[0].layer,
                hint="undo the quantization first: `cq quant --format bf16`",
                code="plan.merge_quantized",
            )
        if self.origin is None:
            return claims
        origin = from_source(self.origin.source)
        return [
            (kind, replace(change, origin=origin))
            if isinstance(change, CheckpointChange)
            else (kind, change)
            for kind, change in claims
        ]


@dataclass(frozen=True)  # no slots: what follows from the fields is found once
class MergePlan:
    """What a merge does to `source`: per adapter what it changes, and the tensors that change."""

    source: Checkpoint
    stage: MergeStage
    adapters: tuple[AdapterPlan, ...]

    @cached_property
    def touched(self) -> dict[str, list[Placed]]:
        """The changes to each tensor, by its name."""
        found: dict[str, list[Placed]] = {}
        for adapter in self.adapters:
            for name, placed in adapter.placed:
                # A strength of 0 leaves a weight as it is, to the byte.
                if placed.strength:
                    found.setdefault(name, []).append(placed)
        return found

    @cached_property
    def merged(self) -> dict[str, Merged]:
        """The tensors that change, by name."""
        stage = self.stage
        method: Method = catalog.load("methods", stage.method)
        return {
            name: Merged(
                source=self.source,
                name=name,
                changes=tuple(changes),
                dtype=DTYPES[stage.dtype] if stage.dtype else self.source.specs[name].dtype,
                method=None if method.additive else method,
                density=method.density if stage.density is None else stage.density,
                seed=stage.seed,
                in_turn=stage.as_comfyui,
            )
            for name, changes in self.touched.items()
        }


def _matched(
    adapter: inputs.AdapterFile,
    claims: Sequence[tuple[str, kinds.Change]],
    names: Names,
    source: Checkpoint,
    *,
    as_comfyui: bool,
) -> AdapterPlan:
    matched: list[Claimed] = []
    unmatched: list[str] = []
    for kind, change in claims:
        places = names.find(change.key, change.parameter)
        if len(places) > 1:
            raise PlanError(
                f"the key `{printable(change.key)}` of `{adapter.contents.shown}` names several"
                f" layers of {_shown(source)}: "
                + " and ".join(f"`{layer_of(place[0].tensor)}`" for place in places[:2]),
                where=adapter.contents.shown,
                hint="say which is meant with `--map FILE`",
                code="plan.adapter_ambiguous",
            )
        if places:
            _check_fit(adapter.contents, change, source, places[0])
            matched.append((kind, change, places[0]))
        else:
            unmatched.append(change.key)
    left_out = dict(superseded(matched))
    return AdapterPlan(
        file=adapter,
        kinds=tuple(sorted({kind for kind, _ in claims})),
        matched=tuple((change, place) for _, change, place in matched),
        unmatched=tuple(unmatched),
        left_out=frozenset(left_out) if as_comfyui else frozenset(),
        said=(*left_out.values(), *doubled(matched)),
    )


def _check_fit(
    adapter: Contents, change: kinds.Change, source: Checkpoint, place: tuple[Target, ...]
) -> None:
    """Raises: PlanError if the rows cannot take the change."""
    name = place[0].tensor
    spec = source.specs[name]
    refusal: str | None
    if change.whole and len(place) > 1:
        refusal = f"`{printable(change.key)}` mixes rows that stand apart here"
    else:
        rows = sum(target.count for target in place)
        taken = TensorSpec(spec.dtype, (rows, *spec.shape[1:])) if spec.shape else spec
        refusal = change.refuse(taken)
        grows = refusal is None and change.shape(taken.shape) != taken.shape
        if grows and (len(place) > 1 or taken.shape != spec.shape):
            refusal = f"`{printable(change.key)}` makes a weight grow of which it has rows alone"
    if refusal is None:
        return
    part = "" if len(place) == 1 and place[0].count in spec.shape[:1] else " (rows of it)"
    raise PlanError(
        f"`{adapter.shown}` does not fit: {refusal},"
        f" and `{name}` of {_shown(source)} is {spec}{part}",
        where=name,
        hint="was it trained for another model?",
        code="plan.adapter_shape",
    )


def _refuse_quantized(source: Checkpoint, plan: MergePlan) -> None:
    evidence = {found.layer: found.evidence for found in comfy.find_quantized(source)}
    for name in plan.touched:
        spec, layer = source.specs[name], name.removesuffix(comfy.WEIGHT)
        if name.endswith(comfy.WEIGHT) and evidence.get(layer, "dtype") != "dtype":
            why = f"quantized, by its {evidence[layer]}"
        elif not spec.is_float:
            why = "not a 16, 32 or 64 bit float"
        else:
            continue
        raise PlanError(
            f"tensor `{name}` of {_shown(source)} is {spec} ({why}), so nothing can be added to it",
            where=name,
            hint="merge into the unquantized checkpoint, then quantize the result",
            code="plan.merge_quantized",
        )


def _unmatched(
    adapter: Contents, names: Names, source: Checkpoint, found: AdapterPlan, total: int
) -> PlanError:
    if kinds.is_adapter(source.specs):
        return PlanError(
            f"{_shown(source)} is an adapter itself, so nothing can be merged into it",
            where=source.sources[0].shown,
            hint="the model comes first: "
            + (
                f"`cq merge {printable(adapter.shown)} {printable(source.sources[0].shown)}`"
                if kinds.CHECKPOINT in found.kinds
                else "`cq merge MODEL ADAPTER ADAPTER` merges both"
            ),
            code="plan.adapter_base",
        )
    first = found.unmatched[0]
    matched = total - len(found.unmatched)
    hints: list[str | None]
    components = {names.component_of(key) for key in found.unmatched}
    component = components.pop() if len(components) == 1 else None
    if component is not None and not names.holds(component):
        what = "its other keys" if matched else "all its keys"
        hints = [f"{what} are for a {component}, and {_shown(source)} holds none that cq knows;"]
    else:
        hints = [names.near(first)]
        if not matched:
            hints.append(
                "was it trained for another model? If its names are merely unusual, say with"
                " `--map FILE` which layers they mean"
            )
    if matched:
        hints.append("add `--allow-unmatched` to leave such keys out")
    return PlanError(
        f"the key `{printable(first)}` of `{adapter.shown}` names no layer of {_shown(source)};"
        f" {matched} of {total} keys do",
        where=adapter.shown,
        hint=" ".join(hint for hint in hints if hint).removesuffix(";"),
        code="plan.adapter_unmatched",
    )


def _parts(source: Checkpoint, merged: Mapping[str, Merged]) -> Iterator[Part]:
    for part in source.parts:
        touched = [name for name in part.tensors if name in merged]
        if not touched:
            yield part
            continue
        for name in touched:
            yield merged[name].part()
        rest = [name for name in part.tensors if name not in merged]
        if rest:
            yield narrowed(part, rest)


def _shown(source: Checkpoint) -> str:
    return " and ".join(f"`{s.shown}`" for s in source.sources)


_KEYS = ("adapters", "origin", "scale", "dampen", "allow_unmatched", "names")
_DEFAULTS: dict[str, Any] = {
    "alpha": None,
    "as_comfyui": False,
    "method": "sum",
    "density": None,
    "seed": 0,
    "dtype": None,
}


def _typed(key: str, value: Any) -> Any:
    """An argument of a manifest. Raises: InputError if it cannot be one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    sound = {
        "alpha": value == "tensors" or (number and abs(value) < float("inf")),
        "as_comfyui": isinstance(value, bool),
        "method": isinstance(value, str) and value in catalog.names("methods"),
        "density": number and 0 < value <= 1,
        "seed": isinstance(value, int) and number and 0 <= value < 2**63,
        "dtype": isinstance(value, str) and value in DTYPES,
    }
    if not sound[key]:
        raise inputs.ill_typed(key, value)
    return float(value) if key in {"alpha", "density"} and number else value
