"""The measurements as one HTML page that needs nothing else: `cq analyze --deep --report FILE`.

Owns the page: what stands where, its style and its few lines of script. Layer names come from
files that anybody may have made, so every text is escaped, and none gets into the script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from cq.cli.output import size
from cq.core.text import printable
from cq.version import VERSION
from cq_analyze.chart import Series, chart, color, dash
from cq_analyze.deep import OUTLIERS
from cq_analyze.inventory import ROLES

if TYPE_CHECKING:
    from cq_analyze.deep import Cost, Measurements
    from cq_analyze.description import Analysis

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--dim:#666;--line:#d5d8dc;--back:#fff;--soft:#f3f5f7}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--dim:#9aa0a6;--line:#3a3f45;--back:#15181b;
--soft:#1f2428}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1200px;
margin:2em auto;padding:0 1em}
h1{font-size:1.4em;overflow-wrap:anywhere}h2{font-size:1.1em;margin-top:2em}
p{max-width:75ch}.dim,small{color:var(--dim)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{background:var(--soft);position:sticky;top:0}
.sortable th{cursor:pointer}
.kept td{color:var(--dim)}.bar{display:inline-block;height:.7em;background:#2f7fd6}
svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--dim)}
.grid{stroke:var(--line);fill:none}.series path{fill:none;stroke-width:2}
.series .dots{stroke-width:4;stroke-linecap:round;opacity:.45}
.legend label{display:inline-block;margin-right:1.2em}.legend svg{width:26px;height:10px}
.legend line{stroke-width:3}
""".strip()

_SCRIPT = """
for(const box of document.querySelectorAll('[data-shows]'))box.onchange=()=>{for(const g of
document.querySelectorAll(`[data-series="${box.dataset.shows}"]`))
g.style.display=box.checked?'':'none'};
for(const table of document.querySelectorAll('.sortable')){const body=table.tBodies[0];
table.tHead.onclick=event=>{const th=event.target.closest('th');if(!th)return;
const at=th.cellIndex,way=th.dataset.way==='1'?-1:1;th.dataset.way=way;
const key=row=>{const cell=row.cells[at],value=cell.dataset.value;
return value===undefined?cell.textContent:value===''?NaN:Number(value)};
body.append(...[...body.rows].sort((a,b)=>{const x=key(a),y=key(b);
if(typeof x==='string')return way*x.localeCompare(y,undefined,{numeric:true});
if(isNaN(x)||isNaN(y))return isNaN(x)-isNaN(y);return way*(x-y)}))}}
""".strip()


def page(analysis: Analysis, measured: Measurements) -> str:
    """The page as HTML text."""
    title = escape(printable(f"{analysis.checkpoint}: cq analyze --deep", 300))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        " style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        *_heading(analysis),
        *_roles(analysis),
        *_totals(measured),
        *_depth(measured),
        *_layers(measured),
        f'<p class="dim">made by cq {escape(VERSION)}</p>',
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _heading(analysis: Analysis) -> Iterator[str]:
    total = analysis.inventory.total
    yield f"<h1>{escape(printable(analysis.checkpoint, 300))}</h1>"
    known = analysis.known.described() or "a model of no family that cq knows"
    yield (
        f"<p>{escape(known)}: {total.parameters / 1e6:,.1f} million parameters in"
        f" {total.tensors} tensors, a file of {size(analysis.nbytes_file)}</p>"
    )
    yield from (f"<p>{escape(note)}</p>" for note in analysis.notes)


def _roles(analysis: Analysis) -> Iterator[str]:
    whole = max(1, analysis.inventory.total.nbytes)
    rows = []
    for name, amount in analysis.inventory.roles.items():
        share = 100 * amount.nbytes / whole
        bar = f'<td style="text-align:left"><span class="bar" style="width:{share * 2:.1f}px">'
        cells = (_cell(ROLES[name]), _number(amount.tensors), _bytes(amount.nbytes))
        rows.append("".join((*cells, f"{bar}</span> {share:.1f} %</td>")))
    yield "<h2>What the bytes are for</h2>"
    yield from _table(("role", "tensors", "bytes", "share"), ((row, "") for row in rows))


