"""The quantize stage: which layers, in which formats.

Owns the meeting of recipe, format and optimizer in a plan, from specs alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from cq.core import catalog, comfy, recipe, rotation, select
from cq.core.checkpoint import Checkpoint, Part, Stage, narrowed
from cq.core.dequantize import Dequantize
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.formats import Format
from cq.core.knowledge import AUTO, Knowledge, know
from cq.core.recipe import How, Rule
from cq.core.stored import describe
from cq_quant.layer import Layer, LayerPlan
from cq_quant.optimizers import Optimizer

ROTATIONS = ("auto", "off", "256", "64", "16")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantStage:
    """Stores the linear layers of a checkpoint quantized. See `quantize` for the fields."""

    name: ClassVar[str] = "quant"

    format: str = "int8_tensorwise"
    scaling: str | None = None
    optimizer: str | None = None
    rotate: str = "auto"
    scale_search: bool = True
    family: str = AUTO
    rules: tuple[Rule, ...] = field(default=())
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    allow_custom_loader: bool = False
    save_quant_metadata: bool = False

    def arguments(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["rules"] = [rule.to_dict() for rule in self.rules]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest. Raises: InputError for an unknown or ill-typed argument."""
        defaults = {f.name: f.default for f in fields(cls)}
        select.refuse_unknown(arguments, defaults, "the quant stage")
        return cls(**{key: _typed(key, value, defaults[key]) for key, value in arguments.items()})

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The quantized checkpoint. Raises: PlanError with the reason if it cannot be."""
        _refuse_quantized(source)
        resolver = _Resolver(self, know(source.specs, self.family))
        choices, layers = self._planned(source, resolver, self.rules)
        _refuse_diffusers(source, layers.values())
        parts: list[Part] = []
        for part in source.parts:
            chosen = [name for name in part.tensors if name in layers]
            if not chosen:
                parts.append(part)
                continue
            for name in chosen:
                parts += layers[name].parts()
            rest = [name for name in part.tensors if name not in layers]
            if rest:
                parts.append(narrowed(part, rest))
        return source.after(
            self._without_empty_words(source, resolver, layers),
            parts=tuple(parts),
            metadata=self._metadata(source, layers.values()),
            notes=tuple(_note(choice, layers.get(choice.name)) for choice in choices),
        )

    def _planned(
        self, source: Checkpoint, resolver: _Resolver, rules: Sequence[Rule]
    ) -> tuple[list[recipe.Choice], dict[str, Layer]]:
        """What happens to each tensor, and the layers that change by the name of their weight."""
        choices = recipe.choose(
            source.specs,
            resolver.default(),
            rules=rules,
            only=self.only,
            skip=self.skip,
            known=resolver.known,
            refuse=resolver.refuse,
        )
        planned = (
            Layer(source, choice.name, resolver.plan(choice, choice.how))
            for choice in choices
            if choice.how is not None
        )
        # A cast to the dtype that a tensor has already leaves it to be copied, unread.
        return choices, {o.name: o for o in planned if o.tensors() != {o.name: o.weight}}

    def _without_empty_words(
        self, source: Checkpoint, resolver: _Resolver, layers: Mapping[str, Layer]
    ) -> QuantStage:
        """The stage without rules that say what it would do without them, so that a template used
        unchanged makes the very file that the defaults make."""
        if not self.rules:
            return self
        try:
            _, plain = self._planned(source, resolver, ())
        except PlanError:
            return self
        same = {n: o.plan for n, o in plain.items()} == {n: o.plan for n, o in layers.items()}
        return replace(self, rules=()) if same else self

    def _metadata(self, source: Checkpoint, layers: Any) -> Mapping[str, str]:
        if not self.save_quant_metadata:
            return source.metadata
        marked = {layer.name.removesuffix(comfy.WEIGHT): layer.marker() for layer in layers}
        settings = {name: marker for name, marker in marked.items() if marker}
        return {**source.metadata, comfy.HEADER_KEY: comfy.header_value(settings)}


class _Resolver:
    """Names to plugs, and the settings that a rule left open to those that a format and an
    optimizer go best with."""

    def __init__(self, stage: QuantStage, known: Knowledge) -> None:
        self._stage = stage
        self.known = known

    def default(self) -> How:
        """What layers without a rule get; checked, so that an error names the option."""
        stage = self._stage
        how = How(
            format=stage.format,
            scaling=stage.scaling,
            optimizer=stage.optimizer,
            rotate=stage.rotate,
        )
        self._settings(how)
        return how

    def _settings(self, how: How) -> tuple[Format, str, Optimizer | None, int]:
        """Format, scaling, optimizer and the largest rotation group, 0 for none."""
        format_plug: Format = catalog.load("formats", how.format)
        self._see_loader(format_plug)
        scaling = _scaling(format_plug, how.scaling)
        if format_plug.casts:
            return format_plug, scaling, None, 0
        name = how.optimizer or _optimizer_for(format_plug)
        assert name is not None
        optimizer: Optimizer = catalog.load("optimizers", name)
        return format_plug, scaling, optimizer, largest_group(how.rotate, format_plug, optimizer)

    def _see_loader(self, plug: Format) -> None:
        if plug.first_comfyui is None and not plug.casts and not self._stage.allow_custom_loader:
            raise PlanError(
                f"no released ComfyUI loads the format `{plug.name}`",
                hint=f"add `--allow-custom-loader` if yours has {plug.loader or 'a loader for it'}",
                code="plan.custom_loader",
            )

    def refuse(self, layer: str, weight: TensorSpec, how: How) -> str | None:
        """Why the layer cannot be stored so."""
        format_plug, scaling, _, largest = self._settings(how)
        if format_plug.casts:
            return None
        if recipe.has_role(layer, "embedding") and not format_plug.embeddings:
            return "ComfyUI takes embedding tables in fp8 and int8 only"
        if self._reads_shape(layer) and not format_plug.keeps_shape:
            return "ComfyUI tells the model by this weight's shape, which the format may change"
        if len(weight.shape) == 3:
            if not format_plug.experts:
                return "ComfyUI does not take it for stacked experts"
            weight = TensorSpec(weight.dtype, weight.shape[1:])
        largest = self._for_family(layer, how, largest)
        return format_plug.refuse(weight, scaling, _group(weight, largest, format_plug))

    def _reads_shape(self, layer: str) -> bool:
        told = self.known.reads_shape(layer)
        return recipe.has_role(layer, "detection") if told is None else told

    def _for_family(self, layer: str, how: How, largest: int) -> int:
        """The largest rotation group, if it may be chosen, as the layer's family calls for it."""
        wanted = self.known.rotation(layer)
        return min(largest, wanted) if wanted and how.rotate == "auto" else largest

    def plan(self, choice: recipe.Choice, how: How) -> LayerPlan:
        """The plan of a layer that is not refused."""
        format_plug, scaling, optimizer, largest = self._settings(how)
        largest = self._for_family(choice.layer, how, largest)
        return LayerPlan(
            format=format_plug,
            scaling=scaling,
            optimizer=optimizer,
            group=_group(choice.weight, largest, format_plug),
            search=self._stage.scale_search,
        )


