"""What a calibration is for beside rounding: input scales, corrected biases, and equalized inputs.

Owns the words for them, in options and in manifests, and which of a checkpoint's layers get what;
`cq_quant.beside` computes it layer by layer, `cq_quant.equalizing` what is folded. Plans only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cq.core.checkpoint import Checkpoint
from cq.core.comfy import WEIGHT
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.knowledge import Knowledge
from cq.core.text import printable
from cq_quant.beside import Beside
from cq_quant.equalizing import Equalized, Rule, equalized

if TYPE_CHECKING:
    from cq_quant.guidance import CalibrationFile, Guidance
    from cq_quant.layer import Layer

INPUT_SCALES = ("absmax",)
FLAGS = {
    "input_scales": "--input-scales",
    "bias_correction": "--bias-correction",
    "smoothquant": "--smoothquant",
    "equalize": "--equalize",
}
_NOTHING = "was not recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Uses:
    """What was asked for. `input_scales` is a word of `INPUT_SCALES`, `smoothquant` an alpha."""

    input_scales: str | None = None
    bias_correction: bool = False
    smoothquant: float | None = None
    equalize: bool = False

    @classmethod
    def asked(
        cls, scales: str | None, correction: bool, alpha: float | None, equalize: bool
    ) -> Uses:
        """The uses that options and arguments of Python ask for, in the order of the fields."""
        return cls(
            input_scales=scales,
            bias_correction=correction,
            smoothquant=None if alpha is None else float(alpha),
            equalize=equalize,
        )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Uses:
        """The uses among a stage's arguments. Raises: InputError for ill-typed ones."""
        found = {key: arguments[key] for key in FLAGS if key in arguments}
        if type(found.get("smoothquant")) is int:
            found["smoothquant"] = float(found["smoothquant"])
        kinds = {"input_scales": str, "smoothquant": float}
        for key, value in found.items():
            if type(value) is not kinds.get(key, bool):
                raise InputError(
                    f"the quant stage's argument `{key}` cannot be `{printable(repr(value))}`",
                    code="input.manifest",
                )
        return cls(**found)

    def arguments(self) -> dict[str, Any]:
        """As plain JSON: those that were asked for."""
        every = {key: getattr(self, key) for key in FLAGS}
        return {key: value for key, value in every.items() if value not in (None, False)}

    def __bool__(self) -> bool:
        """Whether anything was asked for."""
        return bool(self.arguments())

    @property
    def rule(self) -> Rule | None:
        """How factors of inputs are chosen; None if there are none."""
        return (
            Rule(alpha=self.smoothquant) if self.equalize or self.smoothquant is not None else None
        )

    def check(self, *, calibrated: bool, requantizes: bool) -> None:
        """See that the words mean something. Raises: UsageError."""
        if not self:
            return
        flag = next(FLAGS[key] for key in self.arguments())
        if self.input_scales is not None and self.input_scales not in INPUT_SCALES:
            raise UsageError(
                f"input scales cannot be chosen by `{printable(self.input_scales)}`",
                hint="write `--input-scales absmax`: a calibration holds the largest inputs, and"
                " no other quantiles",
                code="usage.input_scales",
            )
        alpha = self.smoothquant
        if alpha is not None and not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise UsageError(
                f"`--smoothquant` cannot be {alpha:g}",
                hint="alpha is from 0, all by the weights, to 1, all by the inputs; 0.5 is usual",
                code="usage.smoothquant",
            )
        if self.equalize and alpha is not None:
            raise UsageError(
                "`--equalize` and `--smoothquant` choose factors for the same inputs",
                hint="use one of them",
                code="usage.smoothquant",
            )
        if not calibrated:
            raise UsageError(
                f"`{flag}` works by recorded inputs, and there are none",
                hint="add `--calibration FILE`",
                code="usage.calibration",
            )
        if requantizes:
            raise UsageError(
                f"`{flag}` starts from unrounded weights, not from those of a quantized checkpoint",
                hint="start from the unquantized checkpoint",
                code="usage.calibration",
            )

    def equalized(
        self, source: Checkpoint, known: Knowledge, file: CalibrationFile | None
    ) -> Equalized:
        """The checkpoint with factors folded where that is exact; as it is if none are asked for.

        Raises: PlanError if there is no place for them.
        """
        if self.rule is None or file is None:
            return Equalized(checkpoint=source)
        found = equalized(source, known, file.calibration, self.rule)
        if self.equalize and not found.places:
            raise PlanError(
                f"there is nothing to equalize: {_no_place(found, known)}",
                where=source.sources[0].shown,
                hint="leave `--equalize` out",
                code="plan.equalize",
            )
        return found

    def applied(
        self,
        layers: Mapping[str, Layer],
        source: Checkpoint,
        guidance: Guidance | None,
        folded: Equalized,
        known: Knowledge,
    ) -> dict[str, Layer]:
        """The layers, by the name of their weight, with what each gets beside its weight.

        Raises: PlanError if something that was asked for is for none of them.
        """
        if not self or guidance is None:
            return dict(layers)
        found = {
            name: self._given(layer, source, guidance, folded) for name, layer in layers.items()
        }
        given = [layer.beside for layer in found.values() if layer.beside is not None]
        marks = [mark for layer in found.values() for mark in layer.given.items()]
        smoothed = folded.places or any(beside.smoothing is not None for beside in given)
        if self.smoothquant is not None and not smoothed:
            raise PlanError(
                "no layer has a place for a smoothing factor: of all formats ComfyUI reads one"
                f" for nvfp4 alone, and {_no_place(folded, known)}",
                hint="leave `--smoothquant` out, or use `--format nvfp4`",
                code="plan.smoothquant",
            )
        for key, has in (
            ("input_scales", any(beside.largest is not None for beside in given)),
            ("bias_correction", any(beside.bias is not None for beside in given)),
        ):
            if key in self.arguments() and not has:
                told = Counter(mark for what, mark in marks if what == key and mark is not True)
                why = "; ".join(f"{reason} ({n} layers)" for reason, n in told.most_common())
                raise PlanError(
                    f"`{FLAGS[key]}` is for none of the layers: {why or 'none is quantized'}",
                    hint=f"leave `{FLAGS[key]}` out",
                    code=f"plan.{key}",
                )
        return found

    def _given(
        self, layer: Layer, source: Checkpoint, guidance: Guidance, folded: Equalized
    ) -> Layer:
        """The layer with what it gets, and for the reports why it does not get the rest."""
        plan, asked = layer.plan, self.arguments()
        if not layer.name.endswith(WEIGHT):
            return layer
        own = layer.name.removesuffix(WEIGHT)
        if plan.format.casts:
            factors = {key for key in asked if key in _FACTORS and own in folded.inputs}
            return replace(layer, given=dict.fromkeys(factors, True))
        guide = guidance.of(own, layer.matrix.shape[-1])
        if guide is None or layer.kind.experts is not None:
            why = _NOTHING if guide is None else "is a stack of experts"
            return replace(layer, given=dict.fromkeys(asked, why))
        given: dict[str, bool | str] = dict.fromkeys(asked, True)
        largest = plan.format.largest_input if "input_scales" in asked else None
        if "input_scales" in asked and largest is None:
            given["input_scales"] = f"`{plan.format.name}` takes no input scale"
        bias = f"{own}.bias" if "bias_correction" in asked else None
        if bias is not None and not _can_correct(layer, source, bias):
            given["bias_correction"], bias = "has no bias in floats", None
        rule = None
        if own not in folded.inputs and self.rule is not None:
            if self.smoothquant is not None and plan.format.smooths:
                rule = self.rule
            else:
                key = "equalize" if self.equalize else "smoothquant"
                given[key] = "has no place for factors"
        beside = Beside(
            layer=own,
            guide=guide,
            columns=layer.matrix.shape[-1],
            inputs=folded.inputs.get(own),
            nbytes_inputs=folded.nbytes_peak.get(own, 0),
            smoothing=rule,
            largest=largest,
            bias=None if bias is None else (source, bias),
        )
        return replace(layer, beside=beside if beside else None, given=given)


