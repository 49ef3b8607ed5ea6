"""A format for each layer: the least error within a file size, or the least size at a quality.

What is added up is each layer's noise: the energy of its error over that of its weight, the square
of the relative error. In a residual network a layer passes the relative error of its weight on to
what it adds, whatever the weight's size or scale; a sum of absolute errors would instead spend the
bytes on the layers with the most or the largest weights, since those have the most energy. Without
calibration data no layer is known to matter more than another, so all count the same.

Owns what may be chosen, and the size that is promised; `cq_analyze.knapsack` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from cq.core import catalog, recipe, select, sink
from cq.core.checkpoint import Checkpoint
from cq.core.comfy import WEIGHT
from cq.core.errors import PlanError, UsageError
from cq.core.formats import Format
from cq.core.knowledge import know
from cq.core.recipe import Rule
from cq_analyze.candidates import Candidate
from cq_analyze.deep import Cost, MeasuredLayer, Measurements
from cq_analyze.knapsack import Way, least_size, pack
from cq_analyze.metrics import finite
from cq_analyze.planning import planned
from cq_analyze.recipes import document, exactly

_ROUNDS = 8  # until the header's size is met; two or three do


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a layer gets: a cost that was measured, or None to keep it as it is, and why."""

    layer: MeasuredLayer
    cost: Cost | None
    reason: str

    @property
    def noise(self) -> float:
        """What it adds to the error."""
        return 0.0 if self.cost is None else self.cost.noise

    def rule(self) -> Rule:
        """The recipe's rule that says so."""
        pattern = exactly(self.layer.layer)
        if self.cost is None:
            return Rule(pattern=pattern, skip=True, settings={}, reason=self.reason)
        way = self.cost.candidate
        return Rule(
            pattern=pattern, settings=_settings(way, self.cost.option.group), reason=self.reason
        )

    def comments(self) -> dict[str, Any]:
        """What a person wants to know of the layer, under keys that a recipe ignores."""
        spec, cost = self.layer.considered.spec, self.cost
        told = {"_shape": list(spec.shape), "_dtype": spec.dtype, "_nbytes": spec.nbytes}
        if cost is None or cost.error is None:
            return told
        exact = cost.error.exact
        level = None if exact else round(cost.error.sqnr, 2)
        return told | {"_nbytes_after": cost.nbytes, "_sqnr_db": level}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A format for each layer. `model` is the checkpoint that `cq quant --recipe` makes of it,
    `noise` the error that it has, and `bound` one that no choice within the `budget` is below, but
    for the few bytes by which a header differs from what was reckoned."""

    measurements: Measurements
    chosen: tuple[Chosen, ...]
    model: Checkpoint
    bound: float
    budget: int | None

    @property
    def unused(self) -> int:
        """Bytes of the budget that are left; 0 without one."""
        return 0 if self.budget is None else self.budget - self.nbytes

    @property
    def best(self) -> bool:
        """Whether it is proven that no other choice of formats has less error in the budget, so
        that what is left of it fits no layer."""
        return self.noise <= self.bound

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The recipe."""
        return tuple(rule for rule, _ in self._rules_and_comments())

    @property
    def nbytes(self) -> int:
        """Bytes of the file, header and all."""
        return sink.nbytes_file(self.model)

    @property
    def noise(self) -> float:
        """The sum over layers of the error's energy over the weight's."""
        return math.fsum(one.noise for one in self.chosen)

    @property
    def min_sqnr(self) -> float:
        """The worst layer's, in dB; infinite if nothing is stored with an error."""
        return min(
            (one.cost.error.sqnr for one in self.chosen if one.cost and one.cost.error),
            default=math.inf,
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a file has it, with what is promised and what each layer is as comments."""
        checkpoint = self.measurements.checkpoint
        matches = know(checkpoint.specs, self.measurements.asked.family).matches
        told = [{**rule.to_dict(), **about} for rule, about in self._rules_and_comments()]
        found = document(checkpoint, matches, told)
        promised = {"_nbytes": self.nbytes, "_min_sqnr_db": finite(self.min_sqnr)}
        rules = found.pop("rules")
        return {**found, **promised, "rules": rules}

    def counts(self) -> dict[str, int]:
        """Number of layers by the candidate's name, kept ones under `kept`."""
        found: dict[str, int] = {}
        for one in self.chosen:
            name = "kept" if one.cost is None else one.cost.candidate.name
            found[name] = found.get(name, 0) + 1
        return dict(sorted(found.items()))

    def _rules_and_comments(self) -> list[tuple[Rule, dict[str, Any]]]:
        return [(one.rule(), one.comments()) for one in self.chosen] + [
            (Rule(pattern=exactly(layer), skip=True, settings={}, reason=reason), {})
            for layer, reason in _left_out(self.measurements)
        ]


def choose_formats(
    measurements: Measurements, *, budget: int | None = None, min_sqnr: float | None = None
) -> Mixture:
    """The mixture of least noise whose file has at most `budget` bytes, or the smallest one in
    which every layer has at least `min_sqnr` dB; with both, the least noise under both limits.

    A layer is only stored as the plan would do it unasked in one of the formats: what families and
    general advice keep stays as it is unless `only` named it, and layers that bear no 4 bits get
    none. The size is exact: that of the file which `cq quant --recipe` writes.

    Raises: PlanError if nothing fits, with the least size, or if there is nothing to do; UsageError
    without any limit.
    """
    check_limits(budget, min_sqnr)
    chooser = _Chooser(measurements, min_sqnr)
    mixture = chooser.smallest() if budget is None else chooser.within(budget)
    if all(one.cost is None for one in mixture.chosen):
        told = (
            f"no format stores a layer with {min_sqnr:g} dB or more"
            if budget is None or measurements.nbytes > budget
            else f"the checkpoint has {measurements.nbytes} bytes, which is within the budget"
        )
        raise PlanError(
            told, where=measurements.shown, hint="there is nothing to quantize", code="plan.nothing"
        )
    return mixture


def check_limits(budget: int | None, min_sqnr: float | None) -> None:
    """See that there is something to choose by. Raises: UsageError if not."""
    if budget is None and min_sqnr is None:
        raise UsageError("a budget or a least SQNR is needed to choose by")
    if min_sqnr is not None and not math.isfinite(min_sqnr):
        raise UsageError(f"the least SQNR cannot be {min_sqnr}")


class _Chooser:
    """The choices of every layer, and the way from places in them to a file's size."""

    def __init__(self, measurements: Measurements, min_sqnr: float | None) -> None:
        self._measurements = measurements
        self._min_sqnr = min_sqnr
        self._asked = _formats_asked(measurements)
        self._choices = [self._of(layer) for layer in measurements.layers]
        self._ways = [[_way(one) for one in choices] for choices in self._choices]

    def _of(self, layer: MeasuredLayer) -> list[Chosen]:
        """What the layer may get, keeping it first."""
        costs = [c for c in layer.costs if c.error is not None and c.against is None]
        asked = bool(costs) and layer.layer in self._asked
        least = -math.inf if self._min_sqnr is None or asked else self._min_sqnr
        found = [
            Chosen(layer=layer, cost=cost, reason=_told(cost))
            for cost in costs
            if cost.error is not None and cost.error.sqnr >= least
        ]
        if asked:
            return found
        none = "in every format it falls below the least SQNR" if costs else None
        told = layer.kept or none or "no format can store it"
        kept = "kept: it matters more than the bytes it takes" if found else told
        return [Chosen(layer=layer, cost=None, reason=kept), *found]

    def smallest(self) -> Mixture:
        """The smallest file; of ways of one size that of least noise."""
        places = [
            min(range(len(ways)), key=lambda i, w=ways: (w[i].size, w[i].loss))  # type: ignore[misc]
            for ways in self._ways
        ]
        return self._mixture(places)

    def within(self, budget: int) -> Mixture:
        """The least noise in at most `budget` bytes.

        What a choice does to the header is known when the file is laid out, so the difference to
        what was reckoned is taken into account in the next round.
        """
        modelled = sum(ways[0].size for ways in self._ways)
        capacity = budget - self._measurements.nbytes + modelled
        capacity = max(capacity, least_size(self._ways))
        best: Mixture | None = None
        seen: set[int] = set()
        for _ in range(_ROUNDS):
            seen.add(capacity)
            packing = pack(self._ways, capacity)
            if packing is None:
                break
            found = self._mixture(packing.places, bound=packing.bound, budget=budget)
            over = found.nbytes - budget
            if over <= 0 and (best is None or found.noise < best.noise):
                best = found
            capacity = packing.size - over
            if capacity in seen and over <= 0:
                break
            capacity -= over if capacity in seen else 0
        if best is None:
            best = replace(self.smallest(), budget=budget)
        if best.nbytes > budget:
            raise self._too_small(budget, best)
        return best

    def _too_small(self, budget: int, least: Mixture) -> PlanError:
        quality = "" if self._min_sqnr is None else f" with {self._min_sqnr:g} dB or more"
        return PlanError(
            f"`{self._measurements.shown}` cannot be made smaller than {least.nbytes} bytes"
            f"{quality}, over the budget of {budget} bytes",
            where=self._measurements.shown,
            hint=f"allow at least {least.nbytes} bytes"
            + (", or a lower SQNR" if quality else ", or name kept layers with `--only`"),
            code="plan.budget",
        )

    def _mixture(
        self, places: Sequence[int], *, bound: float = 0.0, budget: int | None = None
    ) -> Mixture:
        chosen = tuple(own[i] for own, i in zip(self._choices, places, strict=True))
        draft = Mixture(
            measurements=self._measurements,
            chosen=chosen,
            model=self._measurements.checkpoint,
            bound=bound,
            budget=budget,
        )
        if all(one.cost is None for one in chosen):
            return draft
        return replace(draft, model=_planned(self._measurements, draft.rules))


def _way(one: Chosen) -> Way:
    """About what it takes in the file: tensors, header, and the rule in the file's history."""
    rule = len(orjson.dumps(one.rule().to_dict()))
    if one.cost is None:
        return Way(one.layer.nbytes + rule + len(one.layer.considered.name) + 80, 0.0)
    return Way(one.cost.nbytes + one.cost.option.nbytes_header + rule, one.noise)


def _told(cost: Cost) -> str:
    assert cost.error is not None
    return "exact" if cost.error.exact else f"SQNR {cost.error.sqnr:.1f} dB"


def _settings(way: Candidate, group: int | None) -> dict[str, str]:
    """The settings of a rule that store a layer just so, whatever a command's own are."""
    plug: Format = catalog.load("formats", way.format)
    if way.optimizer is None:
        return {"format": way.format}
    settings = {"format": way.format, "scaling": way.scaling, "optimizer": way.optimizer}
    if plug.rotation != "never":
        settings["rotate"] = "off" if group is None else str(group)
    return settings


def _formats_asked(measurements: Measurements) -> set[str]:
    """The layers for which the user named a format, so that keeping them is no choice."""
    layers = [layer.layer for layer in measurements.layers]
    formats = dict(map(recipe.parse_only, measurements.asked.only))
    named = select.first_matches(tuple(formats), layers)
    rules = {rule.pattern: rule for rule in reversed(measurements.asked.rules)}
    ruled = select.first_matches(tuple(reversed(rules)), layers)
    return {
        layer
        for layer in layers
        if (layer in named and formats[named[layer]] is not None)
        or (layer in ruled and "format" in rules[ruled[layer]].settings)
    }


def _left_out(measurements: Measurements) -> list[tuple[str, str]]:
    """Layers that nobody measured, as `only` and `skip` left them out, but that the defaults would
    quantize; and why they are kept."""
    asked = measurements.asked
    if not asked.only and not asked.skip:
        return []
    measured = {layer.layer for layer in measurements.layers}
    plain = _notes(_planned(measurements, ()))
    return [
        (layer, "not named by `--only`" if asked.only else "named by `--skip`")
        for layer, note in plain.items()
        if note["action"] == "quantize" and layer not in measured
    ]


def _notes(model: Checkpoint) -> dict[str, Mapping[str, Any]]:
    return {recipe.layer_of(n["tensor"]): n for n in model.notes if n["tensor"].endswith(WEIGHT)}


def _planned(measurements: Measurements, rules: Sequence[Rule]) -> Checkpoint:
    """The checkpoint that `cq quant --recipe` makes of the rules, with its own defaults."""
    asked = replace(measurements.asked, recipe=tuple(rules), only=(), skip=())
    return planned(measurements.checkpoint, asked)
