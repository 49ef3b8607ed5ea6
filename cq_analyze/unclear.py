"""Layers that have lost what says how they are stored: what is not known of them, and widths that
show a marker to be wrong.

Owns the comparison of a layer's K with that of its fellows in other blocks. Reads markers alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from cq.core import stored
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.text import folded, printable
from cq_analyze.report import Finding, finding

if TYPE_CHECKING:
    from cq_analyze.structure import Marked

_NAMES = frozenset({"marker.missing", "marker.format"})
_FEWEST_FELLOWS = 3
_SAY = (
    "say what it is, with `cq edit --allow-broken --set-quant PATTERN '{\"format\": …}'`, and then"
    " `cq edit --migrate comfy_quant`; or quantize the original checkpoint again with `cq quant`"
)


def told(checkpoint: Checkpoint, findings: Sequence[Finding]) -> list[Finding]:
    """The findings, those of lost markers with what a person has to say before an edit can mend
    them."""
    if not any(found.name in _NAMES for found in findings):
        return list(findings)
    errors: dict[str, InputError] = {}
    with suppress(InputError):  # a marker that cannot be read is a finding of its own
        for clue in stored.clues(checkpoint):
            try:
                stored.resolve(clue, "")
            except InputError as error:
                if error.code == stored.UNCLEAR:
                    errors[clue.layer] = error
    return [
        _explained(found, errors[found.layer])
        if found.name in _NAMES and found.layer in errors
        else found
        for found in findings
    ]


def _explained(found: Finding, error: InputError) -> Finding:
    why = error.message.partition(" cannot be read: ")[2]
    return replace(found, sentence=f"{found.sentence}; {why}", mend=error.hint or found.mend)


def misread(
    marked: Iterable[Marked], tensors: Mapping[str, Mapping[str, TensorSpec]]
) -> Iterator[Finding]:
    """Layers that decode to half or twice the K of nearly all layers of their name and height: so
    look packed codes that are marked as whole ones, or the other way round."""
    shapes: dict[str, tuple[int, ...]] = {
        one.layer: one.stored.shape for one in marked if one.stored is not None
    }
    widths: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    plain = {
        layer: own["weight"].shape
        for layer, own in tensors.items()
        if layer not in shapes and "weight" in own and own["weight"].is_float
    }
    for layer, shape in (shapes | plain).items():
        if len(shape) == 2:
            widths[folded(layer), shape[0]].append((layer, shape[1]))
    for (kind, _), members in widths.items():
        common, count = Counter(width for _, width in members).most_common(1)[0]
        if count < _FEWEST_FELLOWS or 4 * count < 3 * len(members):
            continue
        for layer, width in members:
            if layer in shapes and common in {2 * width, width / 2}:
                told = f"decodes to K={width}, but {count} of {len(members)} layers"
                told = f"{told} `{printable(kind)}` have K={common}: its marker names a format of"
                yield finding("weight.shape", layer, f"{told} other codes", mend=_SAY)
