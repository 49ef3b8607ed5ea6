"""Several changes that one adapter file makes to the same rows, of which ComfyUI applies one alone.

Owns which of them that is. The right sum of what a file holds has all of them.

Source: ComfyUI `comfy/lora.py:load_lora`, which keeps patches by what they change: of one key the
kinds follow each other in a fixed order, and the last takes the place of those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cq.core.names import Target
from cq_merge.adapters import Change

_ORDER = ("lora", "loha", "lokr", "glora", "oft", "boft", "norm", "diff", "set_weight")
_KEYS = (
    "ComfyUI applies one alone of several keys that a file has for the same rows;"
    " here all of them count"
)

Claimed = tuple[str, Change, tuple[Target, ...]]
"""A kind, a change of it, and the rows that it changes."""


def superseded(claimed: Sequence[Claimed]) -> Iterator[tuple[int, str]]:
    """The numbers of the changes that ComfyUI leaves out for another one of the same key, each with
    a remark that says so."""
    for own in _groups(claimed):
        for key in {claimed[n][1].key for n in own}:
            same = [n for n in own if claimed[n][1].key == key]
            last = max(same, key=lambda n: _rank(claimed[n][0]))
            for n in same:
                if n != last:
                    kinds = f"`{claimed[n][0]}` where a file has a `{claimed[last][0]}`"
                    yield n, f"ComfyUI leaves out a {kinds} for the same layer"


def doubled(claimed: Sequence[Claimed]) -> Iterator[str]:
    """A remark for each set of rows that a file changes under several keys."""
    for own in _groups(claimed):
        if len({claimed[n][1].key for n in own}) > 1:
            yield _KEYS


def _groups(claimed: Sequence[Claimed]) -> list[list[int]]:
    """The numbers of changes to the same rows, where there are several."""
    found: dict[tuple[Target, ...], list[int]] = {}
    for n, (_, _, place) in enumerate(claimed):
        found.setdefault(place, []).append(n)
    return [own for own in found.values() if len(own) > 1]


def _rank(kind: str) -> int:
    """DoRA is what it extends, which comes before all that is no adapter there."""
    return _ORDER.index(kind) if kind in _ORDER else -1
