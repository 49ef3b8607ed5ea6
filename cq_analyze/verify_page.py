"""What `cq verify` found as one HTML page that needs nothing else: `cq verify --report FILE`.

Owns what stands where. Names come from files that anybody may have made, so every text is escaped.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from html import escape
from itertools import chain
from typing import TYPE_CHECKING, Any

from cq.cli.output import size
from cq.core.text import printable
from cq_analyze.chart import Chart, Point, Series, depth_chart, size_chart
from cq_analyze.markup import cell, decibels, document, measure, nbytes, number, plain, table

if TYPE_CHECKING:
    from cq_analyze.metrics import Sums
    from cq_analyze.report import Report

_MOST_FINDINGS = 500
_MOST_PICTURES = 24
_METRICS = ("SQNR dB", "relative error", "cosine", "max error", "mean shift")


def verify_page(report: Report) -> str:
    """The page as HTML text."""
    body = chain(
        _heading(report),
        _findings(report),
        _formats(report),
        _depth(report),
        _fidelity(report),
        _unquantized(report),
        _renders(report),
        _pictures(report),
        _layers(report),
        _history(report),
    )
    title = f"{report.checkpoint or 'pictures'}: cq verify"
    return document(title, body)


def _text(text: object) -> str:
    return escape(printable(str(text), 500))


def _heading(report: Report) -> Iterator[str]:
    yield f"<h1>{_text(report.checkpoint or 'Comparison of pictures')}</h1>"
    findings = f"{len(report.findings)} finding{'' if len(report.findings) == 1 else 's'}"
    missed = sum(not gate.holds for gate in report.gates)
    gates = f", {missed} of {len(report.gates)} limits not kept" if report.gates else ""
    yield f"<p><b>{'passed' if report.passed else 'did not pass'}</b>: {findings}{gates}</p>"
    if report.checkpoint is not None:
        told = f"{report.tensors} tensors, {size(report.nbytes)}"
        told += f"; needs ComfyUI {report.first_comfyui} or newer" if report.first_comfyui else ""
        told += f"; decoded with comfy-kitchen {report.kitchen}, too" if report.kitchen else ""
        yield f"<p>{_text(told)}</p>"
    if report.against is not None:
        base = "" if report.base is None else f", which was made of {report.base}"
        yield f"<p>against {_text(report.against + base)}</p>"
    yield from (f'<p class="dim">{_text(note)}</p>' for note in report.notes)
    for gate in report.gates:
        verdict = "kept" if gate.holds else f"not kept by {len(gate.failures)} of {gate.count}"
        yield f"<p>{_text(f'{gate.name} {gate.limit:g} ({gate.of}): {verdict}')}</p>"


def _findings(report: Report) -> Iterator[str]:
    if not report.findings:
        return
    rows = [
        (cell(f.name) + cell(printable(str(f), 500)) + cell(printable(f.mend, 500)), "")
        for f in report.findings[:_MOST_FINDINGS]
    ]
    yield "<h2>Findings</h2>"
    yield from table(("name", "what", "what to do"), rows, sortable=True, words=True)
    if len(report.findings) > _MOST_FINDINGS:
        yield f"<p>and {len(report.findings) - _MOST_FINDINGS} more</p>"


def _formats(report: Report) -> Iterator[str | Chart]:
    if not report.layers:
        return
    amounts: dict[str, list[int]] = {}
    for layer in report.layers:
        amount = amounts.setdefault(layer.format or "of no known format", [0, 0])
        amount[0] += 1
        amount[1] += layer.nbytes
    rest = report.nbytes - sum(amount[1] for amount in amounts.values())
    rows = [
        (cell(printable(name)) + number(layers) + _share(held, report.nbytes), "")
        for name, (layers, held) in sorted(amounts.items())
    ]
    rows.append((cell("not quantized") + "<td>–</td>" + _share(rest, report.nbytes), ""))
    yield "<h2>Size by format</h2>"
    bars = {name: held for name, (_, held) in sorted(amounts.items())} | {"not quantized": rest}
    chart = size_chart("formats", bars, "bytes by format")
    if chart is not None:
        yield chart
    yield from table(("format", "layers", "bytes", "share"), rows)


def _share(held: int, of: int) -> str:
    return nbytes(held) + plain(held, f"{100 * held / max(1, of):.1f} %")


def _depth(report: Report) -> Iterator[str | Chart]:
    points: dict[str, list[Point]] = {}
    for layer in report.layers:
        if layer.fidelity is not None and math.isfinite(layer.fidelity.sqnr):
            told = f"{layer.format}, {size(layer.nbytes)}, relative error"
            told += f" {layer.fidelity.relative_error:.3g}"
            if layer.output is not None:
                told += f", output error {layer.output.relative_error:.3g}"
            points.setdefault(layer.role, []).append(Point(layer.layer, layer.fidelity.sqnr, told))
    series = [Series(name=role, points=points[role]) for role in sorted(points)]
    measured = [layer.layer for layer in report.layers if layer.fidelity is not None]
    chart = depth_chart("depth", measured, series)
    if chart is None:
        return
    yield "<h2>Error by depth and role</h2>"
    yield (
        "<p>SQNR in dB, more is better: 6 dB are half the error. A line goes through the means of"
        " the blocks, a dot is a layer; point at one for its name. A click on a name below the"
        " chart hides it, a double click all others.</p>"
    )
    yield chart


def _fidelity(report: Report) -> Iterator[str]:
    found = report.fidelity
    if found is None:
        return
    rows = [(cell(f"all {len(found.layers)} layers") + _metrics(found.overall), "")]
    rows += [(cell(role) + _metrics(sums), "") for role, sums in found.roles.items()]
    yield "<h2>Fidelity by role</h2>"
    yield from table(("role", *_METRICS), rows)
    worst = [
        (cell(printable(layer.layer, 300)) + _metrics(layer.fidelity), "")
        for layer in found.worst
        if layer.fidelity is not None
    ]
    if worst:
        yield "<h2>Worst layers</h2>"
        yield from table(("layer", *_METRICS), worst)
    outputs = [
        (cell(printable(layer.layer, 300)) + measure(_finite(error.relative_error)), "")
        for layer, error in found.worst_outputs
    ]
    if outputs:
        yield "<h2>Worst outputs</h2>"
        yield from table(("layer", "output error"), outputs)
    if found.survival is not None and found.survival.share is not None:
        told = f"{100 * found.survival.share:.1f} % of the change from the base survives"
        snr = found.survival.snr
        told += f", at an SNR of {snr:.1f} dB" if snr is not None and math.isfinite(snr) else ""
        yield f"<p>{_text(told)}</p>"


def _metrics(sums: Sums) -> str:
    if sums.exact:
        return f'<td data-value="1e9">exact</td>{measure(0.0)}{measure(1.0)}{measure(0.0) * 2}'
    cosine = "<td>–</td>" if sums.cosine is None else f"<td>{sums.cosine:.6f}</td>"
    shown = _finite(sums.sqnr), _finite(sums.relative_error)
    rest = measure(_finite(sums.max_abs_error)) + measure(_finite(sums.mean_shift))
    return decibels(shown[0]) + measure(shown[1]) + cosine + rest


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _unquantized(report: Report) -> Iterator[str]:
    kept = report.unquantized
    if kept is None:
        return
    yield "<h2>Tensors that are not quantized</h2>"
    yield (
        f"<p>{kept.same} equal the reference's, {len(kept.changed)} differ, {kept.only_here} are"
        f" only here, {kept.only_in_reference} only in the reference</p>"
    )
    rows = []
    for changed in kept.changed:
        sums = changed.fidelity
        dtypes = f"{changed.reference_dtype} → {changed.dtype}"
        error = None if sums is None else _finite(sums.relative_error)
        largest = None if sums is None else _finite(sums.max_abs_error)
        cells = cell(printable(changed.name, 300)) + cell(dtypes)
        rows.append((cells + measure(error) + measure(largest), ""))
    if rows:
        yield from table(("tensor", "dtype", "relative error", "max error"), rows, sortable=True)


def _renders(report: Report) -> Iterator[str]:
    found = report.renders
    if found is None:
        return
    yield "<h2>Speed and memory in ComfyUI</h2>"
    speedup = "" if found.speedup is None else f", {found.speedup:.2f} times as fast"
    yield f"<p>{_text(f'on {found.device}, at {found.url}{speedup}')}</p>"
    rows = []
    for word, side in (("reference", found.reference), ("quantized", found.quantized)):
        peak = "<td>–</td>" if side.nbytes_peak is None else nbytes(side.nbytes_peak)
        seconds = measure(side.seconds_per_picture) + measure(side.timings[0].seconds)
        rows.append((cell(f"{word}: {side.model}") + seconds + peak, ""))
    heads = ("model", "seconds per picture", "first run", "peak memory in use")
    yield from table(heads, rows)


def _pictures(report: Report) -> Iterator[str]:
    found = report.pictures
    if found is None or not found.pictures:
        return
    from cq_analyze.images import told as metrics

    yield "<h2>Pictures</h2>"
    told = f"{found.reference}, {found.compared}, and eight times their difference;"
    yield f"<p>{_text(f'{told} the worst of {len(found.pictures)} first')}</p>"
    for picture in found.worst[:_MOST_PICTURES]:
        data = base64.b64encode(picture.strip).decode()
        yield (
            f'<figure><img alt="{_text(picture.name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_text(picture.name)}: {metrics(picture)}</figcaption></figure>"
        )


def _layers(report: Report) -> Iterator[str]:
    if not report.layers:
        return
    changed = any(layer.survival is not None for layer in report.layers)
    heads = ["layer", "role", "format", "shape", "bytes", *_METRICS]
    heads += ["change kept", "its SNR dB"] if changed else []
    judged = any(layer.output is not None for layer in report.layers)
    heads += ["output error"] if judged else []
    rows = []
    for layer in report.layers:
        shape = "" if layer.weight is None else " x ".join(map(str, layer.weight.shape))
        cells = [
            cell(printable(layer.layer, 300)),
            cell(layer.role),
            cell(layer.format or "–"),
            cell(shape),
            nbytes(layer.nbytes),
            measure(None) * len(_METRICS) if layer.fidelity is None else _metrics(layer.fidelity),
        ]
        if changed:
            kept = layer.survival
            cells.append(measure(None if kept is None else _finite(kept.share)))
            cells.append(decibels(None if kept is None else _finite(kept.snr)))
        if judged:
            output = layer.output
            cells.append(measure(None if output is None else _finite(output.relative_error)))
        rows.append(("".join(cells), ""))
    yield "<h2>Layers</h2>"
    yield "<p>A click on a heading sorts.</p>"
    yield from table(heads, rows, sortable=True)


def _history(report: Report) -> Iterator[str]:
    if not report.history:
        return
    yield "<h2>Provenance</h2>"
    sources = report.history.get("sources")
    names = [s.get("name") for s in sources if isinstance(s, dict)] if sources else []
    if names:
        yield f"<p>made of {_text(', '.join(map(str, names)))}</p>"
    for stage in report.history.get("stages") or ():
        if isinstance(stage, dict):
            yield f"<p>{_text(_stage(stage))}</p>"


def _stage(stage: Mapping[str, Any]) -> str:
    told = {
        k: v for k, v in stage.items() if k not in {"op", "version"} and v not in (None, [], {})
    }
    arguments = ", ".join(f"{key} = {json.dumps(value)}" for key, value in told.items())
    return f"cq {stage.get('version', '?')} {stage.get('op', '?')}: {arguments}"
