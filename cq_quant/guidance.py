"""What guides rounding beside the weights: a calibration, adapters whose inputs count more, and the
numbers that a user set.

Owns the words for them, in options and in manifests, which layers they are for, and a layer's
moments as the optimizers get them. Plans from headers alone; torch only when a layer is computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cq.core import catalog, select
from cq.core.calibration import Calibration, nearest
from cq.core.checkpoint import Checkpoint, from_source
from cq.core.comfy import WEIGHT
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.moment import Moment
from cq.core.names import Names
from cq.core.source import FINGERPRINT, Source, SourceFile, check_fingerprint, open_source
from cq.core.text import printable
from cq_quant.optimizers import Optimizer, Rounded
from cq_quant.tally import Tally

if TYPE_CHECKING:
    import torch

# Of a LoRA's down-projection, behind the layer's key.
_DOWN = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    "_lora.down.weight",
    ".lora_linear_layer.down.weight",
    ".lora_A",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFile:
    """A calibration that is open, and the fingerprint that it was opened with."""

    path: str
    fingerprint: Mapping[str, Any] = field(hash=False)
    calibration: Calibration = field(compare=False, repr=False)

    def to_manifest(self) -> dict[str, Any]:
        """The file as a manifest names it."""
        return {"path": self.path, **self.fingerprint}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA whose down-projections count as directions of inputs. Each of its rows weighs
    `weight` times the mean square of an input feature, in the mean over the layer's rows."""

    path: str
    weight: float
    fingerprint: Mapping[str, Any] = field(hash=False)
    source: Source = field(compare=False, repr=False)

    def to_manifest(self) -> dict[str, Any]:
        """The file as a manifest names it."""
        return {"path": self.path, "weight": self.weight, **self.fingerprint}


def opened_calibration(given: str | os.PathLike[str] | Mapping[str, Any]) -> CalibrationFile:
    """The calibration at a path, or that a manifest names.

    Raises: InputError if it is none, PlanError if it has changed since the manifest was made.
    """
    source = _source(given, "calibration", ("path", *FINGERPRINT))
    return CalibrationFile(
        path=os.path.abspath(source.path),
        fingerprint=source.fingerprint(),
        calibration=Calibration.of(source),
    )


def opened_lora(given: str | os.PathLike[str] | Mapping[str, Any]) -> LoraFile:
    """The LoRA of the words `path` or `path:weight`, or that a manifest names.

    Raises: UsageError for a weight that is not a positive number, else as `opened_calibration`.
    """
    if isinstance(given, Mapping):
        weight = given.get("weight", 1.0)
        if not _is_weight(weight):
            raise _ill_typed("calibration_loras", given)
    else:
        given, weight = _parsed(os.fspath(given))
    source = _source(given, "calibration_loras", ("path", "weight", *FINGERPRINT))
    return LoraFile(
        path=os.path.abspath(source.path),
        weight=float(weight),
        fingerprint=source.fingerprint(),
        source=source,
    )


