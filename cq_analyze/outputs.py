"""What rounding does to the outputs of layers, by inputs that were recorded.

For a weight W with the error E, and the second moment H of the layer's inputs:

    output error  sqrt(tr(E H Eᵀ) / tr(W H Wᵀ))      0 for equal weights

It is the weights' share. What is lost where a runtime rounds activations as well is not in it: a
calibration holds moments, from which the error of rounding single rows does not follow.

Owns the sums and the match of a checkpoint's layers with a calibration's. H is that of inputs held
back, which no rounding was fitted to, where there are some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cq.core.calibration import Calibration, nearest
from cq.core.errors import PlanError
from cq.core.moment import Moment
from cq.core.text import printable
from cq_analyze.metrics import finite

if TYPE_CHECKING:
    import torch

NOTE = (
    "output errors are those of rounding weights; what a runtime adds that rounds activations, too,"
    " does not follow from a calibration"
)
_NBYTES_LOSS = 1 << 26  # squares and images of the rows that are judged at a time
_BYTES_SKETCH = 2 + 4 + 4  # as stored, and in float32 as read and as used


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """tr(E H Eᵀ) and tr(W H Wᵀ) of a layer, by `rows` inputs; `held` says that these were held
    back."""

    lost: float
    whole: float
    rows: int
    held: bool

    @property
    def relative_error(self) -> float:
        """Root of the mean square of the output's error over that of the output; infinite if only
        the output is 0."""
        if self.lost == 0.0:
            return 0.0
        return math.sqrt(self.lost / self.whole) if self.whole > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "relative_error": finite(self.relative_error),
            "rows": self.rows,
            "held_back": self.held,
        }


def mean_error(found: Sequence[OutputError]) -> float | None:
    """The geometric mean over layers that lose anything, each counting the same; None of none."""
    errors = [one.relative_error for one in found if 0 < one.relative_error < math.inf]
    return math.exp(math.fsum(map(math.log, errors)) / len(errors)) if errors else None


class Outputs:
    """A calibration, matched to the layers that are judged by it.

    Raises: PlanError if it is for none of them.
    """

    def __init__(self, calibration: Calibration, layers: Iterable[str], shown: str) -> None:
        layers = list(layers)
        self.calibration = calibration
        self._matched = calibration.matched(layers)
        if not self._matched:
            first = next(iter(calibration.layers), "nothing")
            raise PlanError(
                f"the calibration `{calibration.source.shown}` is for none of the quantized layers"
                f" of `{shown}`: it knows `{printable(first)}`",
                where=calibration.source.shown,
                hint=nearest(calibration, layers) or "record it with the model that was quantized",
                code="plan.calibration",
            )

    def nbytes_peak(self, layer: str) -> int:
        """What judging the layer holds, beside its rows."""
        own = self._matched.get(layer)
        if own is None:
            return 0
        found = self.calibration.layers[own]
        directions = found.held_rank if found.held_rows else found.rank
        return _NBYTES_LOSS + directions * found.columns * _BYTES_SKETCH

    def judge(
        self, layer: str, columns: int, multiplier: Callable[[], torch.Tensor] | None = None
    ) -> Judge | None:
        """What judges the layer's rows, whose inputs are multiplied by what `multiplier` gives;
        None if nothing was recorded of it.

        Raises: PlanError if the layer has not as many input features as were recorded, InputError
        for damaged values.
        """
        own = self._matched.get(layer)
        if own is None or not self.calibration.layers[own].rows:
            return None
        found = self.calibration.layers[own]
        if found.columns != columns:
            raise PlanError(
                f"`{self.calibration.source.shown}` has {found.columns} input features for"
                f" `{printable(layer)}`, whose weight has {columns}",
                where=layer,
                hint="it belongs to another model",
                code="plan.calibration",
            )
        held = self.calibration.held(own)
        moment = self.calibration.moment(own) if held is None else held
        if multiplier is not None:
            moment = moment.scaled(multiplier())
        return Judge(moment, held is not None)


class Judge:
    """One layer's sums, segment by segment."""

    def __init__(self, moment: Moment, held: bool) -> None:
        self._moment = moment
        self._held = held
        self._lost: list[float] = []
        self._whole: list[float] = []

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Look at the next rows `(…, K)`, of any float dtypes."""
        weight = reference.float().reshape(-1, self._moment.rest.shape[0])
        error = value.float().reshape(weight.shape) - weight
        self._lost.append(float(self._moment.loss(error).double().sum()))
        self._whole.append(float(self._moment.loss(weight).double().sum()))

    @property
    def found(self) -> OutputError:
        """The sums so far."""
        return OutputError(
            lost=math.fsum(self._lost),
            whole=math.fsum(self._whole),
            rows=self._moment.rows,
            held=self._held,
        )
