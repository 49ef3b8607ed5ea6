"""From the name that an adapter file gives a layer to the layer of a checkpoint.

Owns the spellings of whole models: prefixes, and dots written as underscores. Every name is looked
up in a table made from the checkpoint's own names; nothing is guessed.

Source: ComfyUI `comfy/lora.py:model_lora_keys_unet`. More is accepted here, as exact names cannot
match the wrong layer: `base_model.model.` and bare names for any model.
"""

from __future__ import annotations

from collections.abc import Iterable

from cq.core import recipe, select
from cq.core.comfy import WEIGHT

_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_DOTTED = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
)


class Layers:
    """A checkpoint's layers, found by any name that an adapter may have for them.

    >>> layers = Layers(["model.diffusion_model.blocks.0.q.weight"])
    >>> layers.find("lora_unet_blocks_0_q")
    ('model.diffusion_model.blocks.0.q',)
    >>> layers.find("base_model.model.blocks.0.q")
    ('model.diffusion_model.blocks.0.q',)
    """

    def __init__(self, names: Iterable[str]) -> None:
        """`names` are tensor names; those that end in `.weight` are layers."""
        # Dictionaries as ordered sets: a layer stands in the order of the checkpoint, once.
        self._dotted: dict[str, dict[str, None]] = {}
        self._underscored: dict[str, dict[str, None]] = {}
        self._bare: list[str] = []
        for name in names:
            if name.endswith(WEIGHT):
                layer = name.removesuffix(WEIGHT)
                bare = recipe.without_prefix(layer)
                self._bare.append(bare)
                for spelling in (layer, bare):
                    self._dotted.setdefault(spelling, {})[layer] = None
                    self._underscored.setdefault(spelling.replace(".", "_"), {})[layer] = None

    def find(self, key: str) -> tuple[str, ...]:
        """The layers that `key` names: one, none, or several between which nothing decides."""
        for prefix in _UNDERSCORED:
            if key.startswith(prefix):
                found = self._underscored.get(key.removeprefix(prefix))
                if found:
                    return tuple(found)
        rest: str | None = key
        while rest is not None:  # prefixes can be nested: base_model.model.transformer.
            if rest in self._dotted:
                return tuple(self._dotted[rest])
            rest = _unwrapped(rest)
        return ()

    def near(self, key: str) -> str | None:
        """A hint with the layers whose names come nearest to `key`, spelled as the adapter does."""
        for prefix in _UNDERSCORED:
            if key.startswith(prefix):
                return select.nearest(key, [prefix + n.replace(".", "_") for n in self._bare])
        bare: str | None = key
        while bare is not None:
            innermost, bare = bare, _unwrapped(bare)
        prefix = key.removesuffix(innermost)
        return select.nearest(key, [prefix + name for name in self._bare])


def _unwrapped(key: str) -> str | None:
    prefix = next((p for p in _DOTTED if key.startswith(p)), None)
    return None if prefix is None else key.removeprefix(prefix)
