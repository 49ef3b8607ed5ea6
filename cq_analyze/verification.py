"""`cq verify` as a function.

Is a checkpoint what ComfyUI expects of a quantized one, and how near are its weights to those that
it was made from? Owns the order of the checks and the report that they add up to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cq.core import comfy, recipe
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import DTYPES
from cq.core.engine import local
from cq.core.errors import PlanError, UsageError
from cq.core.formats import first_release, newest
from cq.core.source import check_unchanged
from cq.core.stored import SMOOTHING, is_code
from cq_analyze import structure, values
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
    from cq_analyze.structure import Marked, Structure
    from cq_analyze.values import Outcome


def verify(
    checkpoint: Checkpoint,
    *,
    against: Checkpoint | None = None,
    min_sqnr: float | None = None,
    max_error: float | None = None,
    header_only: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
    on_progress: Callable[[local.Progress], None] | None = None,
) -> Report:
    """Check that ComfyUI can load a quantized checkpoint and will decode it to what it should be.

    Every way in which a checkpoint is not right is a finding, never an exception. `against` is the
    unquantized checkpoint; with it, weights are decoded and compared, and `min_sqnr` (in dB) and
    `max_error` (a relative error) are limits that every quantized layer must keep. `header_only`
    looks at names, shapes and markers alone. The checkpoint need not be a file: what a stage
    promises is computed, measured and dropped, layer by layer, within `memory_limit` bytes.

    Raises: UsageError for a gate without `against`, or either with `header_only`; PlanError if
    `against` is quantized itself.
    """
    _check_usage(against, min_sqnr, max_error, header_only)
    if against is not None:
        _refuse_quantized(against)
    judged = structure.examine(checkpoint)
    layers = [_layer(marked) for marked in judged.marked]
    report = Report(
        checkpoint=_shown(checkpoint),
        against=None if against is None else _shown(against),
        header_only=header_only,
        tensors=len(checkpoint.specs),
        nbytes=checkpoint.nbytes,
        layers=tuple(layers),
        findings=_ordered(judged.findings),
        notes=judged.notes,
        first_comfyui=_first_comfyui(judged),
        custom_loaders=_custom_loaders(judged),
    )
    if header_only:
        return report
    reference = None if against is None else Reference(against)
    settings = local.Settings(workers=workers, memory_limit=memory_limit, on_progress=on_progress)
    outcomes = values.inspect(checkpoint, judged, reference, settings)
    check_unchanged((*checkpoint.inputs, *(() if against is None else against.inputs)))
    measured = {o.layer: o.fidelity for o in outcomes if o.layer is not None}
    layers = [dataclasses.replace(own, fidelity=measured.get(own.layer)) for own in layers]
    findings = [*judged.findings, *(found for outcome in outcomes for found in outcome.findings)]
    report = dataclasses.replace(
        report, layers=tuple(layers), notes=(*judged.notes, *_unread(checkpoint, judged))
    )
    if reference is not None:
        findings += _lost_biases(judged, reference)
        report = dataclasses.replace(
            report,
            fidelity=_fidelity(layers),
            unquantized=_unquantized(checkpoint, judged, reference, outcomes),
            gates=tuple(gates(layers, min_sqnr, max_error)),
        )
    return dataclasses.replace(report, findings=_ordered(findings))


def _check_usage(
    against: Checkpoint | None,
    min_sqnr: float | None,
    max_error: float | None,
    header_only: bool,
) -> None:
    if header_only and against is not None:
        raise UsageError(
            "`--header-only` reads no weights, so there is nothing to compare with `--against`",
            hint="leave one of them out",
        )
    for flag, limit, least in (("--min-sqnr", min_sqnr, -math.inf), ("--max-error", max_error, 0)):
        if limit is None:
            continue
        if against is None:
            raise UsageError(
                f"`{flag}` needs a reference to measure against",
                hint="add `--against REFERENCE`, the checkpoint that the file was made from",
            )
        if not math.isfinite(limit) or limit < least:
            raise UsageError(f"`{flag}` cannot be {limit}")


def _refuse_quantized(against: Checkpoint) -> None:
    found = comfy.find_quantized(against)
    if found:
        raise PlanError(
            f"the reference `{_shown(against)}` is quantized itself: {len(found)} layers,"
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
        releases += ["0.30.0"] if SMOOTHING in marked.specs else []
    return newest(releases)


def _custom_loaders(judged: Structure) -> dict[str, str]:
    """What loads the formats that no released ComfyUI does, by format."""
    plugs = [m.format for m in judged.marked if m.format is not None]
    return {
        plug.name: plug.loader or "a loader of its own"
        for plug in sorted(plugs, key=lambda plug: plug.name)
        if plug.first_comfyui is None and not plug.casts
    }


def _layer(marked: Marked) -> Layer:
    stored = {k: v for k, v in marked.specs.items() if is_code(k)}
    return Layer(
        layer=marked.layer,
        format=None if marked.format is None else marked.format.name,
        settings=marked.settings,
        weight=stored.get("weight"),
        nbytes=sum(spec.nbytes for spec in stored.values()),
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


def _lost_biases(judged: Structure, reference: Reference) -> list[Finding]:
    return [
        finding("bias.missing", marked.layer, "has no bias, but the reference has one")
        for marked in judged.marked
        if "bias" not in marked.specs and reference.find(f"{marked.layer}.bias") is not None
    ]


def _fidelity(layers: Sequence[Layer]) -> Fidelity | None:
    measured = tuple(layer for layer in layers if layer.fidelity is not None)
    return Fidelity(measured) if measured else None


def _unquantized(
    checkpoint: Checkpoint,
    judged: Structure,
    reference: Reference,
    outcomes: Sequence[Outcome],
) -> Unquantized:
    compared = [found for outcome in outcomes for found in outcome.compared]
    found = {name: reference.find(name) for name in checkpoint.specs}
    # The reference's weight of a layer whose marker or weight is lost is not missing twice.
    taken = {*found.values(), *(reference.find(m.layer + comfy.WEIGHT) for m in judged.marked)}
    return Unquantized(
        same=sum(c.same for c in compared),
        changed=tuple(sorted((c for c in compared if not c.same), key=_by_error)),
        only_here=sum(found[name] is None for name in found if name not in judged.coded),
        only_in_reference=sum(name not in taken for name in reference.checkpoint.specs),
    )


def _by_error(changed: Comparison) -> tuple[float, tuple[str | int, ...]]:
    error = math.inf if changed.fidelity is None else changed.fidelity.relative_error
    # NaN, from tensors that are not finite, has no order of its own
    return (-math.inf if math.isnan(error) else -error, natural(changed.name))
