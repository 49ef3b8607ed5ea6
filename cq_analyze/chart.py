"""A chart of errors against depth, as inline SVG.

Owns how blocks lie along an axis and how decibels become pixels. All text is escaped; no font,
script or image is fetched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from cq.core.text import printable

_WIDTH, _HEIGHT = 960, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 44
# Of middle lightness, so that they can be told on white and on black.
_COLORS = (
    "#2f7fd6", "#d9542b", "#1d9a6c", "#b04fc0", "#c48a00", "#5c6ee0",
    "#d2467c", "#3d9fb3", "#7f9a1f", "#9a6b4f",
)  # fmt: skip
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_FIRST_NUMBER = re.compile(r"(?:^|[._])(\d+)(?=[._])")
_FEWEST_PIXELS = 70  # between the names of two groups


class Place(NamedTuple):
    """Where a layer lies: the name of its row of blocks, and its block's number, -1 outside."""

    group: str
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: the levels in dB of layers by name; layers without a level are left out."""

    name: str
    levels: Mapping[str, float]


def place(layer: str) -> Place:
    """Where a layer lies, by its name.

    >>> place("model.double_blocks.17.img_mlp.0"), place("img_in")
    (Place(group='model.double_blocks', block=17), Place(group='', block=-1))
    """
    found = _FIRST_NUMBER.search(layer)
    return Place("", -1) if found is None else Place(layer[: found.start()], int(found[1][:9]))


def color(index: int) -> str:
    """The color of the series of that number."""
    return _COLORS[index % len(_COLORS)]


def dash(index: int) -> str:
    """The dash pattern of the series of that number; empty for a full line."""
    return _DASHES[index // len(_COLORS) % len(_DASHES)]


def chart(layers: Sequence[str], series: Sequence[Series]) -> str:
    """The SVG element: for each series lines through the means of each row of blocks, and a dot
    for each layer. `layers` are in the order of depth. Empty if there is no level to show.
    """
    every = [level for one in series for level in one.levels.values()]
    if not every:
        return ""
    places = dict.fromkeys(map(place, layers))
    ordered = sorted(places, key=lambda where: where.block >= 0)  # what lies outside blocks first
    columns = {where: i for i, where in enumerate(ordered)}
    low, high = _bounds(min(every), max(every))
    scale = _Scale(len(columns), low, high)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        ' aria-label="SQNR in dB of each candidate by depth">',
        *scale.grid(),
        *_groups(columns, scale),
    ]
    for index, one in enumerate(series):
        parts += _drawn(index, one, columns, scale)
    return "\n".join([*parts, "</svg>"])


def _bounds(low: float, high: float) -> tuple[float, float]:
    low, high = math.floor(low / 5) * 5, math.ceil(high / 5) * 5
    return low, max(high, low + 5)


@dataclass(frozen=True, slots=True)
class _Scale:
    columns: int
    low: float
    high: float

    def x(self, column: int) -> float:
        """The middle of a block's column."""
        return _LEFT + (column + 0.5) * (_WIDTH - _LEFT - _RIGHT) / self.columns

    def y(self, level: float) -> float:
        """Up is better."""
        share = (level - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        """Lines and numbers for the levels."""
        step = next(s for s in (1, 5, 10, 20, 50, 100, 1000) if (self.high - self.low) / s <= 10)
        first = math.ceil(self.low / step) * step
        lines = []
        for level in range(first, int(self.high) + 1, step):
            y = self.y(level)
            lines.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{level}</text>')
        return [*lines, f'<text x="4" y="{_HEIGHT - 8}">dB</text>']


def _groups(columns: Mapping[Place, int], scale: _Scale) -> list[str]:
    """Where each row of blocks begins, with its name if there is room."""
    found: list[str] = []
    before: str | None = None
    named = -math.inf
    for where, column in columns.items():
        if where.group == before:
            continue
        before = where.group
        x = scale.x(column) - (scale.x(1) - scale.x(0)) / 2
        found.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM + 6}"/>')
        if x - named >= _FEWEST_PIXELS:
            named = x
            text = escape(printable(where.group or "outside blocks", 40))
            found.append(f'<text x="{x + 3:.1f}" y="{_HEIGHT - _BOTTOM + 18}">{text}</text>')
    return found


def _drawn(index: int, series: Series, columns: Mapping[Place, int], scale: _Scale) -> list[str]:
    """A series as one group: a path through the blocks' means, and a path of dots."""
    by_place: dict[Place, list[float]] = {}
    for layer, level in series.levels.items():
        by_place.setdefault(place(layer), []).append(level)
    if not by_place:
        return []
    drawn = sorted((columns[where], where.group, levels) for where, levels in by_place.items())
    dots = "".join(
        f"M{scale.x(column):.1f} {scale.y(level):.1f}h0"
        for column, _, levels in drawn
        for level in levels
    )
    groups = [None, *(group for _, group, _ in drawn)]
    means = "".join(
        f"{'L' if group == before else 'M'}"
        f"{scale.x(column):.1f} {scale.y(math.fsum(levels) / len(levels)):.1f}"
        for before, (column, group, levels) in zip(groups, drawn, strict=False)
    )
    dashes = f' stroke-dasharray="{dash(index)}"' if dash(index) else ""
    return [
        f'<g class="series" data-series="{index}" stroke="{color(index)}">'
        f"<title>{escape(series.name)}</title>"
        f'<path class="line"{dashes} d="{means}"/><path class="dots" d="{dots}"/></g>'
    ]
