"""The models in one checkpoint: diffusion model, text encoders and VAE, each under its prefix.

Owns which component a name belongs to, and what stands in it. A checkpoint that holds one model
only has one component. Never imports torch.

Source: ComfyUI `comfy/supported_models.py` (prefixes of text encoders and VAEs in checkpoints) and
`comfy/sd.py` (`VAE`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cq.core.dtypes import TensorSpec
from cq.core.families import PREFIXES, Detection, Family, detect
from cq.core.header import total_nbytes

_FAMILY_KINDS = {"diffusion": "diffusion model", "text encoder": "text encoder"}


class Place(NamedTuple):
    """Where a name lies in a checkpoint: the component's kind and the prefix it stands under.

    The kind is None under the empty prefix: such a name does not tell.
    """

    kind: str | None
    prefix: str


_ANYWHERE = Place(None, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One model in a checkpoint: its kind (`diffusion model`, `text encoder`, `VAE` or `other`),
    the prefix of its names, the family found in it, the number of tensors and their bytes."""

    kind: str
    prefix: str
    detection: Detection
    tensors: int
    nbytes: int

    @property
    def family(self) -> Family | None:
        """The family, if exactly one was found."""
        return self.detection.match and self.detection.match.family


_PLACES = re.compile(
    r"(?P<diffusion>(?:model\.)?diffusion_model\.)"
    r"|(?P<vae>(?:first_stage_model|vae|audio_vae|vocoder)\.)"
    r"|(?P<text>(?:cond_stage_model\.(?:(?:clip_[lgh]|t5xxl)\.)?|conditioner\.embedders\.\d+\."
    r"|text_encoders\.[^.]+\.|text_encoder(?:_\d)?\.|clip_[lgh]\.|t5xxl\.|text_embedding_projection\.))"
    r"|(?P<other>model_ema\.)"
)
_PLACE_KINDS = {
    "diffusion": "diffusion model",
    "vae": "VAE",
    "text": "text encoder",
    "other": "other",
}
# Names by which ComfyUI tells VAEs (`comfy/sd.py:VAE`): a file of one has no prefix.
_VAE_NAMES = (
    "decoder.conv_in.weight",
    "decoder.conv_in.conv.weight",
    "decoder.middle.0.residual.0.gamma",
    "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
    "taesd_decoder.1.weight",
)


@lru_cache(maxsize=1 << 16)
def component_of(name: str) -> Place:
    """The component that a tensor or layer of that name belongs to.

    >>> component_of("conditioner.embedders.1.model.ln_final.weight")
    Place(kind='text encoder', prefix='conditioner.embedders.1.')
    """
    found = _PLACES.match(name)
    if found is None or found.lastgroup is None:
        return _ANYWHERE
    return Place(_PLACE_KINDS[found.lastgroup], found[0])


def components(specs: Mapping[str, TensorSpec]) -> tuple[Component, ...]:
    """The models in a checkpoint, in the order of their first tensors.

    Names without a component's prefix are the model itself, of the kind of the family found in
    them, unless a diffusion model stands under its own prefix: then they are `other`.
    """
    within: dict[Place, list[TensorSpec]] = {}
    last, own = None, []
    for name, spec in specs.items():
        place = component_of(name)
        if place is not last:
            last, own = place, within.setdefault(place, [])
        own.append(spec)
    apart = any(place.kind == "diffusion model" for place in within)
    found = []
    for place, own in within.items():
        kind, detection = _inside(specs, place, apart=apart)
        found.append(
            Component(
                kind=kind,
                prefix=place.prefix,
                detection=detection,
                tensors=len(own),
                nbytes=total_nbytes(own),
            )
        )
    return tuple(found)


def _inside(specs: Mapping[str, TensorSpec], place: Place, *, apart: bool) -> tuple[str, Detection]:
    if place.kind is not None:
        # A family of the other kind under such a prefix would be a coincidence of names.
        matches = detect(specs, prefixes=[place.prefix + p for p in PREFIXES]).matches
        fitting = tuple(m for m in matches if _FAMILY_KINDS[m.family.kind] == place.kind)
        return place.kind, Detection(fitting)
    if apart:
        return "other", Detection(())
    detection = detect(specs, prefixes=[p for p in PREFIXES if component_of(p).kind is None])
    if detection.matches:
        kinds = {_FAMILY_KINDS[m.family.kind] for m in detection.matches}
        return kinds.pop() if len(kinds) == 1 else "other", detection
    return "VAE" if any(name in specs for name in _VAE_NAMES) else "other", detection
