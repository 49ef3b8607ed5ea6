"""Charts of the HTML pages: errors against depth, and sizes as bars, drawn by plotly.

Owns how blocks lie along an axis, and the figures, as plotly's JSON; `markup` puts them and the
library into a page. Plotly is imported when a figure is made, never before. Names come from files
that anybody may have made: plotly takes some HTML in texts, so each is escaped.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from itertools import pairwise
from textwrap import wrap
from typing import Any, NamedTuple

from cq.cli.output import size
from cq.core.errors import ResourceError
from cq.core.text import printable

# Of middle lightness, so that they can be told on white and on black.
_COLORS = (
    "#2f7fd6", "#d9542b", "#1d9a6c", "#b04fc0", "#c48a00", "#5c6ee0",
    "#d2467c", "#3d9fb3", "#7f9a1f", "#9a6b4f",
)  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot")
_BAND = "rgba(128,128,128,0.08)"  # behind every other row of blocks, on white and on black
_FIRST_NUMBER = re.compile(r"(?:^|[._])(\d+)(?=[._])")
_MOST_NUMBERS = 14  # of blocks along the axis, so that they fit on a phone
_LONGEST_LINE = 46  # of a layer's name in the label at the pointer


class Place(NamedTuple):
    """Where a layer lies: the name of its row of blocks, and its block's number, -1 outside."""

    group: str
    block: int

    @property
    def row(self) -> str | None:
        """The row of blocks; None outside."""
        return None if self.block < 0 else self.group


class Point(NamedTuple):
    """A layer's level in dB, and what else the label at the pointer says of it."""

    layer: str
    level: float
    told: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: its name, and a point for each layer that has a level."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure for a page: the id of its element, plotly's JSON of its data and layout, its height
    in pixels, and what it shows in words."""

    name: str
    figure: str
    height: int
    words: str


def check_installed() -> None:
    """Raises: ResourceError if plotly, or what it needs, is not there."""
    missing = [name for name in ("plotly", "narwhals", "packaging") if find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"a page with charts needs plotly, but there is no `{missing[0]}`",
            hint="install it: `pip install plotly`",
            code="resource.package",
        )


def library() -> str:
    """plotly.js, to stand in a page's script."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    return str(get_plotlyjs())


def place(layer: str) -> Place:
    """Where a layer lies, by its name.

    >>> place("model.double_blocks.17.img_mlp.0"), place("img_in")
    (Place(group='model.double_blocks', block=17), Place(group='', block=-1))
    """
    found = _FIRST_NUMBER.search(layer)
    return Place("", -1) if found is None else Place(layer[: found.start()], int(found[1][:9]))


def columns(layers: Iterable[str]) -> dict[Place, int]:
    """The column of each block: what lies outside blocks, then one row of blocks after another as
    they first come, each by its numbers.

    >>> [f"{p.group} {p.block}: {i}" for p, i in columns(["a.1.x", "b.0.x", "a.0.x", "y"]).items()]
    [' -1: 0', 'a 0: 1', 'a 1: 2', 'b 0: 3']
    """
    places = dict.fromkeys(map(place, layers))
    rows = {row: i for i, row in enumerate(dict.fromkeys([None, *(p.row for p in places)]))}
    ordered = sorted(places, key=lambda p: (rows[p.row], p.block))
    return {where: i for i, where in enumerate(ordered)}


def groups(found: Mapping[Place, int]) -> list[tuple[str, int, int]]:
    """The rows of blocks, each by a name as short as can be told, with its first and last column.

    >>> groups(columns(["y", "net.a.0.x", "net.a.1.x", "net.b.0.x"]))
    [('outside blocks', 0, 0), ('a', 1, 2), ('b', 3, 3)]
    """
    reach: dict[str | None, tuple[int, int]] = {}
    for where, column in found.items():
        reach[where.row] = (reach.get(where.row, (column, column))[0], column)
    names = {row: (row or "").rpartition(".")[2] for row in reach}
    if len(set(names.values())) < len(names):
        names = {row: row or "" for row in reach}
    return [
        ("outside blocks" if row is None else names[row] or "blocks", *reach[row]) for row in reach
    ]


def numbered(found: Mapping[Place, int]) -> dict[int, int]:
    """The columns at which the axis has the number of their block: every so many, and none for a
    row that has fewer blocks than that.

    >>> numbered(columns([f"a.{i}.x" for i in range(30)] + ["b.0.x"]))
    {0: 0, 5: 5, 10: 10, 15: 15, 20: 20, 25: 25}
    """
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    step = next(s for s in steps if len(found) / s <= _MOST_NUMBERS)
    blocks = Counter(where.row for where in found)
    chosen: dict[int, int] = {}
    last = -step
    for where, column in found.items():
        if where.row is None or where.block % step or blocks[where.row] < step:
            continue
        if column - last >= (step + 1) // 2:
            chosen[column] = where.block
            last = column
    return chosen