def _totals(measured: Measurements) -> Iterator[str]:
    rows = []
    for total in measured.totals():
        smaller = "" if not total["layers"] else f"{total['nbytes'] / total['nbytes_before']:.1%}"
        cells = [
            _cell(total["candidate"]),
            _number(total["layers"]),
            _bytes(total["nbytes_before"]),
            _bytes(total["nbytes"]),
            _cell(smaller),
            _decibels(total["mean_sqnr_db"]),
            _decibels(total["min_sqnr_db"]),
        ]
        rows.append(("".join(cells), ""))
    yield "<h2>Candidates, over the layers that the plan would store so</h2>"
    heads = ("candidate", "layers", "bytes", "become", "share", "mean SQNR", "worst SQNR")
    yield from _table(heads, rows)


def _depth(measured: Measurements) -> Iterator[str]:
    layers = measured.ordered()
    series = [
        Series(
            name=way.name,
            levels={
                layer.layer: cost.error.sqnr
                for layer in layers
                for cost in layer.costs
                if cost.candidate == way and cost.error and math.isfinite(cost.error.sqnr)
            },
        )
        for way in measured.candidates
    ]
    yield "<h2>Error by depth</h2>"
    yield (
        "<p>SQNR in dB, more is better: 6 dB are half the error. A line goes through the means of"
        " the blocks, a dot is a layer.</p>"
    )
    yield '<p class="legend">'
    for index, one in enumerate(series):
        dashes = f' stroke-dasharray="{dash(index)}"' if dash(index) else ""
        yield (
            f'<label><input type="checkbox" checked data-shows="{index}"> <svg viewBox="0 0 26 10">'
            f'<line x1="0" y1="5" x2="26" y2="5" stroke="{color(index)}"{dashes}/></svg>'
            f" {escape(one.name)}</label>"
        )
    yield "</p>"
    yield chart([layer.layer for layer in layers], series)


def _layers(measured: Measurements) -> Iterator[str]:
    names = [way.name for way in measured.candidates]
    heads = ("layer", "shape", "bytes", *(name.replace("_", " ") for name in OUTLIERS), *names)
    rows = []
    for layer in measured.ordered():
        costs = {cost.candidate: cost for cost in layer.costs}
        cells = [
            _cell(printable(layer.layer, 300)),
            _cell(" x ".join(map(str, layer.considered.spec.shape))),
            _bytes(layer.nbytes),
            *(_measure(getattr(layer.outliers, name)) for name in OUTLIERS),
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
    yield from _table(heads, rows, sortable=True)


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


def _table(
    heads: Sequence[str], rows: Iterable[tuple[str, str]], *, sortable: bool = False
) -> Iterator[str]:
    """A table of rows, each its cells and its attributes, both HTML already."""
    kind = ' class="sortable"' if sortable else ""
    yield f'<div class="scroll"><table{kind}><thead><tr>'
    yield "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr></thead><tbody>"
    yield from (f"<tr{attributes}>{cells}</tr>" for cells, attributes in rows)
    yield "</tbody></table></div>"


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _number(value: int) -> str:
    return f'<td data-value="{value}">{value}</td>'


def _bytes(value: int) -> str:
    return f'<td data-value="{value}">{size(value)}</td>'


def _measure(value: float | None) -> str:
    return '<td data-value="">–</td>' if value is None else _plain(value, f"{value:.3g}")


def _decibels(value: float | None) -> str:
    return '<td data-value="">–</td>' if value is None else _plain(value, f"{value:.2f}")


def _plain(value: float, shown: str) -> str:
    return f'<td data-value="{value:.6g}">{shown}</td>'
