"""Whether quantized layers stand where ComfyUI takes them, and whether the model is whole.

Owns what only shows among other layers: a layer's role in the model, its fellows in other blocks,
and the layers that the model's family has. Judges from names, shapes and markers alone.

Source: ComfyUI `comfy/ops.py` (`MixedPrecisionOps.Embedding`, which reads no `params`; MoEExperts)
and `comfy/model_detection.py` (shapes read to tell the model).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cq.core import comfy, recipe
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.families import Match
from cq.core.formats import Format
from cq.core.knowledge import Knowledge
from cq.core.stored import SMOOTHING
from cq.core.text import folded, printable
from cq_analyze.report import Finding, finding, natural

if TYPE_CHECKING:
    from cq_analyze.structure import Marked

_SMOOTHED = "nvfp4"  # the one format whose `pre_quant_scale` ComfyUI reads
_UNREAD = "weight_correction"
_FEWEST_FELLOWS = 3
_Specs = Mapping[str, TensorSpec]


def stacked(layer: str, own: _Specs) -> bool:
    """Whether a layer's tensors are stacked experts `(E, N, K)`."""
    weight = own.get("weight")
    return weight is not None and len(weight.shape) == 3 and recipe.has_role(layer, "experts")


def misplaced(
    layer: str, plug: Format, own: _Specs, settings: Mapping[str, Any], known: Knowledge
) -> Iterator[Finding]:
    """Formats on layers where ComfyUI cannot take them, most often without a word."""
    reads_shape = known.reads_shape(layer)
    if reads_shape is None:
        reads_shape = recipe.has_role(layer, "detection")
    if reads_shape and not plug.keeps_shape:
        told = f"is stored as `{plug.name}`, which may change its shape, by which ComfyUI tells the"
        yield finding("detection.packed", layer, f"{told} model")
    why = known.unloadable(layer)
    if why is not None:
        yield finding("layer.unloadable", layer, f"is quantized, but {why}")
    if recipe.has_role(layer, "embedding"):
        yield from _embedding(layer, plug, settings)
    if stacked(layer, own):
        if not plug.experts:
            told = f"holds stacked experts as `{plug.name}`, which ComfyUI does not take for them"
            yield finding("experts.format", layer, told)
        elif plug.rotation == "optional" and settings.get("convrot"):
            told = "holds stacked experts that are rotated; ComfyUI 0.33 drops their rotation flag"
            yield finding("experts.rotation", layer, told)
    for local in (SMOOTHING, _UNREAD):
        if local in own and not (local == SMOOTHING and plug.name == _SMOOTHED):
            told = f"has a `{local}`, which ComfyUI does not read for `{plug.name}`"
            yield finding("scale.ignored", layer, told)


def _embedding(layer: str, plug: Format, settings: Mapping[str, Any]) -> Iterator[Finding]:
    if not plug.embeddings:
        told = f"is an embedding table stored as `{plug.name}`, which ComfyUI takes for linear"
        yield finding("embedding.format", layer, f"{told} layers only")
    nested = settings.get("params")
    if isinstance(nested, dict) and nested.get("convrot") and not settings.get("convrot"):
        told = "is an embedding table whose rotation stands inside `params`, where ComfyUI does not"
        yield finding("convrot.params", layer, f"{told} look")


def incomplete(checkpoint: Checkpoint, marked: Sequence[Marked], known: Knowledge) -> list[Finding]:
    """Layers and biases that the model should have, and quantized layers that it does not have."""
    specs = checkpoint.specs
    layers = [
        name.removesuffix(comfy.WEIGHT)
        for name, spec in specs.items()
        if name.endswith(comfy.WEIGHT) and len(spec.shape) >= 2
    ]
    named = {m.layer for m in marked}
    found = [*_lost_biases(specs, named), *_surplus(named, known)]
    for match in known.matches:
        bare = {name for layer in layers if (name := match.bare(layer)) is not None}
        gone = _missing(match, bare)
        found += [
            finding("layers.missing", match.prefix + name, f"is missing from this {title}")
            for title in [match.family.title]
            for name in gone
            if match.prefix + name not in named  # then it lacks its weight, which is said already
        ]
    return found


