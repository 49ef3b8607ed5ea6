"""The quantize stage: which layers, in which formats.

Owns the meeting of recipe, format and optimizer in a plan, from specs alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from cq.core import catalog, comfy, families, recipe, select
from cq.core.checkpoint import Checkpoint, Part, Stage, narrowed
from cq.core.dequantize import Dequantize
from cq.core.errors import PlanError, UsageError
from cq.core.formats import SMOOTHED_SINCE, Format, newest
from cq.core.knowledge import AUTO, know
from cq.core.native import NativeNames, recognize
from cq.core.recipe import Rule
from cq.core.stored import describe, stored_layers
from cq_quant import arguments
from cq_quant.equalizing import Equalized
from cq_quant.guidance import (
    CalibrationFile,
    Guidance,
    LoraFile,
    files_of,
    opened_calibration,
    opened_lora,
    see_settings_used,
)
from cq_quant.layer import Layer, is_stored_so
from cq_quant.settings import Resolver, optimizer_for
from cq_quant.uses import FLAGS, Uses

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
    bf16: bool = False
    uses: Uses = field(default_factory=Uses)

    def arguments(self) -> dict[str, Any]:
        """The fields as plain JSON; those of guidance only where there is some."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["rules"] = [rule.to_dict() for rule in self.rules]
        for key in arguments.GUIDING:
            if not found[key]:
                del found[key]
        if self.calibration is not None:
            found["calibration"] = self.calibration.to_manifest()
        if self.calibration_loras:
            found["calibration_loras"] = [lora.to_manifest() for lora in self.calibration_loras]
        found |= found.pop("uses").arguments()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def from_arguments(cls, given: Mapping[str, Any]) -> Stage:
        """The stage of a manifest. Raises: InputError for an unknown or ill-typed argument."""
        defaults = {f.name: f.default for f in fields(cls) if f.name != "uses"}
        select.refuse_unknown(given, [*defaults, *FLAGS], "the quant stage")
        return cls(
            **{
                key: arguments.GUIDING[key](value)
                if key in arguments.GUIDING
                else arguments.typed(key, value, defaults[key])
                for key, value in given.items()
                if key not in FLAGS
            },
            uses=Uses.of(given),
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
        self.uses.check(calibrated=self.calibration is not None, requantizes=self.requantize)
        resolver = Resolver(self, know(source.specs, self.family))
        folded = self.uses.equalized(source, resolver.known, self.calibration)
        source = folded.checkpoint
        choices, layers = self._planned(source, resolver, self.rules)
        _refuse_diffusers(source, layers.values())
        guidance = self._guided(source, layers)
        layers = self.uses.applied(layers, source, guidance, folded, resolver.known)
        touched = set(layers) | {o.beside.taken for o in layers.values() if o.beside is not None}
        asked = {choice.name for choice in choices if choice.how is not None}
        parts: list[Part] = []
        for part in source.parts:
            if touched.isdisjoint(part.tensors):
                parts.append(part if part.name in asked else folded.kept.get(part.name, part))
                continue
            for name in part.tensors:
                if name in layers:
                    parts += layers[name].parts()
            rest = [name for name in part.tensors if name not in touched]
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

    def before_rounding(self, source: Checkpoint) -> Equalized:
        """The checkpoint whose weights are rounded: `source`, perhaps with factors folded into it.

        Raises: PlanError as `apply`.
        """
        known = know(source.specs, self.family)
        return self.uses.equalized(source, known, self.calibration)

    def _guided(self, source: Checkpoint, layers: dict[str, Layer]) -> Guidance | None:
        """What guides the rounding, told to the layers that use it."""
        optimizers = {o.plan.optimizer for o in layers.values() if o.plan.optimizer is not None}
        see_settings_used(self.settings, optimizers, calibrated=self.calibration is not None)
        if self.calibration is None:
            arguments.see_bf16_used(self.bf16, ())
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
        arguments.see_bf16_used(self.bf16, guided)
        if guided or not self.uses:
            guidance.see_used(guided, layers)
        return guidance

    def _applied(self, checkpoint: Checkpoint, *, may_do_without: bool) -> Checkpoint:
        """The quantized checkpoint, in float32 if bfloat16 has no use and `may_do_without`."""
        try:
            return self.again(checkpoint) if self.requantize else self.apply(checkpoint)
        except UsageError as error:
            if not may_do_without or error.code != arguments.NO_BF16:
                raise
        return replace(self, bf16=False)._applied(checkpoint, may_do_without=False)

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
    bf16: bool | None = False,
    input_scales: str | None = None,
    bias_correction: bool = False,
    smoothquant: float | None = None,
    equalize: bool = False,
) -> Checkpoint:
    """A checkpoint whose linear layers are stored quantized; nothing is computed yet.

    `scaling` None is the format's default, `optimizer` None is `quip` where the format stores
    rotated weights and `rtn` elsewhere. `rotate` is `auto` (as the optimizer works), `off`, or the
    largest ConvRot group; a layer whose K it does not divide takes the next smaller one, or none.
    `scale_search` chooses scales of least error where that pays. `family` is `auto` (found by names
    and shapes), `none`, or a family's name; it says which layers keep their precision. `recipe` is
    a file or rules for single layers; `only` and `skip` are patterns over layer names, in `only`
    also `PATTERN=FORMAT`. A format that is a plain dtype applies to all tensors and undoes a
    quantization; with `requantize` quantized layers are dequantized first where they are stored
    anew. With `save_quant_metadata` the markers stand in the header as well, with `native_names` a
    checkpoint with the layer names of diffusers gets the model's own first.

    `calibration` is a file of `cq.calibration.Recorder`, by which optimizers round for the outputs
    of layers; layers that it has not are rounded to nearest. The optimizer None is then `gptq`
    where it would be `rtn`. `calibration_loras` are LoRAs, as paths or `path:weight`, whose
    down-projections count as directions of inputs. `settings` are numbers by `optimizer.name`, such
    as `{"quip.damp": 0.1}`; `seed` is for what an optimizer draws. `bf16` takes the largest
    products of rounding by a calibration in bfloat16 (None: if there are any); single codes then
    come out a step away.

    By the calibration, too: `input_scales` `absmax` stores what a runtime divides inputs by,
    `bias_correction` gives biases the mean error of outputs, `equalize` folds factors that even out
    inputs and weights, `smoothquant` does so by its alpha, or stores them for a format that can.

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
        only=arguments.texts(only),
        skip=arguments.texts(skip),
        allow_custom_loader=allow_custom_loader,
        save_quant_metadata=save_quant_metadata,
        calibration=None if calibration is None else opened_calibration(calibration),
        calibration_loras=tuple(opened_lora(lora) for lora in arguments.paths(calibration_loras)),
        settings=arguments.settings_of(settings or {}),
        seed=arguments.seed_of(seed),
        bf16=bf16 is not False,
        uses=Uses.asked(input_scales, bias_correction, smoothquant, equalize),
    )
    stage = replace(stage, requantize=_is_undone(checkpoint, plug, requantize=requantize))
    return stage._applied(checkpoint, may_do_without=bf16 is None)


def _is_undone(checkpoint: Checkpoint, plug: Format, *, requantize: bool) -> bool:
    """Whether layers of the checkpoint are to be dequantized first."""
    quantized = bool(comfy.find_quantized(checkpoint))
    floats8 = any(spec.dtype.startswith("F8_") for spec in checkpoint.specs.values())
    return (quantized and requantize) or (plug.casts and (quantized or floats8))


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
    if layer.given:
        note["beside"] = dict(layer.given)
    if layer.beside is not None and layer.beside.smoothing is not None:
        note["first_comfyui"] = newest([note["first_comfyui"] or SMOOTHED_SINCE, SMOOTHED_SINCE])
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
    quantized = [layer for layer in layers if not layer.plan.format.casts]
    if not quantized:
        return
    model = comfy.diffusers_model(source.specs)
    known = None if families.detect(source.specs).matches else recognize(source.specs)
    if model is not None:
        what = f"({model}), which ComfyUI renames while it loads, without the markers and scales of"
        what += " quantized layers: it would compute with raw codes and say nothing"
    elif known is not None:
        what = f"({known.family.title}), by which ComfyUI loads no quantized model"
    else:
        return
    raise PlanError(
        f"`{source.sources[0].shown}` has the layer names of diffusers {what}",
        where=quantized[0].name,
        hint="start from the checkpoint with the model's own names, as ComfyUI distributes it"
        + (", or add `--native-names`" if known else ""),
        code="plan.diffusers",
    )
