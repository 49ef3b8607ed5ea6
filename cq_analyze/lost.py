"""What a checkpoint lost on its way from the reference, beside its quantized layers.

Owns which tensors of the reference should be there, and which plain tensors are others than the
reference's. A model that the checkpoint does not have at all, such as the VAE of a whole checkpoint
whose diffusion model was taken, is not lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cq.core.checkpoint import Checkpoint
from cq.core.comfy import WEIGHT
from cq.core.components import component_of
from cq.core.recipe import without_prefix
from cq.core.text import printable
from cq_analyze.faults import Outcome
from cq_analyze.reference import Reference
from cq_analyze.report import UNLIKE, Finding, finding

_BIAS = ".bias"
_TOLD = frozenset(
    {"layers.missing", "tensors.missing", "weight.missing", "bias.missing", "reference.missing"}
)


def absent(checkpoint: Checkpoint, layers: Iterable[str], reference: Reference) -> list[str]:
    """The reference's tensors that are not in `checkpoint`, whose quantized layers are `layers`."""
    # The reference's weight of a layer whose marker or weight is lost is not missing twice.
    here = [*checkpoint.specs, *(layer + WEIGHT for layer in layers)]
    taken = {reference.find(name) for name in here}
    return [name for name in reference.checkpoint.specs if name not in taken]


def unmerged(reference: Checkpoint, history: Mapping[str, Any] | None) -> list[str]:
    """A note, if the checkpoint's history says that adapters were merged into what is given as the
    reference, so that they count as errors."""
    if history is None or any(stage.name == "merge" for stage in reference.stages):
        return []
    merges = [s for s in history["stages"] if isinstance(s, dict) and s.get("op") == "merge"]
    origins = [s.get("header") for s in history["sources"] if isinstance(s, dict)]
    if not merges or not any(s.fingerprint().get("header") in origins for s in reference.sources):
        return []
    given = [a for merge in merges for a in merge.get("adapters", ()) if isinstance(a, dict)]
    named = " ".join(f"{a.get('name', '?')}:{a.get('strength', 1)}" for a in given)
    shown = reference.sources[0].shown
    return [
        f"the file was made of `{shown}` with {printable(named)} merged into it, which counts as an"
        f" error here; to leave that out, compare with the merged checkpoint:"
        f" `--against <(cq merge {shown} {printable(named)})`"
    ]


def tensors(
    checkpoint: Checkpoint, gone: Iterable[str], reference: Reference, told: Iterable[Finding]
) -> Iterator[Finding]:
    """Of the tensors that are `gone` those of models that are here, by layer, but for layers of
    which it is `told` already."""
    there = {
        component_of(found)
        for name in checkpoint.specs
        if (found := reference.find(name)) is not None
    }
    known = {f.layer for f in told if f.name in _TOLD}
    bare = {without_prefix(name) for name in checkpoint.specs}  # there, but not to be told apart
    layers: dict[str, list[str]] = defaultdict(list)
    for name in gone:
        layer = name.rpartition(".")[0] or name
        if component_of(name) in there and layer not in known and without_prefix(name) not in bare:
            layers[layer].append(name)
    for layer, names in layers.items():
        local = ", ".join(f"`{name.removeprefix(layer + '.')}`" for name in names[:3])
        more = f" and {len(names) - 3} more" * (len(names) > 3)
        yield finding("reference.lost", layer, f"lacks {local}{more}, which the reference has")


def unlike(outcomes: Iterable[Outcome], history: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Plain tensors that are far from the reference's. Biases may be, where the checkpoint's
    history says that they make up for the error of their layers."""
    stages = [] if history is None else history.get("stages", [])
    corrected = any(isinstance(s, dict) and s.get("bias_correction") for s in stages)
    for outcome in outcomes:
        for other in outcome.compared:
            if other.fidelity is None or (corrected and other.name.endswith(_BIAS)):
                continue
            error = other.fidelity.relative_error
            if error > UNLIKE:
                told = f"is another tensor than the reference's (relative error {error:.3g})"
                yield finding("reference.differs", other.name, told)
