"""What the HTML pages of reports have in common: style, scripts, head, charts, tables and cells.

Owns the look of a page that needs nothing else: no font, script or picture is fetched, plotly.js
stands in the page if it has charts. Names come from files that anybody may have made, so every text
is escaped, and none gets into the script: charts are data beside their element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from cq.cli.output import size
from cq.core.text import printable
from cq.version import VERSION
from cq_analyze.chart import Chart, library

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
.words th,.words td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.words th:first-child,.words td:first-child{white-space:nowrap}
.kept td{color:var(--dim)}.chart{margin:1em 0;break-inside:avoid}
figure{margin:1em 0}figure img{max-width:100%}
:root.paper{color-scheme:light;--ink:#1c1e21;--dim:#555;--line:#bbb;--back:#fff;--soft:#f3f5f7}
@media print{body{margin:0;max-width:none}.scroll{overflow:visible}.modebar{display:none}
h2{break-after:avoid}tr,figure{break-inside:avoid}thead th{position:static}
table{font-size:.68em}th,td{padding:.15em .35em}
th{white-space:normal;overflow-wrap:anywhere}}
""".strip()

# Charts take their colors from the style: again when the scheme changes, and those of paper, in its
# width, for printing.
_CHARTS = """
const root=document.documentElement,charts=[...document.querySelectorAll('.chart')];
const theme=()=>{const style=getComputedStyle(root);
const at=name=>style.getPropertyValue('--'+name).trim();
const axis={color:at('dim'),gridcolor:at('line'),linecolor:at('line')};
return{layout:{font:{color:at('ink'),family:'system-ui,sans-serif',size:12},
paper_bgcolor:'rgba(0,0,0,0)',plot_bgcolor:'rgba(0,0,0,0)',xaxis:axis,yaxis:axis,
modebar:{bgcolor:'rgba(0,0,0,0)',color:at('dim'),activecolor:at('ink')},
hoverlabel:{align:'left',bgcolor:at('soft'),bordercolor:at('dim'),font:{color:at('ink')}}}}};
for(const box of charts){const{data,layout}=JSON.parse(box.nextElementSibling.textContent);
Plotly.newPlot(box,data,{...layout,template:theme()},{responsive:true,displaylogo:false,
displayModeBar:data.length>1?'hover':false,toImageButtonOptions:{format:'svg',filename:box.id},
modeBarButtonsToRemove:['select2d','lasso2d','zoomIn2d','zoomOut2d','autoScale2d']})}
const again=more=>{for(const box of charts)Plotly.relayout(box,{template:theme(),...more})};
matchMedia('(prefers-color-scheme:dark)').addEventListener('change',()=>again());
addEventListener('beforeprint',()=>{root.classList.add('paper');again({width:900})});
addEventListener('afterprint',()=>{root.classList.remove('paper');again({width:null,autosize:true})});
""".strip()

_SCRIPT = """
for(const table of document.querySelectorAll('.sortable')){const body=table.tBodies[0];
table.tHead.onclick=event=>{const th=event.target.closest('th');if(!th)return;
const at=th.cellIndex,way=th.dataset.way==='1'?-1:1;th.dataset.way=way;
const key=row=>{const cell=row.cells[at],value=cell.dataset.value;
return value===undefined?cell.textContent:value===''?NaN:Number(value)};
body.append(...[...body.rows].sort((a,b)=>{const x=key(a),y=key(b);
if(typeof x==='string')return way*x.localeCompare(y,undefined,{numeric:true});
if(isNaN(x)||isNaN(y))return isNaN(x)-isNaN(y);return way*(x-y)}))}}
""".strip()


def document(title: str, body: Iterable[str | Chart]) -> str:
    """A whole page. Its pictures stand in itself, and its policy lets nothing be fetched."""
    policy = "default-src 'none'; img-src data:"
    policy += "; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    parts = [*body]
    scripts = [library(), _CHARTS] if any(isinstance(part, Chart) for part in parts) else []
    shown = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{escape(printable(title, 300))}</title><style>{_STYLE}</style></head><body>",
        *(_chart(part) if isinstance(part, Chart) else part for part in parts),
        f'<p class="dim">made by cq {escape(VERSION)}</p>',
        *(f"<script>{script}</script>" for script in [*scripts, _SCRIPT]),
        "</body></html>",
    ]
    return "\n".join(shown) + "\n"


def _chart(chart: Chart) -> str:
    """The element that a chart is drawn in, and its data."""
    return (
        f'<div class="chart" id="{escape(chart.name)}" style="height:{chart.height}px" role="img"'
        f' aria-label="{escape(printable(chart.words, 300))}"></div>'
        f'<script type="application/json">{chart.figure}</script>'
    )


def table(
    heads: Sequence[str],
    rows: Iterable[tuple[str, str]],
    *,
    sortable: bool = False,
    words: bool = False,
) -> Iterator[str]:
    """A table of rows, each its cells and its attributes, both HTML already; `words` says that the
    cells are sentences rather than numbers."""
    classes = " ".join(["sortable"] * sortable + ["words"] * words)
    kind = f' class="{classes}"' if classes else ""
    yield f'<div class="scroll"><table{kind}><thead><tr>'
    yield "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr></thead><tbody>"
    yield from (f"<tr{attributes}>{cells}</tr>" for cells, attributes in rows)
    yield "</tbody></table></div>"


def cell(text: str) -> str:
    """A cell of text."""
    return f"<td>{escape(text)}</td>"


def number(value: int) -> str:
    """A cell of a count."""
    return f'<td data-value="{value}">{value}</td>'


def nbytes(value: int) -> str:
    """A cell of a size."""
    return f'<td data-value="{value}">{size(value)}</td>'


def measure(value: float | None) -> str:
    """A cell of a measure, three digits of it; a dash without one."""
    return '<td data-value="">–</td>' if value is None else plain(value, f"{value:.3g}")


def decibels(value: float | None) -> str:
    """A cell of a level in dB; a dash without one."""
    return '<td data-value="">–</td>' if value is None else plain(value, f"{value:.2f}")


def plain(value: float, shown: str) -> str:
    """A cell that sorts by `value`."""
    return f'<td data-value="{value:.6g}">{shown}</td>'
