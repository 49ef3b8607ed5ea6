"""`cq analyze --deep` as a function: what every candidate format would cost every layer.

Owns the measurements as a value, their order and their plain JSON. `cq_analyze.candidates` knows
what is possible, `cq_analyze.measuring` does the arithmetic; torch is imported only there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cq.core import sink
from cq.core.checkpoint import Checkpoint
from cq.core.engine import local
from cq.core.errors import PlanError, UsageError
from cq.core.recipe import Rule, parse_only
from cq.core.source import check_unchanged
from cq_analyze.candidates import Candidate, Considered, Option, candidates, consider
from cq_analyze.measuring import Outcome, Outliers, inspect, task
from cq_analyze.metrics import Sums, finite
from cq_analyze.planning import Settings
from cq_analyze.report import natural

METRICS = ("sqnr", "cosine", "mse", "outliers")
OUTLIERS = ("peak", "kurtosis", "row_spread", "column_spread")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a layer costs stored in one way.

    `refused` is why it cannot be, then there is no error; `against` why the plan would not do it
    unasked. `nbytes` counts codes, scales and marker.
    """

    option: Option
    error: Sums | None
    refused: str | None

    @property
    def candidate(self) -> Candidate:
        """The way of storing it."""
        return self.option.candidate

    @property
    def against(self) -> str | None:
        """Why the plan would not do it unasked."""
        return self.option.against

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.option.nbytes

    @property
    def noise(self) -> float:
        """Energy of the error over the weight's: the square of the relative error; what a budget
        adds up. Infinite if the layer cannot be stored so."""
        return math.inf if self.error is None else self.error.relative_error**2

    def metric(self, name: str) -> float | None:
        """One of `METRICS`, None where it is not measured. SQNR in dB, infinite if exact."""
        if self.error is None or name not in METRICS:
            return None
        if name == "mse":
            return self.error.error_energy / max(self.error.count, 1)
        return self.error.cosine if name == "cosine" else self.error.sqnr

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; an exact layer's SQNR is null, with `exact`."""
        told: dict[str, Any] = {"candidate": self.candidate.name, "refused": self.refused}
        if self.error is None:
            return told
        return told | {
            "against": self.against,
            "rotation": self.option.group,
            "nbytes": self.nbytes,
            "exact": self.error.exact,
            "error_energy": finite(self.error.error_energy),
            "mse": self.metric("mse"),
            "relative_error": finite(self.error.relative_error),
            "sqnr_db": finite(self.error.sqnr),
            "cosine": self.error.cosine,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """One layer: its weight's outliers and what every candidate costs. `broken` is what is wrong
    with the weight itself, such as NaN; then nothing is measured."""

    considered: Considered
    outliers: Outliers
    costs: tuple[Cost, ...]
    broken: str | None

    @property
    def layer(self) -> str:
        """The tensor's name without `.weight`."""
        return self.considered.layer

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is."""
        return self.considered.spec.nbytes

    @property
    def kept(self) -> str | None:
        """Why the plan keeps it in every format that could store it; None if it does not."""
        reasons = [cost.against for cost in self.costs if cost.error is not None]
        wanted = [c for c in self.costs if c.error is not None and c.candidate.optimizer]
        return None if any(c.against is None for c in wanted) else next(iter(reasons), self.broken)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "layer": self.layer,
            "shape": list(self.considered.spec.shape),
            "dtype": self.considered.spec.dtype,
            "nbytes": self.nbytes,
            "kept": self.kept,
            "broken": self.broken,
            "outliers": self.outliers.to_dict(),
            "costs": [cost.to_dict() for cost in self.costs],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What `measure` found. Layers stand in the checkpoint's order."""

    checkpoint: Checkpoint
    asked: Settings
    candidates: tuple[Candidate, ...]
    layers: tuple[MeasuredLayer, ...]

    @property
    def shown(self) -> str:
        """The checkpoint in words."""
        return ", ".join(source.shown for source in self.checkpoint.sources)

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoint as a file, nothing quantized."""
        return sink.nbytes_file(self.checkpoint)

    def totals(self) -> list[Mapping[str, Any]]:
        """Each candidate over all layers that the plan would store so: their number, bytes before
        and after, and the mean and the worst SQNR in dB (None if there is none, or all exact)."""
        found: list[Mapping[str, Any]] = []
        for way in self.candidates:
            pairs = [
                (layer, cost)
                for layer in self.layers
                for cost in layer.costs
                if cost.candidate == way and cost.error is not None and cost.against is None
            ]
            levels = [c.error.sqnr for _, c in pairs if c.error and math.isfinite(c.error.sqnr)]
            found.append(
                {
                    "candidate": way.name,
                    "layers": len(pairs),
                    "nbytes_before": sum(layer.nbytes for layer, _ in pairs),
                    "nbytes": sum(cost.nbytes for _, cost in pairs),
                    "mean_sqnr_db": math.fsum(levels) / len(levels) if levels else None,
                    "min_sqnr_db": min(levels, default=None),
                }
            )
        return found

    def ordered(self, sort: str = "name", metric: str = "sqnr") -> list[MeasuredLayer]:
        """The layers by `name`, by `size` (largest first), by an outlier measure (largest first),
        or by a candidate's `metric` (worst first); without a value last.

        Raises: UsageError for an order that there is none.
        """
        check_order(sort, self.candidates)
        named = sorted(self.layers, key=lambda layer: natural(layer.layer))
        if sort == "name":
            return named
        keyed = [(layer, _key(layer, sort, metric)) for layer in named]
        keyed.sort(key=lambda pair: (pair[1] is None, pair[1] or 0.0))
        return [layer for layer, _ in keyed]

    def to_dict(self) -> dict[str, Any]:
        """As the JSON under `deep` in an analysis."""
        return {
            "candidates": [way.to_dict() for way in self.candidates],
            "totals": [dict(total) for total in self.totals()],
            "layers": [layer.to_dict() for layer in self.ordered()],
        }


def check_order(sort: str, ways: Sequence[Candidate]) -> None:
    """See that layers can be put in the order `sort`. Raises: UsageError if there is none such."""
    words = ["name", "size", *OUTLIERS, *(way.name for way in ways)]
    if sort not in words:
        raise UsageError(f"there is no order `{sort}`", hint="sort by " + ", ".join(words))


def _key(layer: MeasuredLayer, sort: str, metric: str) -> float | None:
    """What sorts ascending, None last."""
    if sort == "size":
        return -float(layer.nbytes)
    if sort in OUTLIERS:
        value = getattr(layer.outliers, sort)
        return None if value is None else -value
    told = "sqnr" if metric == "outliers" else metric
    cost = next((c for c in layer.costs if c.candidate.name == sort), None)
    value = None if cost is None else cost.metric(told)
    return -value if told == "mse" and value is not None else value


def measure(
    checkpoint: Checkpoint,
    *,
    formats: Sequence[str] | None = None,
    family: str = "auto",
    rules: Sequence[Rule] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    allow_custom_loader: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
    on_progress: Callable[[local.Progress], None] | None = None,
) -> Measurements:
    """Read every linear layer once or twice and measure what each candidate format would cost it.

    A layer is measured if some candidate can store it, also where the plan advises against it;
    `only` and `skip` narrow the choice. `formats` are names, None for all that a released ComfyUI
    loads. Plain dtypes are candidates for float32 weights. Works in bounded memory, and gives equal
    results however many workers there are.

    Raises: PlanError as `cq_quant.quantize` does; ResourceError if a layer does not fit into
    `memory_limit` bytes.
    """
    asked = Settings(
        family=family,
        recipe=tuple(rules),
        only=tuple(only),
        skip=tuple(skip),
        allow_custom_loader=allow_custom_loader,
    )
    ways = candidates(formats=formats, allow_custom_loader=allow_custom_loader)
    named = {name for _, name in map(parse_only, only) if name is not None}
    missing = named - {way.format for way in ways}
    if missing:
        raise PlanError(
            f"`--only` asks for `{min(missing)}`, which is not among the candidates",
            hint=f"add `--among {min(missing)}`, or name no format",
            code="plan.candidates",
        )
    layers = consider(checkpoint, ways, asked)
    outcomes: list[Outcome | None] = [None] * len(layers)

    def work(job: local.Job) -> None:
        outcomes[job.index] = inspect(job, checkpoint, layers[job.index])

    local.run(
        [task(checkpoint, layer) for layer in layers],
        work,
        local.Settings(workers=workers, memory_limit=memory_limit, on_progress=on_progress),
    )
    check_unchanged(checkpoint.inputs)
    found = [_measured(*pair) for pair in zip(layers, outcomes, strict=True)]
    present = dict.fromkeys(cost.candidate for layer in found for cost in layer.costs)
    return Measurements(
        checkpoint=checkpoint, asked=asked, candidates=tuple(present), layers=tuple(found)
    )


def _measured(layer: Considered, outcome: Outcome | None) -> MeasuredLayer:
    assert outcome is not None
    return MeasuredLayer(
        considered=layer,
        outliers=outcome.outliers,
        costs=tuple(
            Cost(option=option, error=error, refused=_refused(option, error, outcome.broken))
            for option, error in zip(layer.options, outcome.errors, strict=True)
        ),
        broken=outcome.broken,
    )


def _refused(option: Option, error: Sums | None, broken: str | None) -> str | None:
    if option.refused is not None or error is not None:
        return option.refused
    if broken is not None:
        return f"its weight {broken}"
    if option.candidate.optimizer is None:
        return f"its weight overflows {option.candidate.format}"
    return "the format rounds whole weights by itself, so it is not measured"
