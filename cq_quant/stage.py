"""The quantize stage: which layers, in which formats.

Owns the meeting of recipe, format and optimizer in a plan, from specs alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from cq.core import catalog, comfy, recipe, select
from cq.core.checkpoint import Checkpoint, Part, Stage, narrowed
from cq.core.dequantize import Dequantize
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.formats import Format
from cq.core.knowledge import AUTO, know
from cq.core.native import NativeNames, recognize
from cq.core.recipe import Rule
from cq.core.stored import describe, stored_layers
from cq_quant.guidance import (
    CalibrationFile,
    Guidance,
    LoraFile,
    check_setting,
    files_of,
    opened_calibration,
    opened_lora,
    see_settings_used,
)
from cq_quant.layer import Layer, is_stored_so
from cq_quant.settings import Resolver, optimizer_for

_READY = "is stored so already"


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
    requantize: bool = False
    allow_custom_loader: bool = False
    save_quant_metadata: bool = False
    calibration: CalibrationFile | None = None
    calibration_loras: tuple[LoraFile, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The fields as plain JSON; those of guidance only where there is some."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["rules"] = [rule.to_dict() for rule in self.rules]
        for key in _GUIDING:
            if not found[key]:
                del found[key]
        if self.calibration is not None:
            found["calibration"] = self.calibration.to_manifest()
        if self.calibration_loras:
            found["calibration_loras"] = [lora.to_manifest() for lora in self.calibration_loras]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        """The stage of a manifest. Raises: InputError for an unknown or ill-typed argument."""
        defaults = {f.name: f.default for f in fields(cls)}
        select.refuse_unknown(arguments, defaults, "the quant stage")
        return cls(
            **{
                key: _GUIDING[key](value) if key in _GUIDING else _typed(key, value, defaults[key])
                for key, value in arguments.items()
            }
        )

    def apply(self, source: Checkpoint) -> Checkpoint:
        """The quantized checkpoint. Raises: PlanError with the reason if it cannot be."""
        if not self.requantize:
            _refuse_quantized(source)
        return self._spelt_out()._apply(source)

    def _spelt_out(self) -> QuantStage:
        """The stage with its defaults named, so that a file's history says what was done."""
        plug: Format = catalog.load("formats", self.format)
        return replace(
            self,
            scaling=self.scaling or plug.scalings[0],
            optimizer=self.optimizer
            or optimizer_for(plug, self.rotate, calibrated=self.calibration is not None),
        )

    def _apply(self, source: Checkpoint) -> Checkpoint:
        resolver = Resolver(self, know(source.specs, self.family))
        choices, layers = self._planned(source, resolver, self.rules)
        _refuse_diffusers(source, layers.values())
        guidance = self._guided(source, layers)
        parts: list[Part] = []
        for part in source.parts:
            if layers.keys().isdisjoint(part.tensors):
                parts.append(part)
                continue
            for name in part.tensors:
                if name in layers:
                    parts += layers[name].parts()
            rest = [name for name in part.tensors if name not in layers]
            if rest:
                parts.append(narrowed(part, rest))
        return source.after(
            self._without_empty_words(source, resolver, layers),
            parts=tuple(parts),
            metadata=self._metadata(source, layers.values()),
            notes=tuple(_note(choice, layers.get(choice.name)) for choice in choices),
            inputs=(*source.inputs, *files_of(self.calibration, self.calibration_loras)),
            outcomes=source.outcomes if guidance is None else (*source.outcomes, guidance.tally),
        )

    def _guided(self, source: Checkpoint, layers: dict[str, Layer]) -> Guidance | None:
        """What guides the rounding, told to the layers that use it."""
        optimizers = {o.plan.optimizer for o in layers.values() if o.plan.optimizer is not None}
        see_settings_used(self.settings, optimizers, calibrated=self.calibration is not None)
        if self.calibration is None:
            if self.calibration_loras:
                raise UsageError(
                    "`--calibration-lora` adds to a calibration, and there is none",
                    hint="add `--calibration FILE`",
                    code="usage.calibration_lora",
                )
            return None
        guidance = Guidance(self.calibration, self.calibration_loras, source, self.family)
        for name, layer in layers.items():
            optimizer = layer.plan.optimizer
            if optimizer is not None and optimizer.calibrates and name.endswith(comfy.WEIGHT):
                own = guidance.of(name.removesuffix(comfy.WEIGHT), layer.matrix.shape[-1])
                layers[name] = replace(layer, guide=own)
        guided = [n.removesuffix(comfy.WEIGHT) for n, o in layers.items() if o.guide is not None]
        guidance.see_used(guided, layers)
        return guidance

    def again(self, quantized: Checkpoint) -> Checkpoint:
        """`apply` to a quantized checkpoint. The layers that are stored anew are dequantized to
        float32; all others stay quantized as they are, among them those that are stored already as
        is asked: their values are levels, which no rounding could come nearer to.

        Raises: PlanError as `apply`, InputError for layers that no format reads.
        """
        plain = Dequantize().apply(quantized)
        were = {note["layer"]: note for note in plain.notes}
        choices, layers = self._planned(
            plain, Resolver(self, know(plain.specs, self.family)), self.rules
        )
        stored = stored_layers(quantized)
        ready = {n for n, own in stored.items() if is_stored_so(own, layers.get(n + comfy.WEIGHT))}
        anew = {_told(choice) for choice in choices if choice.how is not None} & set(were) - ready
        if ready and not {name.removesuffix(comfy.WEIGHT) for name in layers} - ready:
            notes = tuple(
                _note(c, None) | ({"reason": _READY} if _told(c) in ready else {}) for c in choices
            )
            return replace(quantized, notes=notes)  # nothing is done, so no stage says so
        if anew and anew != set(were):
            plain = Dequantize(layers=tuple(sorted(anew))).apply(quantized)
        model = self.apply(plain if anew else quantized)
        # What a layer saves is counted from what the file holds of it.
        told: list[Mapping[str, Any]] = []
        for note in model.notes:
            if note["layer"] in anew:
                note = {**note, "nbytes": were[note["layer"]]["nbytes"]}
            elif note["layer"] in ready:
                note = {**note, "reason": _READY}
            told.append(note)
        return replace(model, notes=tuple(told))

    def _planned(
        self, source: Checkpoint, resolver: Resolver, rules: Sequence[Rule]
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
            Layer(source, choice.name, resolver.kind(choice.layer, choice.weight, choice.how))
            for choice in choices
            if choice.how is not None
        )
        # A cast to the dtype that a tensor has already leaves it to be copied, unread.
        return choices, {layer.name: layer for layer in planned if layer.kind.changes}

    def _without_empty_words(
        self, source: Checkpoint, resolver: Resolver, layers: Mapping[str, Layer]
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
        settings = comfy.header_layers(source.metadata)
        settings |= {name: marker for name, marker in marked.items() if marker}
        if not settings:
            return source.metadata
        return {**source.metadata, comfy.HEADER_KEY: comfy.header_value(settings)}


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
    native_names: bool = False,
    save_quant_metadata: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    calibration_loras: Sequence[str | os.PathLike[str]] = (),
    settings: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Checkpoint:
    """A checkpoint whose linear layers are stored quantized; nothing is computed yet.

    `scaling` None is the format's default, `optimizer` None is `quip` where the format stores
    rotated weights and `rtn` elsewhere. `rotate` is `auto` (as the optimizer works), `off`, or the
    largest ConvRot group; a layer whose K it does not divide takes the next smaller one, or none.
    `scale_search` chooses scales of least error where that pays, rather than the largest weight's.
    `family` is `auto` (found by names and shapes), `none`, or a family's name; it says which layers
    keep their precision. `recipe` is a file or rules for single layers; `only` and `skip` are
    patterns over layer names, in `only` also `PATTERN=FORMAT`. A format that is a plain dtype
    applies to all tensors and undoes a quantization; with `requantize` quantized layers are
    dequantized first where they are stored anew, the others stay as they are. With
    `save_quant_metadata` the markers stand in the header as well, with `native_names` a checkpoint
    with the layer names of diffusers gets the model's own first.

    `calibration` is a file of `cq.calibration.Recorder`, by which optimizers round for the outputs
    of layers; layers that it has not are rounded to nearest, as all are without one. The optimizer
    None is then `gptq` where it would be `rtn`. `calibration_loras` are LoRAs, as paths or
    `path:weight`, whose down-projections count as directions of inputs. `settings` are numbers by
    `optimizer.name`, such as `{"quip.damp": 0.1}`; `seed` is for what an optimizer draws.

    Raises: PlanError if the checkpoint is quantized already, a pattern matches nothing, or there is
    nothing to quantize; InputError for a recipe that is none.
    """
    from cq.core.recipe_file import load_recipe

    if native_names:
        checkpoint = NativeNames().apply(checkpoint)
    rules = load_recipe(recipe) if isinstance(recipe, str | os.PathLike) else tuple(recipe)
    plug: Format = catalog.load("formats", format)
    stage = QuantStage(
        format=format,
        scaling=scaling,
        optimizer=optimizer,
        rotate=rotate,
        scale_search=scale_search,
        family=family,
        rules=rules,
        only=_texts(only),
        skip=_texts(skip),
        allow_custom_loader=allow_custom_loader,
        save_quant_metadata=save_quant_metadata,
        calibration=None if calibration is None else opened_calibration(calibration),
        calibration_loras=tuple(opened_lora(lora) for lora in _paths(calibration_loras)),
        settings=_settings(settings or {}),
        seed=_seed(seed),
    )
    quantized = comfy.find_quantized(checkpoint)
    floats8 = any(spec.dtype.startswith("F8_") for spec in checkpoint.specs.values())
    if (quantized and requantize) or (plug.casts and (quantized or floats8)):
        return replace(stage, requantize=True).again(checkpoint)
    return stage.apply(checkpoint)


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    """Patterns; a single one need not stand in a list."""
    return (value,) if isinstance(value, str) else tuple(value)


def _paths(
    value: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
) -> tuple[str | os.PathLike[str], ...]:
    return (value,) if isinstance(value, str | os.PathLike) else tuple(value)


def _settings(value: Any) -> dict[str, float]:
    """Numbers by `optimizer.name`. Raises: UsageError for a name or number that there is not."""
    if not isinstance(value, Mapping):
        raise _ill_typed("settings", value)
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _ill_typed("settings", value)
        check_setting(name, number)
    return {name: float(number) for name, number in sorted(value.items())}


def _seed(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise UsageError(
            f"`{value!r}` is not a seed", hint="give a whole number from 0 on", code="usage.seed"
        )
    return value


def _loras(value: Any) -> tuple[LoraFile, ...]:
    if not isinstance(value, list):
        raise _ill_typed("calibration_loras", value)
    return tuple(opened_lora(entry) for entry in value)


def _calibration(value: Any) -> CalibrationFile:
    if not isinstance(value, Mapping):
        raise _ill_typed("calibration", value)
    return opened_calibration(value)


_GUIDING: dict[str, Callable[[Any], Any]] = {
    "calibration": _calibration,
    "calibration_loras": _loras,
    "settings": _settings,
    "seed": _seed,
}


def _ill_typed(key: str, value: Any) -> InputError:
    return InputError(
        f"the quant stage's argument `{key}` cannot be `{value!r}`", code="input.manifest"
    )


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
    raise _ill_typed(key, value)


def _told(choice: recipe.Choice) -> str:
    """What people know a tensor by: its layer, if it is the weight of one."""
    return choice.layer if choice.name.endswith(comfy.WEIGHT) else choice.name


def _note(choice: recipe.Choice, layer: Layer | None) -> dict[str, Any]:
    note: dict[str, Any] = {
        "layer": _told(choice),
        "tensor": choice.name,
        "shape": list(choice.weight.shape),
        "dtype": choice.weight.dtype,
        "action": "keep" if layer is None else "quantize",
        "reason": choice.reason,
        "nbytes": choice.weight.nbytes,
    }
    if layer is None:
        if choice.how is None:
            return note
        return note | {
            "reason": f"is {choice.weight.dtype} already",
            "format": choice.how.format,
        }
    note |= layer.kind.decision
    if layer.guide is not None:
        optimizer = layer.plan.optimizer
        plain = optimizer is not None and note["note"] == optimizer.note
        note |= {"calibration": layer.guide.recorded, "note": None if plain else note["note"]}
    if recipe.has_role(choice.layer, "embedding"):
        note["first_comfyui"] = layer.kind.first_release(embedding=True)
    return note


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
            hint="start from the checkpoint with the model's own names, as ComfyUI distributes it"
            + (", or add `--native-names`" if recognize(source.specs) else ""),
            code="plan.diffusers",
        )
