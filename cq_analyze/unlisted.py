"""What a layer lacks that nearly all its fellows, the layers of its name in other blocks, have.

Owns judging where no family tells what a model should have. No model has a bias beside no weight in
one block, and the weight in the others; but a block without a bias may be meant, and is a note.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from cq.core.dtypes import TensorSpec
from cq.core.roster import place
from cq.core.text import folded, printable
from cq_analyze.report import Finding, finding

_FEWEST = 3
Tensors = Mapping[str, Mapping[str, TensorSpec]]


def nearly_all(have: int, of: int) -> bool:
    """Whether so many of a layer's fellows are nearly all of them."""
    return have >= _FEWEST and 4 * (of - have) <= of


def headless(tensors: Tensors) -> Iterator[Finding]:
    """Layers with nothing but a bias, where nearly all fellows in other blocks have a weight."""
    lone = [layer for layer, own in tensors.items() if len(own) == 1 and "bias" in own]
    if not lone:
        return
    kinds = {place(layer)[0] for layer in lone}
    whole: dict[str, int] = defaultdict(int)
    every: dict[str, int] = defaultdict(int)
    for layer, own in tensors.items():
        kind = place(layer)[0]
        if kind in kinds:
            every[kind] += 1
            whole[kind] += "weight" in own
    for layer in lone:
        kind = place(layer)[0]
        if nearly_all(whole[kind], every[kind]):
            yield finding("weight.missing", layer, "has a bias, but no weight")


def biasless(tensors: Tensors, strangers: Iterable[str]) -> Iterator[str]:
    """Notes on quantized layers of unknown models without a bias that nearly all fellows have."""
    bare = [
        layer
        for layer in strangers
        if "weight" in tensors.get(layer, {}) and "bias" not in tensors[layer]
    ]
    kinds = {folded(layer) for layer in bare}
    fellows: dict[str, list[bool]] = defaultdict(list)
    for layer, own in tensors.items() if kinds else ():
        kind = folded(layer)
        if kind in kinds and "weight" in own:
            fellows[kind].append("bias" in own)
    for layer in bare:
        having = fellows[folded(layer)]
        if nearly_all(sum(having), len(having)):
            yield (
                f"`{printable(layer)}` has no bias, but {sum(having)} of {len(having)} layers of"
                " that name do; if it was lost, `--against` shows it"
            )
