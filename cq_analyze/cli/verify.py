"""`cq verify`: options to `verify`, and its report as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cq.cli import options
from cq.cli.output import size
from cq.core.errors import UsageError

if TYPE_CHECKING:
    from cq_analyze.metrics import Sums
    from cq_analyze.report import Finding, Gate, Report

_SHOWN_FAILURES = 10


def register(app: typer.Typer) -> None:
    """Add the command."""

    @options.command(app, "verify")
    def verify(
        quantized: Annotated[
            str | None,
            typer.Argument(
                metavar="[QUANT|-]", help="A checkpoint or manifest; left out, it is piped in."
            ),
        ] = None,
        against: Annotated[
            str | None,
            typer.Option(
                "--against", metavar="REF", help="The unquantized checkpoint to compare with."
            ),
        ] = None,
        min_sqnr: Annotated[
            float | None,
            typer.Option("--min-sqnr", metavar="DB", help="Exit 1 if a layer's SQNR is lower."),
        ] = None,
        max_error: Annotated[
            float | None,
            typer.Option(
                "--max-error", metavar="R", help="Exit 1 if a layer's relative error is higher."
            ),
        ] = None,
        header_only: Annotated[
            bool,
            typer.Option("--header-only", help="Look at names, shapes and markers only."),
        ] = False,
        workers: options.Workers = None,
        memory_limit: options.MemoryLimit = None,
    ) -> int:
        """Check that ComfyUI can load a quantized checkpoint, and measure what quantizing cost.

        With --against it reports each layer's SQNR, relative error and cosine. Exits 1 if there is
        a finding or a limit is not kept.

        \b
          cq verify out.safetensors --against flux.safetensors --min-sqnr 28
          cq quant flux.safetensors --defer | cq verify --against flux.safetensors
        """
        from cq_analyze.verification import verify as verify_checkpoint

        here = options.terminal()
        if against == "-" and quantized in {None, "-"}:
            raise UsageError("stdin cannot be both the checkpoint and the reference")
        checkpoint = options.open_input(quantized, what="QUANT")
        reference = None if against is None else options.open_input(against, what="REF")
        with here.progress("verify") as progress:
            report = verify_checkpoint(
                checkpoint,
                against=reference,
                min_sqnr=min_sqnr,
                max_error=max_error,
                header_only=header_only,
                workers=workers,
                memory_limit=options.parse_size(memory_limit),
                on_progress=progress.on_progress,
            )
        if here.json:
            here.document(report.to_dict())
        else:
            _show(report)
        return 0 if report.passed else 1


def _show(report: Report) -> None:
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
        here.data("")
        here.table(
            ("worst layers", "SQNR dB>", "relative error>", "cosine>", "max error>"),
            [
                *(
                    _row(layer.layer, layer.fidelity)
                    for layer in report.fidelity.worst
                    if layer.fidelity
                ),
                _row(f"all {len(report.fidelity.layers)} layers", report.fidelity.overall),
            ],
        )
    if report.unquantized is not None:
        kept = report.unquantized
        here.data(
            f"\nnot quantized: {kept.same} tensors equal the reference's,"
            f" {len(kept.changed)} differ, {kept.only_here} are only here,"
            f" {kept.only_in_reference} only in the reference"
        )
    for line in _verdict(report):
        here.data(line)


def _row(name: str, sums: Sums) -> tuple[str, ...]:
    if sums.exact:
        return name, "exact", "0", "1", "0"
    cosine = "" if sums.cosine is None else f"{sums.cosine:.6f}"
    return (
        name,
        f"{sums.sqnr:.2f}",
        f"{sums.relative_error:.5f}",
        cosine,
        f"{sums.max_abs_error:.3g}",
    )


def _verdict(report: Report) -> Iterator[str]:
    for name, found in _by_name(report.findings).items():
        yield ""
        for one in found[:_SHOWN_FAILURES]:
            yield f"{name}: {one}"
        if len(found) > _SHOWN_FAILURES:
            yield f"{name}: {len(found) - _SHOWN_FAILURES} more like these"
        yield f"  what to do: {found[0].mend}"
    for gate in report.gates:
        yield from _gate(gate)
    if not report.findings and not report.gates:
        yield "\nnothing to find fault with" + (" in the header" if report.header_only else "")


def _by_name(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    grouped: dict[str, list[Finding]] = {}
    for found in findings:
        grouped.setdefault(found.name, []).append(found)
    return grouped


def _gate(gate: Gate) -> Iterator[str]:
    name = "--" + gate.name.replace("_", "-")
    if gate.holds:
        yield f"\n{name} {gate.limit:g}: kept by all {gate.measured} layers"
        return
    if not gate.measured:
        yield f"\n{name} {gate.limit:g}: not kept, as there is no quantized layer to measure"
        return
    yield f"\n{name} {gate.limit:g}: not kept by {len(gate.failures)} of {gate.measured} layers"
    for layer, value in gate.failures[:_SHOWN_FAILURES]:
        yield f"  `{layer}`: {'infinite' if math.isinf(value) else f'{value:.4g}'}"
    if len(gate.failures) > _SHOWN_FAILURES:
        yield f"  and {len(gate.failures) - _SHOWN_FAILURES} more"