def _missing(match: Match, have: Iterable[str]) -> Iterator[str]:
    """Layers of the family that a block lacks and nearly all its fellows have."""
    by_kind: dict[str, dict[int, str]] = defaultdict(dict)
    blocks: dict[str, set[int]] = defaultdict(set)
    for name in sorted(have, key=natural):
        kind = folded(name)
        group, star, _ = kind.partition("*")
        index = name[len(group) :].partition(".")[0]
        if not star or not index.isdecimal():
            continue
        blocks[group].add(int(index))
        if kind.count("*") == 1 and kind in match.family.layers:
            by_kind[kind][int(index)] = name
    for kind, members in by_kind.items():
        group, _, rest = kind.partition("*")
        # The first and the last block are often made otherwise, as in SD3.
        ends = {min(blocks[group]), max(blocks[group])}
        gone = blocks[group] - set(members) - ends
        if gone and _nearly_all(len(members), len(blocks[group])):
            yield from (f"{group}{index}{rest}" for index in sorted(gone))


def _nearly_all(have: int, of: int) -> bool:
    return have >= _FEWEST_FELLOWS and 4 * (of - have) <= of


def _surplus(marked: Iterable[str], known: Knowledge) -> Iterator[Finding]:
    for layer in marked:
        found = known.of(layer)
        if found is None:
            continue
        match, bare = found
        # What no release is known of may have more layers than those that are.
        listed = match.variant is not None and bool(match.family.layers)
        apart = recipe.has_role(layer, "embedding") or recipe.has_role(layer, "experts")
        if listed and not apart and folded(bare) not in match.family.layers:
            told = f"is quantized, but {match.family.title} has no such layer"
            yield finding("layers.surplus", layer, told)


def _lost_biases(specs: _Specs, marked: Iterable[str]) -> Iterator[Finding]:
    """Quantized layers without a bias where nearly all fellows in other blocks have one."""
    fellows: dict[str, list[str]] = defaultdict(list)
    for name in specs:
        if name.endswith(comfy.WEIGHT):
            layer = name.removesuffix(comfy.WEIGHT)
            fellows[folded(layer)].append(layer)
    for layer in marked:
        others = fellows[folded(layer)]
        if f"{layer}.bias" in specs or f"{layer}{comfy.WEIGHT}" not in specs:
            continue
        having = sum(f"{other}.bias" in specs for other in others)
        if _nearly_all(having, len(others)):
            told = (
                f"has no bias, which {having} of {len(others)} layers `{printable(folded(layer))}`"
            )
            yield finding("bias.missing", layer, f"{told} have")


def unrotated(marked: Sequence[Marked]) -> list[str]:
    """Notes on layers that are not rotated where nearly all fellows are: a lost flag looks so, and
    only a reference tells."""
    fellows: dict[str, list[Marked]] = defaultdict(list)
    for one in marked:
        if one.format is not None and one.format.rotation == "optional":
            fellows[f"{folded(one.layer)} {one.format.name}"].append(one)
    notes = []
    for members in fellows.values():
        plain = [one.layer for one in members if not _rotated(one.settings)]
        if plain and _nearly_all(len(members) - len(plain), len(members)):
            rotated = len(members) - len(plain)
            notes.append(
                f"`{printable(plain[0])}` is not rotated, but {rotated} of {len(members)} layers of"
                " that name are; if its flag was lost, `--against` shows it"
            )
    return notes


def _rotated(settings: Mapping[str, Any]) -> bool:
    nested = settings.get("params")
    return bool(settings.get("convrot") or (isinstance(nested, dict) and nested.get("convrot")))
