"""`cq analyze` as a function: what a file is, and what quantizing would make of it.

Owns the order of the questions and the value that answers them. Reads headers, markers and the few
scalars of adapter files; never imports torch for a checkpoint in a file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cq.core import comfy, sink, stored
from cq.core.checkpoint import Checkpoint
from cq.core.components import Component, components
from cq.core.errors import InputError, PlanError
from cq.core.families import Match
from cq.core.formats import Format, loaded_by
from cq.core.header import total_nbytes
from cq.core.knowledge import AUTO, Knowledge, know
from cq.core.recipe import Rule
from cq_analyze import adapters, calibrations, inventory, planning
from cq_analyze.adapters import AdapterFile
from cq_analyze.calibrations import CalibrationFile
from cq_analyze.inventory import Inventory
from cq_analyze.planning import Settings
from cq_analyze.report import Finding
from cq_analyze.verification import verify

# What a file can be whose layers nobody asked to quantize: a fact of the analysis, not a failure.
_NO_PLAN = frozenset({"plan.nothing", "plan.diffusers"})
_UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `cq quant` would make of a checkpoint: its decisions, one for each weight, the sizes of
    both files in bytes, the memory that the largest part holds, and who loads the result."""

    format: str
    decisions: tuple[Mapping[str, Any], ...]
    nbytes_before: int
    nbytes: int
    nbytes_peak: int
    loaded_by: str

    @property
    def ratio(self) -> float:
        """The resulting file's size over that of today's tensors; 1 for an empty checkpoint."""
        return self.nbytes / self.nbytes_before if self.nbytes_before else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "format": self.format,
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
            "ratio": self.ratio,
            "nbytes_peak": self.nbytes_peak,
            "loaded_by": self.loaded_by,
            "decisions": [dict(decision) for decision in self.decisions],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What is quantized in a checkpoint already: `formats` and `evidence` count layers, `findings`
    are what ComfyUI would trip over, as `cq verify --header-only` finds it."""

    formats: Mapping[str, int]
    evidence: Mapping[str, int]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    loaded_by: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "layers": sum(self.formats.values()),
            "formats": dict(self.formats),
            "evidence": dict(self.evidence),
            "findings": [found.to_dict() for found in self.findings],
            "notes": list(self.notes),
            "loaded_by": self.loaded_by,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What `analyze` found. `what` is `model`, `quantized`, `adapter`, `calibration` or `other`; of
    `plan`, `quantized`, `adapter` and `calibration` those are None that do not apply. `unplanned`
    says why there is no plan for a file that might have one."""

    checkpoint: str
    what: str
    nbytes_file: int
    inventory: Inventory
    components: tuple[Component, ...]
    known: Knowledge
    plan: Plan | None = None
    unplanned: str | None = None
    quantized: Quantized | None = None
    adapter: AdapterFile | None = None
    calibration: CalibrationFile | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was found that ComfyUI would trip over."""
        return self.quantized is None or not self.quantized.findings

    @property
    def notes(self) -> tuple[str, ...]:
        """What the families' files have to say to a user."""
        families = {match.family.name: match.family for match in self.known.matches}
        return tuple(note for family in families.values() for note in family.notes)

    def to_dict(self) -> dict[str, Any]:
        """The analysis as the JSON object that `--json` prints."""
        return {
            "cq": 1,
            "kind": "analysis",
            "checkpoint": self.checkpoint,
            "what": self.what,
            "passed": self.passed,
            "nbytes_file": self.nbytes_file,
            "families": [_family(match) for match in self.known.matches],
            "doubtful": [[_family(m) for m in d.matches] for d in self.known.doubtful],
            "notes": list(self.notes),
            "components": [_component(component) for component in self.components],
            "inventory": self.inventory.to_dict(),
            "plan": self.plan and self.plan.to_dict(),
            "unplanned": self.unplanned,
            "quantized": self.quantized and self.quantized.to_dict(),
            "adapter": self.adapter and self.adapter.to_dict(),
            "calibration": self.calibration and self.calibration.to_dict(),
        }


