"""What the HTML pages of reports have in common: style, script, head, tables and cells.

Owns the look of a page that needs nothing else: no font, script or picture is fetched. Names come
from files that anybody may have made, so every text is escaped, and none gets into the script.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from cq.cli.output import size
from cq.core.text import printable
from cq.version import VERSION
from cq_analyze.chart import color, dash

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
.kept td{color:var(--dim)}.bar{display:inline-block;height:.7em;background:#2f7fd6}
svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--dim)}
.grid{stroke:var(--line);fill:none}.series path{fill:none;stroke-width:2}
.series .dots{stroke-width:4;stroke-linecap:round;opacity:.45}
.legend label{display:inline-block;margin-right:1.2em}.legend svg{width:26px;height:10px}
.legend line{stroke-width:3}figure{margin:1em 0}figure img{max-width:100%}
pre{overflow-x:auto;background:var(--soft);padding:.6em}
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


def document(title: str, body: Iterable[str], *, pictures: bool = False) -> str:
    """A whole page; with `pictures` it may hold some, inside itself."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy += "; img-src data:" if pictures else ""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{escape(printable(title, 300))}</title><style>{_STYLE}</style></head><body>",
        *body,
        f'<p class="dim">made by cq {escape(VERSION)}</p>',
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


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


def legend(names: Sequence[str]) -> Iterator[str]:
    """A box for each series of a chart, which shows or hides it."""
    yield '<p class="legend">'
    for index, name in enumerate(names):
        dashes = f' stroke-dasharray="{dash(index)}"' if dash(index) else ""
        yield (
            f'<label><input type="checkbox" checked data-shows="{index}"> <svg viewBox="0 0 26 10">'
            f'<line x1="0" y1="5" x2="26" y2="5" stroke="{color(index)}"{dashes}/></svg>'
            f" {escape(name)}</label>"
        )
    yield "</p>"
