"""What the other layers of a checkpoint tell of one whose own marker is lost, in part or whole.

Owns the widths that layers of one name have in all blocks, and whether the checkpoint's tool
rotated weights. Reads markers and nothing else, and only when asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from cq.core import catalog, comfy
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Format
from cq.core.rotation import GROUPS, group_for
from cq.core.text import folded

_Settings = Mapping[str, Any]


class Fellows:
    """The layers of a checkpoint; `layers` are full names of tensors by layer and local name,
    `header` what its metadata says of layers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Mapping[str, Mapping[str, str]],
        header: Mapping[str, _Settings],
    ) -> None:
        self._checkpoint = checkpoint
        self._layers = layers
        self._told: dict[str, _Settings] = dict(header)

    def settings(self, layer: str) -> _Settings | None:
        """What header or marker say of a layer, None if neither does. Raises: InputError for a
        marker that is no JSON object."""
        if layer not in self._told and layer + comfy.MARKER in self._checkpoint.specs:
            raw = self._checkpoint.read_bytes(layer + comfy.MARKER)
            self._told[layer] = comfy.parse_marker(raw, layer=layer)
        return self._told.get(layer)

    def columns(self, layer: str, rows: int) -> int | None:
        """K of the layers that are called so in other blocks and have as many rows, if all that
        tell have the same."""
        shapes = {
            self._shape(other) for other in self._named.get(folded(layer), ()) if other != layer
        }
        found = {shape[1] for shape in shapes if shape is not None and shape[0] == rows}
        return found.pop() if len(found) == 1 else None

    def rotations(self, layer: str, rotation: str) -> list[_Settings]:
        """The markers of layers in formats whose `rotation` is that, and wide enough to be rotated:
        those called so in other blocks, or where there are none, all."""
        named = [
            (other, settings)
            for other, plug, settings in self._marked
            if plug.rotation == rotation and other != layer and self._can_rotate(other)
        ]
        same = [settings for other, settings in named if folded(other) == folded(layer)]
        return same or [settings for _, settings in named]

    def _can_rotate(self, layer: str) -> bool:
        shape = self._shape(layer)
        return shape is not None and group_for(shape[1], max(GROUPS)) is not None

    @cached_property
    def _named(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for layer, own in self._layers.items():
            if "weight" in own:
                found[folded(layer)].append(layer)
        return found

    @cached_property
    def _marked(self) -> list[tuple[str, Format, _Settings]]:
        return [(layer, *found) for layer in self._layers for found in self._format(layer)]

    def _format(self, layer: str) -> Iterator[tuple[Format, _Settings]]:
        """The format and the marker of a layer whose marker names one."""
        settings = None
        with suppress(InputError):  # a marker that cannot be read tells nothing
            settings = self.settings(layer)
        label = (settings or {}).get("format")
        if settings and isinstance(label, str) and label in catalog.names("formats"):
            yield catalog.load("formats", label), settings

    def _shape(self, layer: str) -> tuple[int, ...] | None:
        """The shape of a layer's weight, if it is a plain matrix or its marker tells."""
        specs: dict[str, TensorSpec] = {
            local: self._checkpoint.specs[name] for local, name in self._layers[layer].items()
        }
        weight = specs.get("weight")
        if weight is None or len(weight.shape) != 2:
            return None
        if weight.is_float:
            return weight.shape
        for plug, settings in self._format(layer):
            with suppress(InputError):
                return plug.shape(specs, settings)
        return None
