"""One choice for each item, of least loss at bounded size: the multiple-choice knapsack problem.

Lagrange's relaxation gives the price of a byte at which the best choices just fit, and a bound on
what any choices can reach. Beginning with these, the items are taken up by how little it costs to
choose otherwise, and all partial choices that could still win are kept (dynamic programming over
the core, Pisinger 1995); which could is told by the least price at which the items that are left
save or fill a byte. While no more than `_STATES` are alive the answer is exact; beyond, they are
thinned until the answer is within `_NEAR` of the bound, which tells by how much it can be short.

Owns numbers only: no layer, no format, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

_STATES = 1000  # seldom reached by models of a hundred layers, and a millisecond for each layer
_NEAR = 1e-4
_NEARLY = 1e-9  # of the bound: what is left in float64


class Way(NamedTuple):
    """A choice for an item: its size in bytes and its loss, which is not negative."""

    size: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The place of the way chosen for each item, their sizes and losses together, and a loss that
    no packing of the same capacity is below: the packing's own if it is proven the best."""

    places: tuple[int, ...]
    size: int
    loss: float
    bound: float


def least_size(items: Sequence[Sequence[Way]]) -> int:
    """The size of the smallest packing."""
    return sum(min(way.size for way in ways) for ways in items)


def pack(items: Sequence[Sequence[Way]], capacity: int) -> Packing | None:
    """The packing of least loss, and of the least size among such, within `capacity`; None if
    nothing fits.

    >>> pack([[Way(4, 0.0), Way(1, 3.0)], [Way(4, 0.0), Way(1, 1.0)]], 5)
    Packing(places=(0, 1), size=5, loss=1.0, bound=1.0)
    """
    if least_size(items) > capacity:
        return None
    hulls = [_hull(ways) for ways in items]
    steps = sorted(
        (
            (_price(ways, a, b), item, place)
            for item, (ways, hull) in enumerate(zip(items, hulls, strict=True))
            for place, (a, b) in enumerate(pairwise(hull))
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    at = [0] * len(items)
    room = capacity - sum(ways[hull[0]].size for ways, hull in zip(items, hulls, strict=True))
    price = 0.0
    for step_price, item, place in steps:
        ways, hull = items[item], hulls[item]
        grows = ways[hull[place + 1]].size - ways[hull[place]].size
        if grows > room:
            price = step_price
            break
        room -= grows
        at[item] = place + 1
    first = [hull[i] for hull, i in zip(hulls, at, strict=True)]
    if price == 0.0:  # everything fits at its best
        return _packing(items, first, bound=math.fsum(_loss(items, first)))
    return _Core(items, capacity, price).solve([first, _filled(items, steps, hulls, capacity)])


def _hull(ways: Sequence[Way]) -> list[int]:
    """Places of the ways on the lower convex hull, the smallest first."""
    order = sorted(range(len(ways)), key=lambda i: (ways[i].size, ways[i].loss, i))
    hull: list[int] = []
    for i in order:
        if hull and ways[i].loss >= ways[hull[-1]].loss:
            continue
        while len(hull) > 1 and _price(ways, hull[-2], hull[-1]) <= _price(ways, hull[-1], i):
            hull.pop()
        if hull and ways[i].size == ways[hull[-1]].size:
            hull.pop()
        hull.append(i)
    return hull


def _price(ways: Sequence[Way], small: int, large: int) -> float:
    """By how much the loss falls with each byte."""
    grows = ways[large].size - ways[small].size
    return (ways[small].loss - ways[large].loss) / grows if grows else math.inf


def _filled(
    items: Sequence[Sequence[Way]],
    steps: Sequence[tuple[float, int, int]],
    hulls: Sequence[Sequence[int]],
    capacity: int,
) -> list[int]:
    """The greedy packing: every step that still fits, the best price first."""
    places = [hull[0] for hull in hulls]
    room = capacity - sum(ways[i].size for ways, i in zip(items, places, strict=True))
    for _, item, place in steps:
        ways, hull = items[item], hulls[item]
        grows = ways[hull[place + 1]].size - ways[places[item]].size
        # A step whose predecessor did not fit may be taken together with it.
        if grows <= room:
            room -= grows
            places[item] = hull[place + 1]
    return places


def _loss(items: Sequence[Sequence[Way]], places: Sequence[int]) -> list[float]:
    return [ways[i].loss for ways, i in zip(items, places, strict=True)]


def _packing(items: Sequence[Sequence[Way]], places: Sequence[int], *, bound: float) -> Packing:
    loss = math.fsum(_loss(items, places))
    return Packing(
        places=tuple(places),
        size=sum(ways[i].size for ways, i in zip(items, places, strict=True)),
        loss=loss,
        bound=min(bound, loss),
    )


class _Move(NamedTuple):
    """Another choice for an item than its best: by how much it is larger, and its regret."""

    grows: int
    regret: float
    place: int


_Trail = tuple[int, int, "_Trail"] | tuple[()]


class _State(NamedTuple):
    """A partial choice: by how much it is over the capacity, and its *regret* (by how much loss and
    price together exceed the least), items that are not yet taken up at their best. `trail` is how
    it came about: the last item's place, and the trail before. `serial` keeps states in an order
    without a look at the trail."""

    over: int
    regret: float
    serial: int
    trail: _Trail


class _Core:
    """The search at a price of a byte."""

    def __init__(self, items: Sequence[Sequence[Way]], capacity: int, price: float) -> None:
        self._items = items
        self._price = price
        costs = [[way.loss + price * way.size for way in ways] for ways in items]
        self._best = [
            min(range(len(own)), key=lambda i, own=own: (own[i], i))  # type: ignore[misc]
            for own in costs
        ]
        self._regrets = [
            [cost - own[best] for cost in own] for own, best in zip(costs, self._best, strict=True)
        ]
        least = math.fsum(own[best] for own, best in zip(costs, self._best, strict=True))
        self._bound = least - price * capacity
        size = sum(ways[i].size for ways, i in zip(items, self._best, strict=True))
        self._start = _State(size - capacity, 0.0, 0, ())
        # By how much regret could still win over the best that is known, and what that best is.
        self._gap = math.inf
        self._winner: _Trail | None = None

    def solve(self, known: Sequence[Sequence[int]]) -> Packing:
        """The best packing; never worse than the `known` ones."""
        packings = [_packing(self._items, places, bound=self._bound) for places in known]
        best = min(packings, key=lambda p: (p.loss, p.size))
        self._gap = best.loss - self._bound - _NEARLY * abs(self._bound)
        exact = self._search()
        if self._winner is not None:
            found = _packing(self._items, self._places(self._winner), bound=self._bound)
            best = min(best, found, key=lambda p: (p.loss, p.size))
        return replace(best, bound=best.loss) if exact else best

    def _search(self) -> bool:
        """Look for what is better than what is known. Whether nothing better can be left."""
        moves = self._moves()
        first, *rates = self._rates(moves)
        states, exact = self._worth([self._start], first), True
        for (item, own), rate in zip(moves, rates, strict=True):
            if not states:
                break
            states = self._worth(self._taken_up(states, item, own), rate)
            if len(states) > _STATES:
                exact = False
                if self._gap <= _NEAR * abs(self._bound):
                    break
                states = _thinned(states)
        return exact

    def _moves(self) -> list[tuple[int, list[_Move]]]:
        """The items with a choice that may win, those first whose choice costs the least regret for
        a byte: they are taken instead of others, or fill what is left."""
        found = []
        for item, (ways, regrets, best) in enumerate(
            zip(self._items, self._regrets, self._best, strict=True)
        ):
            sizes = [way.size - ways[best].size for way in ways]
            own = [_Move(s, r, i) for i, (s, r) in enumerate(zip(sizes, regrets, strict=True))]
            own = [move for move in own if move.grows and move.regret < self._gap]
            if own:
                found.append((min(m.regret / abs(m.grows) for m in own), item, own))
        return [(item, own) for _, item, own in sorted(found)]

    def _rates(self, moves: Sequence[tuple[int, list[_Move]]]) -> list[tuple[float, float]]:
        """For the items from each on: the least regret for a byte that is saved, and for one that
        is filled or left empty."""
        found = [(math.inf, self._price)]
        for _, own in reversed(moves):
            saved, filled = found[-1]
            saved = min([saved, *(m.regret / -m.grows for m in own if m.grows < 0)])
            filled = min([filled, *(m.regret / m.grows for m in own if m.grows > 0)])
            found.append((saved, filled))
        return found[::-1]

    def _taken_up(self, states: list[_State], item: int, own: Sequence[_Move]) -> list[_State]:
        """The states with every choice for one more item, the smallest first."""
        grown, serial, gap = states.copy(), 0, self._gap
        for grows, regret, place in own:
            if regret < gap:
                serial += len(states)
                grown += [
                    _State(s.over + grows, s.regret + regret, serial + i, (item, place, s.trail))
                    for i, s in enumerate(states)
                    if s.regret + regret < gap
                ]
        grown.sort()
        return grown

    def _worth(self, states: Sequence[_State], rate: tuple[float, float]) -> list[_State]:
        """The states that may still win, without those that another is better than in size and
        loss; what the best of them is, is remembered."""
        saved, filled = rate
        kept: list[_State] = []
        least, price = math.inf, self._price
        for state in states:
            over, regret, _, trail = state
            loss = regret - price * over
            if loss < least:
                least = loss
                kept.append(state)
                if over <= 0 and loss < self._gap:
                    self._gap, self._winner = loss, trail
        gap = self._gap
        return [
            s for s in kept if s.regret + (s.over * saved if s.over > 0 else -s.over * filled) < gap
        ]

    def _places(self, trail: _Trail) -> list[int]:
        places = list(self._best)
        while trail:
            item, place, trail = trail
            places[item] = place
        return places


def _thinned(states: Sequence[_State]) -> list[_State]:
    """The state of least regret for each of about `_STATES` ranges of sizes."""
    low, high = states[0].over, states[-1].over
    width = max(1, (high - low) // _STATES)
    chosen: dict[int, _State] = {}
    for state in states:
        own = (state.over - low) // width
        if own not in chosen or state.regret < chosen[own].regret:
            chosen[own] = state
    return list(chosen.values())