def analyze(
    checkpoint: Checkpoint,
    *,
    family: str = AUTO,
    format: str | None = None,
    scaling: str | None = None,
    optimizer: str | None = None,
    rotate: str | None = None,
    recipe: str | os.PathLike[str] | Sequence[Rule] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    requantize: bool = False,
    allow_custom_loader: bool = False,
) -> Analysis:
    """What the checkpoint is and what quantizing it would make of it; from its header alone.

    The words are those of `cq_quant.quantize`; None is its default. A quantized checkpoint has no
    plan without `requantize`, an adapter none at all.

    Raises: PlanError if a family, format or optimizer does not exist, a pattern matches nothing, or
    a plan is asked of a quantized checkpoint or an adapter; InputError for a recipe that is none.
    """
    settings = Settings(
        format=format,
        scaling=scaling,
        optimizer=optimizer,
        rotate=rotate,
        family=family,
        recipe=recipe,
        only=only,
        skip=skip,
        requantize=requantize,
        allow_custom_loader=allow_custom_loader,
    )
    calibration = calibrations.describe(checkpoint)
    if calibration is not None:
        return _calibration(checkpoint, calibration, settings)
    adapter = adapters.describe(checkpoint)
    if adapter is not None:
        return _adapter(checkpoint, adapter, settings)
    parts = components(checkpoint.specs)
    known = know(checkpoint.specs, family, found=parts)
    quantized = _quantized(checkpoint) if _may_be_quantized(checkpoint) else None
    plan, unplanned = None, None
    if quantized is None or settings.asked:
        try:
            plan = _plan(checkpoint, settings)
        except PlanError as error:
            if error.code not in _NO_PLAN:
                raise
            unplanned = error.message + (f": {error.hint}" if error.hint else "")
    model = plan is not None or any(c.kind in {"diffusion model", "text encoder"} for c in parts)
    return Analysis(
        checkpoint=shown(checkpoint),
        what="quantized" if quantized else "model" if model else "other",
        nbytes_file=_nbytes(checkpoint),
        inventory=inventory.take(checkpoint, known, parts, coded=quantized is not None),
        components=parts,
        known=known,
        plan=plan,
        unplanned=unplanned,
        quantized=quantized,
    )


def shown(checkpoint: Checkpoint) -> str:
    """The checkpoint's name in messages."""
    return ", ".join(source.shown for source in checkpoint.sources)


def _nbytes(checkpoint: Checkpoint) -> int:
    """Size of the checkpoint's files; of one that is still to be computed, of what it would be."""
    if checkpoint.stages:
        return sink.nbytes_file(checkpoint)
    return sum(file.nbytes for source in checkpoint.sources for file in source.files)


def _adapter(checkpoint: Checkpoint, adapter: AdapterFile, settings: Settings) -> Analysis:
    if settings.asked or settings.family != AUTO:
        raise PlanError(
            f"`{shown(checkpoint)}` is an adapter, which is merged, not quantized",
            hint="merge it into its base with `cq merge`, or leave the options of a plan out",
            code="plan.adapter",
        )
    return Analysis(
        checkpoint=shown(checkpoint),
        what="adapter",
        nbytes_file=_nbytes(checkpoint),
        inventory=inventory.take(checkpoint, Knowledge(), (), coded=False),
        components=(),
        known=Knowledge(),
        adapter=adapter,
    )


def _calibration(
    checkpoint: Checkpoint, calibration: CalibrationFile, settings: Settings
) -> Analysis:
    if settings.asked or settings.family != AUTO:
        raise PlanError(
            f"`{shown(checkpoint)}` is a calibration, which holds no weights",
            hint="give it to `cq quant MODEL --calibration`, or leave the options of a plan out",
            code="plan.calibration",
        )
    return Analysis(
        checkpoint=shown(checkpoint),
        what="calibration",
        nbytes_file=_nbytes(checkpoint),
        inventory=inventory.take(checkpoint, Knowledge(), (), coded=False),
        components=(),
        known=Knowledge(),
        calibration=calibration,
    )


def _may_be_quantized(checkpoint: Checkpoint) -> bool:
    try:
        return bool(comfy.find_quantized(checkpoint))
    except InputError:  # a header entry that is none: a finding
        return True


def _plan(checkpoint: Checkpoint, settings: Settings) -> Plan:
    model = planning.planned(checkpoint, settings)
    before = sum(total_nbytes(s.spec(n) for n in s.owner) for s in checkpoint.sources)
    return Plan(
        format=settings.format or planning.DEFAULT_FORMAT,
        decisions=model.notes,
        nbytes_before=before,
        nbytes=sink.nbytes_file(model),
        nbytes_peak=max((part.nbytes_peak for part in model.parts), default=0),
        loaded_by=planning.loaders(model),
    )


def _quantized(checkpoint: Checkpoint) -> Quantized:
    report = verify(checkpoint, header_only=True)
    formats: Counter[str] = Counter()
    evidence: Counter[str] = Counter()
    plugs: dict[str, Format] = {}
    with suppress(InputError):  # markers that cannot be read are findings
        for clue in stored.clues(checkpoint):
            evidence[clue.evidence] += 1
            try:
                layer = stored.resolve(clue, "")
            except InputError:
                formats[_UNREADABLE] += 1
            else:
                formats[layer.label] += 1
                plugs[layer.format.name] = layer.format
    return Quantized(
        formats=dict(formats.most_common()),
        evidence=dict(evidence.most_common()),
        findings=report.findings,
        notes=report.notes,
        loaded_by=loaded_by(plugs[name] for name in sorted(plugs)),
    )


def _family(match: Match) -> dict[str, Any]:
    family = match.family
    return {
        "name": family.name,
        "title": family.title,
        "variant": match.variant,
        "prefix": match.prefix,
    }


def _component(component: Component) -> dict[str, Any]:
    return {
        "kind": component.kind,
        "prefix": component.prefix,
        "families": [_family(match) for match in component.detection.matches],
        "tensors": component.tensors,
        "nbytes": component.nbytes,
    }