def _is_weight(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _parsed(text: str) -> tuple[str, float]:
    path, colon, word = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return text, 1.0
    try:
        weight = float(word)
    except ValueError:
        return text, 1.0
    if not _is_weight(weight):
        raise UsageError(
            f"`{word}` is not a weight for `{path}`",
            hint=f"write a positive number after the colon, as in `{path}:2`",
            code="usage.weight",
        )
    return path, weight


def _source(given: Any, what: str, keys: Sequence[str]) -> Source:
    if not isinstance(given, Mapping):
        return open_source(given)
    if not isinstance(given.get("path"), str):
        raise _ill_typed(what, given)
    select.refuse_unknown(given, keys, f"`{what}` of the quant stage")
    source = open_source(given["path"])
    check_fingerprint(source, given)
    return source


def _ill_typed(key: str, value: Any) -> InputError:
    return InputError(
        f"the quant stage's argument `{key}` cannot be `{printable(repr(value))}`",
        code="input.manifest",
    )


# The numbers that a user sets ---------------------------------------------------------------------


def parse_setting(text: str) -> tuple[str, float]:
    """The option and the number of `OPTIMIZER.NAME=NUMBER`.

    Raises: UsageError if it is not of that form, or the optimizer has no such option.

    >>> parse_setting("quip.damp=0.1")
    ('quip.damp', 0.1)
    """
    name, equals, word = text.partition("=")
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not equals or math.isnan(number):
        raise UsageError(
            f"`{text}` is not a setting",
            hint="write OPTIMIZER.NAME=NUMBER, as in `quip.damp=0.1`",
            code="usage.setting",
        )
    check_setting(name, number)
    return name, number


def check_setting(name: str, number: float) -> None:
    """See that an optimizer has the option and takes the number.

    Raises: UsageError with near names if not.
    """
    known = {
        f"{plug}.{option}": value
        for plug in catalog.names("optimizers")
        for option, value in catalog.load("optimizers", plug).options.items()
    }
    if name not in known:
        raise UsageError(
            f"there is no setting `{printable(name)}`",
            hint=select.nearest(name, known) or "there are: " + ", ".join(f"`{n}`" for n in known),
            code="usage.setting",
        )
    option = known[name]
    if not option.least <= number <= option.most or (option.whole and number != int(number)):
        kind = "a whole number" if option.whole else "a number"
        raise UsageError(
            f"`{name}` cannot be {number:g}",
            hint=f"it takes {kind} from {option.least:g} to {option.most:g}: {option.help}",
            code="usage.setting",
        )


def see_settings_used(
    settings: Mapping[str, float], optimizers: Iterable[Optimizer], *, calibrated: bool
) -> None:
    """Check that each setting is of one of the `optimizers` in use, and has an effect.

    Raises: UsageError.
    """
    used = {optimizer.name: optimizer for optimizer in optimizers}
    for name in settings:
        word, _, own = name.partition(".")
        if word not in used:
            raise UsageError(
                f"`{name}` is set, but no layer is rounded by `{word}`",
                hint=f"add `--optimizer {word}`, or leave the setting out",
                code="usage.setting",
            )
        if used[word].options[own].calibrated and not calibrated:
            raise UsageError(
                f"`{name}` is set, which has an effect only with a calibration",
                hint="add `--calibration FILE`, or leave the setting out",
                code="usage.setting",
            )


def settings_of(optimizer: Optimizer, settings: Mapping[str, float]) -> dict[str, float]:
    """The numbers that are set of one optimizer, by its own names."""
    start = f"{optimizer.name}."
    return {n.removeprefix(start): v for n, v in settings.items() if n.startswith(start)}


# What layers get ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What one layer's rounding is guided by. `recorded` is its name in the calibration, `loras`
    are the down-projections that read its inputs: file, tensor and weight."""

    calibration: Calibration
    recorded: str
    loras: tuple[tuple[LoraFile, str], ...]
    tell: Callable[[], Callable[[Rounded], None]]

    @property
    def columns(self) -> int:
        """The input features that were recorded."""
        return self.calibration.layers[self.recorded].columns

    @property
    def rank(self) -> int:
        """The directions of both moments."""
        found = self.calibration.layers[self.recorded]
        own = sum(lora.source.spec(name).shape[0] for lora, name in self.loras)
        return found.rank + found.held_rank + 2 * own

    def moments(
        self, group: int | None, multiplier: torch.Tensor | None = None
    ) -> tuple[Moment, Moment | None]:
        """The second moment of the layer's inputs, multiplied by `multiplier`, and that of inputs
        held back, in the basis of the rotation `group`. Raises: InputError for damaged values."""
        found = self.calibration.moment(self.recorded)
        held = self.calibration.held(self.recorded)
        for lora, name in self.loras:
            read = _directions(lora, name) * float(found.diagonal().mean() * lora.weight) ** 0.5
            found = found.with_directions(read)
            held = None if held is None else held.with_directions(read)
        if multiplier is not None:
            found = found.scaled(multiplier)
            held = None if held is None else held.scaled(multiplier)
        if group is not None:
            found = found.rotated(group)
            held = None if held is None else held.rotated(group)
        return found, held


def _directions(lora: LoraFile, name: str) -> torch.Tensor:
    """A down-projection `(r, N)` whose rows have a mean square length of 1."""
    import torch

    found = from_source(lora.source).read(name).float()
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            f"tensor `{printable(name)}` of `{lora.source.shown}` holds NaN or infinite values",
            where=name,
            code="input.nonfinite",
        )
    size = found.square().sum(1).mean().sqrt()
    return found / size if bool(size > 0) else found


class Guidance:
    """A calibration and LoRAs, matched to a checkpoint's layers.

    Raises: PlanError if a file is for none of them.
    """

    def __init__(
        self,
        calibration: CalibrationFile,
        loras: Sequence[LoraFile],
        source: Checkpoint,
        family: str,
    ) -> None:
        self._file = calibration
        self.tally = Tally()
        weights = [n.removesuffix(WEIGHT) for n in source.specs if n.endswith(WEIGHT)]
        self._matched = calibration.calibration.matched(weights)
        if not self._matched:
            first = next(iter(calibration.calibration.layers), "nothing")
            raise PlanError(
                f"the calibration `{self._shown}` is for none of the layers of"
                f" `{source.sources[0].shown}`: it knows `{printable(first)}`",
                where=self._shown,
                hint=nearest(calibration.calibration, weights)
                or "record it with the model that is to be quantized",
                code="plan.calibration",
            )
        self._reads: dict[str, list[tuple[LoraFile, str]]] = {}
        names = Names(source.specs, family=family) if loras else None
        for lora in loras:
            assert names is not None
            self._add(lora, names)

    def _add(self, lora: LoraFile, names: Names) -> None:
        keys = [
            (name, name.removesuffix(ending))
            for name in lora.source.owner
            for ending in _DOWN
            if name.endswith(ending)
        ]
        found = False
        for name, key in keys:
            for layer in {target.tensor for place in names.find(key) for target in place}:
                layer = layer.removesuffix(WEIGHT)
                if layer in self._matched and len(lora.source.spec(name).shape) == 2:
                    self._reads.setdefault(layer, []).append((lora, name))
                    found = True
        if not found:
            near = names.near(keys[0][1]) if keys else None
            raise PlanError(
                f"the LoRA `{lora.source.shown}` reads the inputs of no layer that is calibrated",
                where=lora.source.shown,
                hint=near or "give a LoRA with down-projections, for layers of this model",
                code="plan.calibration_lora",
            )

    @property
    def _shown(self) -> str:
        return self._file.calibration.source.shown

    def of(self, layer: str, columns: int) -> Guide | None:
        """What guides the rounding of a layer; None if nothing was recorded of it.

        Raises: PlanError if the layer has not as many input features as were recorded.
        """
        recorded = self._matched.get(layer)
        if recorded is None or not self._file.calibration.layers[recorded].rows:
            return None
        had = self._file.calibration.layers[recorded].columns
        reads = self._reads.get(layer, [])
        for lora, name in reads:
            if lora.source.spec(name).shape[1] != columns:
                raise _misfit(lora.source.shown, layer, lora.source.spec(name).shape[1], columns)
        if had != columns:
            raise _misfit(self._shown, layer, had, columns)
        return Guide(
            calibration=self._file.calibration,
            recorded=recorded,
            loras=tuple(reads),
            tell=lambda: self.tally.begin(layer),
        )

    def see_used(self, guided: Iterable[str], asked: Iterable[str]) -> None:
        """Check that the calibration guides a layer at all, of the layers `asked` for.

        Raises: PlanError.
        """
        self.tally.expect(guided)
        if not self.tally.expected:
            asked = list(asked)
            raise PlanError(
                f"the calibration `{self._shown}` guides none of the {len(asked)} layers that are"
                " quantized",
                where=self._shown,
                hint="use an optimizer that takes one, such as gptq or quip, on layers that were"
                " recorded",
                code="plan.calibration",
            )


def _misfit(shown: str, layer: str, had: int, columns: int) -> PlanError:
    return PlanError(
        f"`{shown}` has {had} input features for `{printable(layer)}`, whose weight has {columns}",
        where=layer,
        hint="it belongs to another model",
        code="plan.calibration",
    )


def files_of(
    calibration: CalibrationFile | None, loras: Sequence[LoraFile]
) -> tuple[SourceFile, ...]:
    """The files that are read."""
    own = () if calibration is None else calibration.calibration.source.files
    return (*own, *(file for lora in loras for file in lora.source.files))
