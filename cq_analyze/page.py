"""The measurements as one HTML page that needs nothing else: `cq analyze --deep --report FILE`.

Owns what stands where. Layer names come from files that anybody may have made, so every text is
escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from itertools import chain
from typing import TYPE_CHECKING

from cq.cli.output import size
from cq.core.text import printable
from cq_analyze.chart import Chart, Point, Series, depth_chart, size_chart
from cq_analyze.deep import OUTLIERS
from cq_analyze.inventory import ROLES
from cq_analyze.markup import cell, decibels, document, measure, nbytes, number, plain, table

if TYPE_CHECKING:
    from cq_analyze.deep import Cost, Measurements
    from cq_analyze.description import Analysis


def page(analysis: Analysis, measured: Measurements) -> str:
    """The page as HTML text."""
    body = chain(
        _heading(analysis),
        _roles(analysis),
        _totals(measured),
        _depth(measured),
        _layers(measured),
    )
    return document(f"{analysis.checkpoint}: cq analyze --deep", body)


def _heading(analysis: Analysis) -> Iterator[str]:
    total = analysis.inventory.total
    yield f"<h1>{escape(printable(analysis.checkpoint, 300))}</h1>"
    known = analysis.known.described() or "a model of no family that cq knows"
    yield (
        f"<p>{escape(known)}: {total.parameters / 1e6:,.1f} million parameters in"
        f" {total.tensors} tensors, a file of {size(analysis.nbytes_file)}</p>"
    )
    yield from (f"<p>{escape(note)}</p>" for note in analysis.notes)


def _roles(analysis: Analysis) -> Iterator[str | Chart]:
    roles = analysis.inventory.roles
    whole = max(1, analysis.inventory.total.nbytes)
    rows = [
        (
            cell(ROLES[name])
            + number(amount.tensors)
            + nbytes(amount.nbytes)
            + plain(amount.nbytes, f"{100 * amount.nbytes / whole:.1f} %"),
            "",
        )
        for name, amount in roles.items()
    ]
    yield "<h2>What the bytes are for</h2>"
    amounts = {ROLES[name]: amount.nbytes for name, amount in roles.items()}
    chart = size_chart("roles", amounts, "bytes by role")
    if chart is not None:
        yield chart
    yield from table(("role", "tensors", "bytes", "share"), rows)


def _totals(measured: Measurements) -> Iterator[str]:
    rows = []
    for total in measured.totals():
        smaller = "" if not total["layers"] else f"{total['nbytes'] / total['nbytes_before']:.1%}"
        cells = [
            cell(total["candidate"]),
            number(total["layers"]),
            nbytes(total["nbytes_before"]),
            nbytes(total["nbytes"]),
            cell(smaller),
            decibels(total["mean_sqnr_db"]),
            decibels(total["min_sqnr_db"]),
        ]
        rows.append(("".join(cells), ""))
    yield "<h2>Candidates, over the layers that the plan would store so</h2>"
    heads = ("candidate", "layers", "bytes", "become", "share", "mean SQNR", "worst SQNR")
    yield from table(heads, rows)


def _depth(measured: Measurements) -> Iterator[str | Chart]:
    layers = measured.ordered()
    points: dict[str, list[Point]] = {way.name: [] for way in measured.candidates}
    for layer in layers:
        shape = " x ".join(map(str, layer.considered.spec.shape))
        for cost in layer.costs:
            if cost.error is not None and math.isfinite(cost.error.sqnr):
                told = f"{shape}, {size(layer.nbytes)} become {size(cost.nbytes)}"
                told += "" if cost.against is None else ", against the plan"
                points[cost.candidate.name].append(Point(layer.layer, cost.error.sqnr, told))
    series = [Series(name=name, points=found) for name, found in points.items()]
    chart = depth_chart("depth", [layer.layer for layer in layers], series)
    if chart is None:
        return
    yield "<h2>Error by depth</h2>"
    yield (
        "<p>SQNR in dB, more is better: 6 dB are half the error. A line goes through the means of"
        " the blocks, a dot is a layer; point at one for its name. A click on a name below the"
        " chart hides it, a double click all others.</p>"
    )
    yield chart


def _layers(measured: Measurements) -> Iterator[str]:
    names = [way.name for way in measured.candidates]
    heads = ("layer", "shape", "bytes", *(name.replace("_", " ") for name in OUTLIERS), *names)
    rows = []
    for layer in measured.ordered():
        costs = {cost.candidate: cost for cost in layer.costs}
        cells = [
            cell(printable(layer.layer, 300)),
            cell(" x ".join(map(str, layer.considered.spec.shape))),
            nbytes(layer.nbytes),
            *(measure(getattr(layer.outliers, name)) for name in OUTLIERS),
            *(_level(costs.get(way)) for way in measured.candidates),
        ]
        why = layer.kept or layer.broken
        kind = "" if why is None else f' class="kept" title="{escape(f"kept: {why}")}"'
        rows.append(("".join(cells), kind))
    yield "<h2>Layers</h2>"
    yield (
        "<p>SQNR in dB for each candidate; a click on a heading sorts. Grey layers are kept by the"
        " plan, a dash stands where a layer cannot be stored so; point at either for the"
        " reason.</p>"
    )
    yield from table(heads, rows, sortable=True)


def _level(cost: Cost | None) -> str:
    if cost is None or cost.error is None:
        why = "not a candidate" if cost is None else cost.refused or ""
        return f'<td data-value="" title="{escape(why)}">–</td>'
    against = "" if cost.against is None else f' title="{escape(f"against: {cost.against}")}"'
    if cost.error.exact:
        return f'<td data-value="1e9"{against}>exact</td>'
    if not math.isfinite(cost.error.sqnr):
        return f'<td data-value="-1e9"{against}>lost</td>'
    mark = "" if cost.against is None else "<small>*</small>"
    return f'<td data-value="{cost.error.sqnr:.4f}"{against}>{cost.error.sqnr:.1f}{mark}</td>'