def quantize(
    checkpoint: Checkpoint,
    *,
    format: str = "int8_tensorwise",
    scaling: str | None = None,
    optimizer: str | None = None,
    rotate: str = "auto",
    scale_search: bool = True,
    family: str = AUTO,
    recipe: str | os.PathLike[str] | Sequence[Rule] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    requantize: bool = False,
    allow_custom_loader: bool = False,
    save_quant_metadata: bool = False,
) -> Checkpoint:
    """A checkpoint whose linear layers are stored quantized; nothing is computed yet.

    `scaling` None is the format's default, `optimizer` None is `quip` where the format stores
    rotated weights and `rtn` elsewhere. `rotate` is `auto` (as the optimizer works), `off`, or the
    largest ConvRot group; a layer whose K it does not divide takes the next smaller one, or none.
    `scale_search` chooses scales of least error where that pays, rather than the largest weight's.
    `family` is `auto` (found by names and shapes), `none`, or a family's name; it says which layers
    keep their precision. `recipe` is a file or rules for single layers; `only` and `skip` are
    patterns over layer names, in `only` also `PATTERN=FORMAT`. A format that is a plain dtype
    applies to all tensors and undoes a quantization; with `requantize` a quantized checkpoint is
    dequantized first. With `save_quant_metadata` the markers stand in the header as well.

    Raises: PlanError if the checkpoint is quantized already, a pattern matches nothing, or there is
    nothing to quantize; InputError for a recipe that is none.
    """
    from cq.core.recipe import load_recipe

    rules = load_recipe(recipe) if isinstance(recipe, str | os.PathLike) else tuple(recipe)
    plug: Format = catalog.load("formats", format)
    stage = QuantStage(  # with the defaults spelt out, so that a file's history says what was done
        format=format,
        scaling=scaling or plug.scalings[0],
        optimizer=optimizer or _optimizer_for(plug),
        rotate=rotate,
        scale_search=scale_search,
        family=family,
        rules=rules,
        only=tuple(only),
        skip=tuple(skip),
        allow_custom_loader=allow_custom_loader,
        save_quant_metadata=save_quant_metadata,
    )
    if comfy.find_quantized(checkpoint) and (requantize or plug.casts):
        return _again(checkpoint, stage)
    return stage.apply(checkpoint)


def _again(checkpoint: Checkpoint, stage: QuantStage) -> Checkpoint:
    """`stage` after a dequantization: exact where weights are rounded again; layers that are kept
    this time come back in the dtype that they had, not in float32."""
    plain = Dequantize().apply(checkpoint)
    were = {note["layer"] for note in plain.notes}
    model = stage.apply(plain)
    kept = sorted(n["layer"] for n in model.notes if n["action"] == "keep" and n["layer"] in were)
    if not kept:
        return model
    return stage.apply(Dequantize(kept=tuple(kept)).apply(checkpoint))


def _typed(key: str, value: Any, default: Any) -> Any:
    if key == "rules" and isinstance(value, list):
        return tuple(
            Rule.from_dict(rule, where=f"rule {i + 1} of the quant stage")
            for i, rule in enumerate(value)
        )
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif type(value) is type(default) or (default is None and isinstance(value, str)):
        return value
    raise InputError(
        f"the quant stage's argument `{key}` cannot be `{value!r}`", code="input.manifest"
    )