def depth_chart(name: str, layers: Sequence[str], series: Sequence[Series]) -> Chart | None:
    """For each series lines through the means of each row of blocks, and a dot for each layer.
    None if there is no level to show."""
    if not any(one.points for one in series):
        return None
    check_installed()
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    found = columns(layers)
    levels = [point.level for one in series for point in one.points]
    figure = go.Figure(layout=_depth_layout(found, min(levels), max(levels)))
    for index, one in enumerate(series):
        look = {"name": _safe(one.name), "legendgroup": str(index)}
        color = _COLORS[index % len(_COLORS)]
        dash = _DASHES[index // len(_COLORS) % len(_DASHES)]
        x, y = _means(one, found)
        line = {"color": color, "dash": dash, "width": 2}
        figure.add_scatter(**look, x=x, y=y, mode="lines", line=line, hoverinfo="skip")
        ordered = sorted(one.points, key=lambda point: found[place(point.layer)])
        figure.add_scatter(
            **look,
            showlegend=False,
            mode="markers",
            marker={"color": color, "size": 6, "opacity": 0.55},
            x=[found[place(point.layer)] for point in ordered],
            y=[round(point.level, 3) for point in ordered],
            text=[_lines(point.layer) for point in ordered],
            customdata=[_safe(point.told) for point in ordered],
            # The numbers are also those of blocks, and so the second axis is drawn.
            xaxis="x2",
            hovertemplate=(
                "<b>%{text}</b><br>%{fullData.name}: %{y:.2f} dB<br>%{customdata}<extra></extra>"
            ),
        )
    words = f"SQNR in dB by depth of {len(layers)} layers: {', '.join(s.name for s in series)}"
    height = 420 + 9 * len(series)  # the names of series wrap on a narrow screen
    return Chart(name=name, figure=figure.to_json(), height=height, words=words)


def _means(one: Series, found: Mapping[Place, int]) -> tuple[list[int | None], list[float | None]]:
    """The line through the means of blocks, broken between rows of blocks."""
    levels: dict[Place, list[float]] = {}
    for point in one.points:
        levels.setdefault(place(point.layer), []).append(point.level)
    ordered = sorted(levels, key=lambda where: found[where])
    x: list[int | None] = []
    y: list[float | None] = []
    for before, where in pairwise([None, *ordered]):
        if before is not None and where is not None and before.row != where.row:
            x.append(None)
            y.append(None)
        if where is not None:
            x.append(found[where])
            y.append(round(math.fsum(levels[where]) / len(levels[where]), 3))
    return x, y


def _depth_layout(found: Mapping[Place, int], low: float, high: float) -> dict[str, Any]:
    """Axes of rows of blocks: their names below, numbers of blocks above. The levels' axis is never
    so short that next to nothing looks like much."""
    low, high = math.floor(low / 5) * 5, math.ceil(high / 5) * 5
    rows = groups(found)
    shown = numbered(found)
    span = [-0.6, len(found) - 0.4]
    bands = [
        {
            "type": "rect", "xref": "x", "yref": "paper", "layer": "below",
            "x0": first - 0.5, "x1": last + 0.5, "y0": 0, "y1": 1,
            "fillcolor": _BAND, "line": {"width": 0},
        }
        for _, first, last in rows[1::2]
    ]  # fmt: skip
    return {
        "template": {},
        "hovermode": "closest",
        "margin": {"l": 52, "r": 14, "t": 30, "b": 40},
        "shapes": bands,
        "legend": {
            "orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0,
            "tracegroupgap": 0,
        },
        "xaxis": {
            "range": span, "showgrid": False, "zeroline": False, "automargin": True,
            "tickvals": [(first + last) / 2 for _, first, last in rows],
            "ticktext": [_safe(printable(name, 24)) for name, _, _ in rows],
            "autotickangles": [0, 90],
        },
        "xaxis2": {
            "range": span, "showgrid": False, "zeroline": False, "matches": "x",
            "overlaying": "x", "side": "top", "tickangle": 0,
            "tickvals": [*shown], "ticktext": [str(number) for number in shown.values()],
        },
        "yaxis": {
            "title": {"text": "SQNR, dB"}, "zeroline": False, "automargin": True,
            "range": [low - 0.5, max(high, low + 5) + 0.5],
        },
    }  # fmt: skip


def size_chart(name: str, amounts: Mapping[str, int], words: str) -> Chart | None:
    """A bar for each amount of bytes, with its share of all. None if there is none."""
    whole = sum(amounts.values())
    if whole <= 0:
        return None
    check_installed()
    import plotly.graph_objects as go

    names = [wrap(printable(what, 50), 26) or [""] for what in amounts]
    shares = [f"{size(nbytes)}, {100 * nbytes / whole:.1f} %" for nbytes in amounts.values()]
    figure = go.Figure(
        layout={
            "template": {},
            "margin": {"l": 10, "r": 10, "t": 4, "b": 4},
            "bargap": 0.3,
            "xaxis": {"visible": False, "fixedrange": True},
            "yaxis": {
                "autorange": "reversed",
                "fixedrange": True,
                "automargin": True,
                "ticklabelstandoff": 6,
            },
        }
    )
    figure.add_bar(
        orientation="h",
        x=[*amounts.values()],
        y=["<br>".join(map(_safe, lines)) for lines in names],
        marker={"color": _COLORS[0]},
        text=shares,
        textposition="auto",
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    height = 16 + (12 + 15 * max(map(len, names))) * len(amounts)
    return Chart(name=name, figure=figure.to_json(), height=height, words=words)


def _safe(text: str) -> str:
    """Text as plotly shows it: printable, and nothing in it is taken for a tag."""
    return escape(printable(text, 300), quote=False)


def _lines(layer: str) -> str:
    """A layer's name in lines that a narrow screen has room for."""
    lines, rest = [], printable(layer, 300)
    while len(rest) > _LONGEST_LINE:
        cut = max(rest.rfind(mark, 8, _LONGEST_LINE) for mark in "._") + 1 or _LONGEST_LINE
        lines.append(rest[:cut])
        rest = rest[cut:]
    return "<br>".join(escape(line, quote=False) for line in [*lines, rest])