def _can_correct(layer: Layer, source: Checkpoint, bias: str) -> bool:
    spec = source.specs.get(bias)
    grid = layer.plan.format.grid(layer.matrix, layer.plan.scaling)
    fits = spec is not None and spec.is_float and spec.shape == layer.matrix.shape[:1]
    return fits and grid is not None


def _no_place(found: Equalized, known: Knowledge) -> str:
    told = known.described()
    if found.missing:
        return f"the layers of {told} that could share factors were not recorded"
    if told is None:
        return "of a model of no known family it is not known where factors can be folded exactly"
    return f"of {told} no place is known where factors can be folded exactly"


def told(notes: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Sentences on what layers get beside their weights, from a checkpoint's notes."""
    quantized = [note for note in notes if note["action"] == "quantize"]
    words = {
        "input_scales": "{} of {} layers get an input scale",
        "bias_correction": "the biases of {} of {} layers are corrected",
        "smoothquant": "the inputs of {} of {} layers are smoothed",
        "equalize": "the inputs of {} of {} layers are equalized",
    }
    for key, text in words.items():
        marks = [note["beside"][key] for note in quantized if key in note.get("beside", {})]
        if not marks:
            continue
        why = Counter(reason for reason in marks if isinstance(reason, str))
        others = "; ".join(f"{n} not: {reason}" for reason, n in why.most_common())
        done = text.format(marks.count(True), len(marks))
        yield f"{done} ({others})" if others else done
    if any(note.get("beside", {}).get(k) is True for note in quantized for k in _FACTORS):
        yield (
            "LoRAs made for the original model do not fit the result, whose layers get other"
            " inputs: merge them first"
        )


_FACTORS = ("smoothquant", "equalize")