def _note(choice: recipe.Choice, layer: Layer | None) -> dict[str, Any]:
    note: dict[str, Any] = {
        "layer": choice.layer if choice.name.endswith(comfy.WEIGHT) else choice.name,
        "shape": list(choice.weight.shape),
        "dtype": choice.weight.dtype,
        "action": "keep" if layer is None else "quantize",
        "reason": choice.reason,
        "nbytes": choice.weight.nbytes,
    }
    if layer is None:
        return (
            note if choice.how is None else note | {"reason": f"is {choice.weight.dtype} already"}
        )
    plan = layer.plan
    stored = layer.tensors().values()
    return note | {
        "format": plan.format.name,
        "first_comfyui": plan.format.first_comfyui,
        "scaling": plan.scaling,
        "optimizer": None if plan.optimizer is None else plan.optimizer.name,
        "rotation": plan.group,
        "note": _remark(layer, choice.how),
        "nbytes_after": sum(spec.nbytes for spec in stored),
    }


def _remark(layer: Layer, how: How | None) -> str | None:
    plan, columns = layer.plan, layer.matrix.shape[-1:]
    if plan.optimizer is None or how is None:
        return None
    largest = largest_group(how.rotate, plan.format, plan.optimizer)
    if largest and plan.group != largest:
        instead = "is not rotated" if plan.group is None else f"takes rotation group {plan.group}"
        return f"K={columns[0]} is not a multiple of {largest}, so it {instead}"
    return plan.optimizer.note


def _optimizer_for(plug: Format) -> str | None:
    """The optimizer that a format goes best with; None for a plain dtype, which needs none."""
    if plug.casts:
        return None
    return "rtn" if plug.rotation == "never" else "quip"


def _scaling(plug: Format, scaling: str | None) -> str:
    if scaling is None:
        return plug.scalings[0]
    if scaling not in plug.scalings:
        raise PlanError(
            f"format `{plug.name}` has no scaling `{scaling}`",
            hint="it has " + " and ".join(f"`{s}`" for s in plug.scalings),
            code="plan.scaling",
        )
    return scaling


def largest_group(rotate: str, plug: Format, optimizer: Optimizer) -> int:
    """The largest rotation group that layers may take; 0 for no rotation."""
    if rotate not in ROTATIONS:
        raise UsageError(
            f"there is no rotation `{rotate}`", hint="choose from " + ", ".join(ROTATIONS)
        )
    if plug.rotation == "never":
        if optimizer.rotates or rotate not in {"auto", "off"}:
            asks = f"optimizer `{optimizer.name}`" if optimizer.rotates else f"`--rotate {rotate}`"
            raise PlanError(
                f"{asks} needs the rotated basis, which the format `{plug.name}` does not store",
                hint="use `--optimizer rtn`, or a format that stores it, such as int8_tensorwise",
                code="plan.rotate",
            )
        return 0
    if rotate == "off":
        if optimizer.rotates:
            raise UsageError(
                f"optimizer `{optimizer.name}` works in the rotated basis",
                hint="use `--optimizer rtn` for the original basis, or leave `--rotate` out",
                code="usage.rotate",
            )
        if plug.rotation == "always":
            raise PlanError(
                f"the format `{plug.name}` is always rotated",
                hint="leave `--rotate` out",
                code="plan.rotate",
            )
        return 0
    if rotate == "auto":
        return rotation.GROUPS[0] if optimizer.rotates or plug.rotation == "always" else 0
    return int(rotate)


def _group(weight: TensorSpec, largest: int, plug: Format) -> int | None:
    if len(weight.shape) == 3 and plug.rotation == "optional":
        return None  # ComfyUI drops the rotation's flag for stacked experts
    if not largest or len(weight.shape) not in {2, 3}:
        return None
    return rotation.group_for(weight.shape[-1], largest)


def _refuse_quantized(source: Checkpoint) -> None:
    found = comfy.find_quantized(source)
    if found:
        first = found[0]
        raise PlanError(
            f"`{source.sources[0].shown}` is quantized already: {describe(source)},"
            f" such as `{first.layer}` (by its {first.evidence})",
            where=first.layer,
            hint="start from the unquantized checkpoint, since rounding twice adds both errors;"
            " or add `--requantize`, or undo the quantization with `--format bf16`",
            code="plan.already_quantized",
        )


def _refuse_diffusers(source: Checkpoint, layers: Any) -> None:
    model = comfy.diffusers_model(source.specs)
    quantized = [layer for layer in layers if not layer.plan.format.casts]
    if model is not None and quantized:
        raise PlanError(
            f"`{source.sources[0].shown}` has the layer names of diffusers ({model}), which ComfyUI"
            " renames while it loads, without the markers and scales of quantized layers: it would"
            " compute with raw codes and say nothing",
            where=quantized[0].name,
            hint="start from the checkpoint with the model's own names, as ComfyUI distributes it",
            code="plan.diffusers",
        )
