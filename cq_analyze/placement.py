"""Whether quantized layers stand where ComfyUI takes them.

Owns what only shows among other layers: a layer's role in the model, and its fellows in other
blocks. Judges from names, shapes and markers alone.

Source: ComfyUI `comfy/ops.py` (`MixedPrecisionOps.Embedding`, which reads no `params`; MoEExperts)
and `comfy/model_detection.py` (shapes read to tell the model).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cq.core import recipe
from cq.core.dtypes import TensorSpec
from cq.core.formats import Format
from cq.core.knowledge import Knowledge
from cq.core.stored import SMOOTHING
from cq.core.text import folded, printable
from cq_analyze.report import Finding, finding
from cq_analyze.unlisted import nearly_all

if TYPE_CHECKING:
    from cq_analyze.structure import Marked

_SMOOTHED = "nvfp4"  # the one format whose `pre_quant_scale` ComfyUI reads
_UNREAD = "weight_correction"
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
        if plain and nearly_all(len(members) - len(plain), len(members)):
            rotated = len(members) - len(plain)
            notes.append(
                f"`{printable(plain[0])}` is not rotated, but {rotated} of {len(members)} layers of"
                " that name are; if its flag was lost, `--against` shows it"
            )
    return notes


def _rotated(settings: Mapping[str, Any]) -> bool:
    nested = settings.get("params")
    return bool(settings.get("convrot") or (isinstance(nested, dict) and nested.get("convrot")))
