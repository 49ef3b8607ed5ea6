"""The report of `cq verify` as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cq.cli import options
from cq.cli.output import size
from cq.core.text import printable
from cq_analyze.outputs import mean_error

if TYPE_CHECKING:
    from cq_analyze.metrics import Sums
    from cq_analyze.report import Comparison, Fidelity, Finding, Gate, Report
    from cq_analyze.survival import Survival

_SHOWN_FAILURES = 10
_SHOWN_TENSORS = 5


def show(report: Report) -> None:
    """The report as a person reads it, on stdout."""
    if report.checkpoint is not None:
        _show_file(report)
    _show_pictures(report)
    for line in _verdict(report):
        options.terminal().data(line)


def _show_file(report: Report) -> None:
    here = options.terminal()
    formats = ", ".join(f"{n} layers of `{name}`" for name, n in report.formats.items())
    here.data(
        f"{report.checkpoint}: {report.tensors} tensors, {size(report.nbytes)},"
        f" {formats or 'not quantized'}"
    )
    needed = [] if report.first_comfyui is None else [f"ComfyUI {report.first_comfyui} or newer"]
    needed += [f"{loader} for `{name}`" for name, loader in report.custom_loaders.items()]
    if needed:
        here.data(f"needs {' and '.join(needed)}")
    for note in report.notes:
        here.data(f"note: {note}")
    if report.fidelity is not None:
        _show_fidelity(report.fidelity)
    if report.unquantized is not None:
        kept = report.unquantized
        here.data(
            f"\nnot quantized: {kept.same} tensors equal the reference's,"
            f" {len(kept.changed)} differ, {kept.only_here} are only here,"
            f" {kept.only_in_reference} only in the reference"
        )
        for changed in kept.changed[:_SHOWN_TENSORS]:
            here.data(_changed(changed))


def _show_fidelity(found: Fidelity) -> None:
    here = options.terminal()
    here.data("")
    rows = [_row(printable(x.layer), x.fidelity) for x in found.worst if x.fidelity]
    roles = found.roles
    if len(roles) > 1:
        rows += [_row(f"all of role {role}", sums) for role, sums in roles.items()]
    rows.append(_row(f"all {len(found.layers)} layers", found.overall))
    here.table(
        ("worst layers", "SQNR dB>", "relative error>", "cosine>", "max error>", "mean shift>"),
        rows,
    )
    _show_outputs(found)
    if found.survival is None or found.survival.share is None:
        return
    least = sorted(
        (x for x in found.layers if x.survival is not None and x.survival.share is not None),
        key=lambda layer: _share(layer.survival),
    )
    here.data("")
    here.table(
        ("change from the base", "kept>", "SNR dB>"),
        [
            *(_kept(printable(x.layer), x.survival) for x in least[:_SHOWN_FAILURES] if x.survival),
            _kept(f"all {len(least)} layers that changed", found.survival),
        ],
    )


def _show_outputs(found: Fidelity) -> None:
    """The layers whose outputs suffer most; in a note stands what that is."""
    errors = found.outputs
    if not errors:
        return
    mean = mean_error(errors)
    here = options.terminal()
    here.data("")
    here.table(
        ("worst outputs", "output error>", "error of the weight>"),
        [
            *(
                (
                    printable(layer.layer),
                    f"{error.relative_error:.5f}",
                    "" if layer.fidelity is None else f"{layer.fidelity.relative_error:.5f}",
                )
                for layer, error in found.worst_outputs
            ),
            (f"mean of {len(errors)} layers", "exact" if mean is None else f"{mean:.5f}", ""),
        ],
    )


def _share(found: Survival | None) -> float:
    return 0.0 if found is None or found.share is None else found.share


def _kept(name: str, found: Survival) -> tuple[str, ...]:
    exact = found.snr is not None and math.isinf(found.snr)
    snr = "" if found.snr is None else "exact" if exact else f"{found.snr:.2f}"
    return name, f"{100 * _share(found):.1f} %", snr


def _changed(found: Comparison) -> str:
    dtypes = found.dtype
    if found.dtype != found.reference_dtype:
        dtypes = f"{found.reference_dtype} -> {found.dtype}"
    sums = found.fidelity
    told = (
        ""
        if sums is None
        else (f", relative error {sums.relative_error:.3g}, max error {sums.max_abs_error:.3g}")
    )
    return f"  `{printable(found.name)}` {dtypes}{told}"


def _show_pictures(report: Report) -> None:
    here = options.terminal()
    if report.renders is not None:
        renders = report.renders
        here.data(f"\n{renders.device} at {renders.url}")
        here.table(
            ("model", "s per picture>", "first run s>", "peak memory>"),
            [
                (
                    side.model,
                    f"{side.seconds_per_picture:.2f}",
                    f"{side.timings[0].seconds:.2f}",
                    "" if side.nbytes_peak is None else size(side.nbytes_peak),
                )
                for side in (renders.reference, renders.quantized)
            ],
        )
    if report.pictures is None:
        return
    from cq_analyze.images import told

    found = report.pictures
    if report.checkpoint is None:
        for note in report.notes:
            here.data(f"note: {note}")
    here.data(f"\npictures: {len(found.pictures)} pairs of {found.reference} and {found.compared}")
    for picture in found.worst[:_SHOWN_FAILURES]:
        here.data(f"  `{printable(picture.name)}`: {told(picture)}")
    if len(found.pictures) > 1 and found.mean_psnr is not None:
        ssim = "" if found.mean_ssim is None else f", SSIM {found.mean_ssim:.4f}"
        here.data(f"  on average: PSNR {found.mean_psnr:.2f} dB{ssim}")


def _row(name: str, sums: Sums) -> tuple[str, ...]:
    if sums.exact:
        return name, "exact", "0", "1", "0", "0"
    cosine = "" if sums.cosine is None else f"{sums.cosine:.6f}"
    return (
        name,
        f"{sums.sqnr:.2f}",
        f"{sums.relative_error:.5f}",
        cosine,
        f"{sums.max_abs_error:.3g}",
        f"{sums.mean_shift:.2g}",
    )


def _verdict(report: Report) -> Iterator[str]:
    counting = {found.name for found in report.failing}
    for name, found in _by_name(report.findings).items():
        yield ""
        for one in found[:_SHOWN_FAILURES]:
            yield f"{name}: {one}"
        if len(found) > _SHOWN_FAILURES:
            yield f"{name}: {len(found) - _SHOWN_FAILURES} more like these"
        yield f"  what to do: {found[0].mend}"
        if name not in counting:
            yield "  does not count: `--fail-on` names others"
    for gate in report.gates:
        yield from _gate(gate)
    if not report.findings and not report.gates:
        yield "\nnothing to find fault with" + (" in the header" if report.header_only else "")


def _by_name(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    grouped: dict[str, list[Finding]] = {}
    for found in findings:
        grouped.setdefault(found.name, []).append(found)
    return grouped


def _value(value: float) -> str:
    if math.isnan(value):
        return "could not be measured"
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def _gate(gate: Gate) -> Iterator[str]:
    name = "--" + gate.name.replace("_", "-")
    if gate.holds:
        yield f"\n{name} {gate.limit:g}: kept by all {gate.measured} {gate.of}"
        return
    if not gate.measured:
        yield f"\n{name} {gate.limit:g}: not kept, as there is nothing to measure"
        return
    yield f"\n{name} {gate.limit:g}: not kept by {len(gate.failures)} of {gate.count} {gate.of}"
    for layer, value in gate.failures[:_SHOWN_FAILURES]:
        yield f"  `{layer}`: {_value(value)}"
    if len(gate.failures) > _SHOWN_FAILURES:
        yield f"  and {len(gate.failures) - _SHOWN_FAILURES} more"
