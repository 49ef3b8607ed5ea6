"""One choice for each item, of least loss at bounded size: the multiple-choice knapsack problem.

Lagrange's relaxation gives the price of a byte at which the best choices just fit, and a bound on
what any choices can reach. Beginning with these, the items are taken up by how little it costs to
choose otherwise, and all partial choices that could still win are kept, cheapest first (dynamic
programming over the core, Pisinger 1995). While no more than `_STATES` are alive the answer is
exact; beyond, they are thinned, and the bound tells by how much it can be short of the best.

Owns numbers only: no layer, no format, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

# Three times as many take five times as long and come 0.1 % nearer to the bound.
_STATES = 1000
_NEARLY = 1e-9  # of the bound: what is left in float64


class Way(NamedTuple):
    """A choice for an item: its size in bytes and its loss, which is not negative."""

    size: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The place of the way chosen for each item, their sizes and losses together, and a loss that
    no packing of the same capacity is below."""

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


class _State(NamedTuple):
    """A partial choice: sizes and *regrets* (by how much loss and price together exceed the least)
    of all items, those not yet taken up at their best; and how it came about."""

    size: int
    regret: float
    before: _State | None
    item: int
    place: int


class _Core:
    """The search at a price of a byte."""

    def __init__(self, items: Sequence[Sequence[Way]], capacity: int, price: float) -> None:
        self._items = items
        self._capacity = capacity
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

    def solve(self, known: Sequence[Sequence[int]]) -> Packing:
        """The best packing; never worse than the `known` ones."""
        packings = [_packing(self._items, places, bound=self._bound) for places in known]
        best = min(packings, key=lambda p: (p.loss, p.size))
        size = sum(ways[i].size for ways, i in zip(self._items, self._best, strict=True))
        start = _State(size, 0.0, None, -1, -1)
        gap = self._gap(best.loss)
        winner, gap = self._improved([start], None, gap)
        states = [start]
        for item in self._order():
            if gap <= 0.0:
                break
            states = self._taken_up(states, item, gap)
            winner, gap = self._improved(states, winner, gap)
            states = [state for state in states if state.regret < gap]
        if winner is not None:
            found = _packing(self._items, self._places(winner), bound=self._bound)
            best = min(best, found, key=lambda p: (p.loss, p.size))
        return best

    def _gap(self, loss: float) -> float:
        """How much regret could still win over a packing of that loss."""
        return loss - self._bound - _NEARLY * abs(self._bound)

    def _order(self) -> list[int]:
        """Items with a choice, by how little it costs to choose otherwise."""
        second = [
            min((r for i, r in enumerate(own) if i != best), default=math.inf)
            for own, best in zip(self._regrets, self._best, strict=True)
        ]
        return sorted((i for i, r in enumerate(second) if r < math.inf), key=lambda i: second[i])

    def _improved(
        self, states: Sequence[_State], winner: _State | None, gap: float
    ) -> tuple[_State | None, float]:
        """The best of the states that fit, if it is better than what is known, and the new gap."""
        for state in states:
            slack = self._capacity - state.size
            if slack >= 0 and state.regret + self._price * slack < gap:
                winner, gap = state, state.regret + self._price * slack
        return winner, gap

    def _taken_up(self, states: Sequence[_State], item: int, gap: float) -> list[_State]:
        """The states with every choice for one more item, without those that another is better
        than in size and loss."""
        base = self._items[item][self._best[item]].size
        grown = list(states)
        for place, (way, regret) in enumerate(
            zip(self._items[item], self._regrets[item], strict=True)
        ):
            if place != self._best[item]:
                grown += [
                    _State(s.size + way.size - base, s.regret + regret, s, item, place)
                    for s in states
                    if s.regret + regret < gap
                ]
        grown.sort(key=lambda s: (s.size, s.regret))
        kept: list[_State] = []
        least = math.inf
        for state in grown:
            loss = state.regret - self._price * state.size
            if loss < least:
                least = loss
                kept.append(state)
        return kept if len(kept) <= _STATES else self._thinned(kept)

    def _thinned(self, states: Sequence[_State]) -> list[_State]:
        """The state of least regret for each of about `_STATES` ranges of sizes."""
        low, high = states[0].size, states[-1].size
        width = max(1, (high - low) // _STATES)
        chosen: dict[int, _State] = {}
        for state in states:
            own = (state.size - low) // width
            if own not in chosen or state.regret < chosen[own].regret:
                chosen[own] = state
        return list(chosen.values())

    def _places(self, state: _State | None) -> list[int]:
        places = list(self._best)
        while state is not None and state.before is not None:
            places[state.item] = state.place
            state = state.before
        return places
