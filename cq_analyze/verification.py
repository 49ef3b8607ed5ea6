"""`cq verify` as a function.

Is a checkpoint what ComfyUI expects of a quantized one, and how near are its weights to those that
it was made from? Owns the order of the checks and the report that they add up to.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cq.core import comfy, recipe, select
from cq.core.calibration import Calibration
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import DTYPES
from cq.core.engine import local
from cq.core.errors import PlanError, UsageError
from cq.core.formats import SMOOTHED_SINCE, first_release, newest
from cq.core.knowledge import Knowledge, know
from cq.core.manifest import history
from cq.core.source import check_unchanged
from cq.core.stored import SMOOTHING, is_code
from cq_analyze import agreement, lost, outputs, structure, values
from cq_analyze.equalized import rounded
from cq_analyze.findings import KINDS
from cq_analyze.reference import Reference
from cq_analyze.report import (
    Comparison,
    Fidelity,
    Finding,
    Layer,
    Report,
    Unquantized,
    finding,
    gates,
    natural,
)

if TYPE_CHECKING:
    from cq_analyze.faults import Outcome
    from cq_analyze.structure import Marked, Structure


class _Limits(NamedTuple):
    """The gates on layers, None where there is none."""

    min_sqnr: float | None
    max_error: float | None
    max_output_error: float | None


def verify(
    checkpoint: Checkpoint,
    *,
    against: Checkpoint | None = None,
    base: Checkpoint | None = None,
    min_sqnr: float | None = None,
    max_error: float | None = None,
    calibration: str | os.PathLike[str] | None = None,
    max_output_error: float | None = None,
    fail_on: Sequence[str] | None = None,
    header_only: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
    on_progress: Callable[[local.Progress], None] | None = None,
) -> Report:
    """Check that ComfyUI can load a quantized checkpoint and will decode it to what it should be.

    Every way in which a checkpoint is not right is a finding, never an exception. `against` is the
    unquantized checkpoint; with it, weights are decoded and compared, and `min_sqnr` (in dB) and
    `max_error` (a relative error) are limits that every quantized layer must keep. `calibration` is
    a file of `cq.calibration.Recorder`: by the inputs in it the errors of the layers' outputs are
    judged, for which `max_output_error` is a limit. `base` is what `against` was merged from: it
    shows how much of the change survives. `fail_on` are patterns of the names of findings that make
    the report fail, None for all of them. `header_only` looks at names, shapes and markers alone.
    The checkpoint need not be a file: what a stage promises is computed, measured and dropped,
    layer by layer, within `memory_limit` bytes.

    Raises: UsageError for a gate, a calibration or a base without `against`, one with
    `header_only`, or a pattern that no finding has; PlanError if `against` or `base` is quantized
    itself, or the calibration is for another model; InputError if it is none.
    """
    _check_usage(against, base, header_only, calibrated=calibration is not None)
    limits = _Limits(min_sqnr, max_error, max_output_error)
    _check_limits(limits, against, calibrated=calibration is not None)
    check_names(fail_on)
    for other, word in ((against, "reference"), (base, "base")):
        if other is not None:
            _refuse_quantized(other, word)
    judged = structure.examine(checkpoint)
    report = dataclasses.replace(
        _by_header(checkpoint, judged, header_only=header_only),
        against=None if against is None else _shown(against),
        base=None if base is None else _shown(base),
        fail_on=None if fail_on is None else tuple(fail_on),
    )
    if header_only:
        return report
    recorded = None if calibration is None else Calibration.open(calibration)
    settings = local.Settings(workers=workers, memory_limit=memory_limit, on_progress=on_progress)
    return _by_weights(checkpoint, judged, report, (against, base, recorded), limits, settings)


def _by_weights(
    checkpoint: Checkpoint,
    judged: Structure,
    report: Report,
    others: tuple[Checkpoint | None, Checkpoint | None, Calibration | None],
    limits: _Limits,
    settings: local.Settings,
) -> Report:
    """`report` with what the weights tell. `others` are `verify`'s reference, base and
    calibration."""
    against, base, recorded = others
    reference, notes = _reference(against, report, recorded, has_base=base is not None)
    origin = None if base is None else Reference(base)
    decodes = any(marked.stored is not None for marked in judged.marked)
    kitchen = agreement.version() if decodes else None  # imported here, not by several threads
    outcomes = values.inspect(checkpoint, judged, reference, settings, base=origin)
    read = [other.inputs for other in (checkpoint, against, base) if other is not None]
    read += [] if recorded is None else [recorded.source.files]
    check_unchanged(file for files in read for file in files)
    measured = {outcome.layer: outcome for outcome in outcomes if outcome.layer is not None}
    layers = [_measured(own, measured.get(own.layer)) for own in report.layers]
    findings = [*judged.findings, *(found for outcome in outcomes for found in outcome.findings)]
    report = dataclasses.replace(
        report,
        layers=tuple(layers),
        notes=(*report.notes, *_unread(checkpoint, judged), *notes, *_unjudged(layers, recorded)),
        kitchen=kitchen,
    )
    if reference is not None:
        findings += _lost_biases(judged, reference)
        gone = lost.absent(checkpoint, (own.layer for own in layers), reference)
        findings += lost.tensors(checkpoint, gone, reference, findings)
        findings += lost.unlike(outcomes, report.history)
        report = dataclasses.replace(
            report,
            fidelity=_fidelity(layers),
            unquantized=_unquantized(checkpoint, judged, reference, outcomes, len(gone)),
            gates=tuple(gates(layers, *limits)),
        )
    return dataclasses.replace(report, findings=_ordered(findings))


def _by_header(checkpoint: Checkpoint, judged: Structure, *, header_only: bool) -> Report:
    """What is known before a weight is read."""
    known = know(checkpoint.specs)
    return Report(
        checkpoint=_shown(checkpoint),
        history=None if header_only else json.loads(history(checkpoint)),
        header_only=header_only,
        tensors=len(checkpoint.specs),
        nbytes=checkpoint.nbytes,
        layers=tuple(_layer(marked, known) for marked in judged.marked),
        findings=_ordered(judged.findings),
        notes=judged.notes,
        first_comfyui=_first_comfyui(judged),
        custom_loaders=_custom_loaders(judged),
    )


def _reference(
    against: Checkpoint | None, report: Report, recorded: Calibration | None, *, has_base: bool
) -> tuple[Reference | None, list[str]]:
    """What weights and outputs are compared with, and what is to be said of it."""
    if against is None:
        return None, []
    judging = None
    if recorded is not None:
        named = [layer.layer for layer in report.layers]
        judging = outputs.Outputs(recorded, named, str(report.checkpoint))
    found = rounded(against, report.history or {"stages": []}, recorded, has_base=has_base)
    notes = [] if found.note is None else [found.note]
    notes += [] if has_base else lost.unmerged(against, report.history)
    return Reference(found.checkpoint, judging, found.inputs), notes


def check_names(patterns: Sequence[str] | None) -> None:
    """Raises: UsageError for a pattern that is the name of no finding."""
    for pattern in patterns or ():
        test = select.matcher(pattern)
        if not any(test(name) for name in KINDS):
            raise UsageError(
                f"there is no finding `{pattern}`",
                hint=select.nearest(pattern, tuple(KINDS)) or "docs/findings.md lists them",
            )


def _check_usage(
    against: Checkpoint | None,
    base: Checkpoint | None,
    header_only: bool,
    *,
    calibrated: bool,
) -> None:
    if header_only and against is not None:
        raise UsageError(
            "`--header-only` reads no weights, so there is nothing to compare with `--against`",
            hint="leave one of them out",
        )
    if base is not None and against is None:
        raise UsageError(
            "`--base` needs what was made of it",
            hint="add `--against MERGED`, the unquantized checkpoint with the change",
        )
    if calibrated and against is None:
        raise UsageError(
            "`--calibration` needs weights to compare with",
            hint="add `--against REFERENCE`, the checkpoint that the file was made from",
        )


def _check_limits(limits: _Limits, against: Checkpoint | None, *, calibrated: bool) -> None:
    for name, limit in limits._asdict().items():
        flag = "--" + name.replace("_", "-")
        if limit is None:
            continue
        if against is None:
            raise UsageError(
                f"`{flag}` needs a reference to measure against",
                hint="add `--against REFERENCE`, the checkpoint that the file was made from",
            )
        if flag == "--max-output-error" and not calibrated:
            raise UsageError(f"`{flag}` needs recorded inputs", hint="add `--calibration FILE`")
        if not math.isfinite(limit) or (limit < 0 and flag != "--min-sqnr"):
            raise UsageError(f"`{flag}` cannot be {limit}")


def _refuse_quantized(against: Checkpoint, word: str) -> None:
    found = comfy.find_quantized(against)
    if found:
        raise PlanError(
            f"the {word} `{_shown(against)}` is quantized itself: {len(found)} layers,"
            f" such as `{found[0].layer}` (by its {found[0].evidence})",
            where=found[0].layer,
            hint="give the unquantized checkpoint; errors against rounded weights say little",
            code="plan.reference_quantized",
        )


def _shown(checkpoint: Checkpoint) -> str:
    return ", ".join(source.shown for source in checkpoint.sources)


def _first_comfyui(judged: Structure) -> str | None:
    """The first ComfyUI release that reads all marked layers but those of custom loaders."""
    releases = []
    for marked in judged.marked:
        if marked.format is None:
            continue
        release = first_release(
            marked.format,
            embedding=recipe.has_role(marked.layer, "embedding"),
            experts="weight" in marked.specs and len(marked.specs["weight"].shape) == 3,
            rotated=bool(marked.settings.get("convrot")),
        )
        releases += [] if release is None else [release]
        releases += [SMOOTHED_SINCE] if SMOOTHING in marked.specs else []
    return newest(releases)


def _custom_loaders(judged: Structure) -> dict[str, str]:
    """What loads the formats that no released ComfyUI does, by format."""
    plugs = [m.format for m in judged.marked if m.format is not None]
    return {
        plug.name: plug.loader or "a loader of its own"
        for plug in sorted(plugs, key=lambda plug: plug.name)
        if plug.first_comfyui is None and not plug.casts
    }


def _layer(marked: Marked, known: Knowledge) -> Layer:
    role = known.role(marked.layer)
    apart = "embedding" if recipe.has_role(marked.layer, "embedding") else "linear"
    stored = {k: v for k, v in marked.specs.items() if is_code(k)}
    return Layer(
        layer=marked.layer,
        role=apart if role is None else role.name,
        format=None if marked.format is None else marked.format.name,
        settings=marked.settings,
        weight=stored.get("weight"),
        nbytes=sum(spec.nbytes for spec in stored.values()),
    )


def _measured(layer: Layer, outcome: Outcome | None) -> Layer:
    if outcome is None:
        return layer
    return dataclasses.replace(
        layer, fidelity=outcome.fidelity, survival=outcome.survival, output=outcome.output
    )


def _ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda f: (natural(f.layer or ""), f.name)))


def _unread(checkpoint: Checkpoint, judged: Structure) -> list[str]:
    """A note on plain tensors of dtypes that torch cannot hold."""
    dtypes = [
        spec.dtype
        for name, spec in checkpoint.specs.items()
        if DTYPES[spec.dtype].torch_name is None and name not in judged.coded
    ]
    if not dtypes:
        return []
    return [f"{len(dtypes)} tensors were not looked into: {', '.join(sorted(set(dtypes)))}"]


def _unjudged(layers: Sequence[Layer], recorded: Calibration | None) -> list[str]:
    """What output errors are, and how many layers have none."""
    if recorded is None:
        return []
    missing = sum(x.output is None for x in layers if x.fidelity is not None)
    told = f"; of {missing} layers no inputs were recorded" if missing else ""
    return [outputs.NOTE + told]


def _lost_biases(judged: Structure, reference: Reference) -> list[Finding]:
    seen = {(found.name, found.layer) for found in judged.findings}
    return [
        finding("bias.missing", marked.layer, "has no bias, but the reference has one")
        for marked in judged.marked
        if "bias" not in marked.specs
        and reference.find(f"{marked.layer}.bias") is not None
        and ("bias.missing", marked.layer) not in seen
    ]


def _fidelity(layers: Sequence[Layer]) -> Fidelity | None:
    measured = tuple(layer for layer in layers if layer.fidelity is not None)
    return Fidelity(measured) if measured else None


def _unquantized(
    checkpoint: Checkpoint,
    judged: Structure,
    reference: Reference,
    outcomes: Sequence[Outcome],
    gone: int,
) -> Unquantized:
    compared = [found for outcome in outcomes for found in outcome.compared]
    own = [name for name in checkpoint.specs if name not in judged.coded]
    return Unquantized(
        same=sum(c.same for c in compared),
        changed=tuple(sorted((c for c in compared if not c.same), key=_by_error)),
        only_here=sum(reference.find(name) is None for name in own),
        only_in_reference=gone,
    )


def _by_error(changed: Comparison) -> tuple[float, tuple[str | int, ...]]:
    error = math.inf if changed.fidelity is None else changed.fidelity.relative_error
    # NaN, from tensors that are not finite, has no order of its own
    return (-math.inf if math.isnan(error) else -error, natural(changed.name))
