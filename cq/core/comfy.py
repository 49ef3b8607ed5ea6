"""ComfyUI's per-layer markers: `L.comfy_quant` tensors and the `_quantization_metadata` header key.

Owns their text and the question which layers of a checkpoint are quantized, and how. Knows no
format: a marker's `format` names the plug in `cq.core.formats` that understands the rest.

Source: ComfyUI `comfy/ops.py:_load_quantized_module` (JSON bytes of a U8 tensor) and
`comfy/utils.py:convert_old_quants` (the header key; its layers overwrite the tensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import DTYPES
from cq.core.errors import InputError
from cq.core.text import printable

MARKER = ".comfy_quant"
WEIGHT = ".weight"
HEADER_KEY = "_quantization_metadata"
_SCALES = frozenset({"weight_scale", "scale_weight", "weight_scale_2", "weight_s_rel"})
_FOREIGN_CODES = "qweight"
_CODES = frozenset(d.name for d in DTYPES.values() if d.bits <= 8 and d.name != "BOOL")


def marker_bytes(settings: Mapping[str, Any]) -> bytes:
    """The marker's text. Separators as ComfyUI's own files have them, so that equal settings are
    equal bytes: `{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}`."""
    try:
        return _marker_bytes(tuple(settings.items()))
    except TypeError:  # a list, such as a shape, has no hash
        return json.dumps(dict(settings)).encode()


@lru_cache(maxsize=256)
def _marker_bytes(settings: tuple[tuple[str, Any], ...]) -> bytes:
    # Layers by the thousand have the same marker.
    return json.dumps(dict(settings)).encode()


def parse_marker(raw: bytes, *, layer: str) -> dict[str, Any]:
    """The settings in a marker's bytes. Raises: InputError if they are not a JSON object."""
    try:
        settings = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"the marker `{layer}{MARKER}` is not JSON: {printable(str(error))}",
            where=layer + MARKER,
            code="input.marker",
        ) from error
    if not isinstance(settings, dict):
        raise InputError(
            f"the marker `{layer}{MARKER}` is not a JSON object",
            where=layer + MARKER,
            code="input.marker",
        )
    return settings


def header_value(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """The `_quantization_metadata` text for `layers` (full names, prefix included)."""
    return orjson.dumps({"format_version": "1.0", "layers": layers}).decode()


def header_layers(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The layers that the header form names; empty without it.

    Raises: InputError if the value is there and is not `{"layers": {name: settings}}`.
    """
    text = metadata.get(HEADER_KEY)
    if text is None:
        return {}
    try:
        layers = orjson.loads(text)["layers"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"the metadata entry `{HEADER_KEY}` is not JSON with `layers`", code="input.marker"
        ) from error
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise InputError(
            f"the metadata entry `{HEADER_KEY}` has layers that are not objects",
            code="input.marker",
        )
    return layers


@dataclass(frozen=True, slots=True)
class Quantized:
    """A layer found quantized: its name and what shows it (`marker`, `header`, `scale`, `codes` or
    `dtype`)."""

    layer: str
    evidence: str


def find_quantized(checkpoint: Checkpoint) -> list[Quantized]:
    """The layers that are quantized already, by names and dtypes alone.

    Anything that stores a weight as codes counts: ComfyUI's markers in either form, scales beside a
    weight, weights in 8-bit dtypes (also plain FP8 casts, whose lost precision no optimizer brings
    back), and the `qweight` of GPTQ, AWQ and nunchaku. `cq.core.stored` says how they are stored.
    """
    found: dict[str, str] = dict.fromkeys(header_layers(checkpoint.metadata), "header")
    specs = checkpoint.specs
    for name, spec in specs.items():
        layer, dot, local = name.rpartition(".")
        if not dot:
            continue
        if local == "weight":
            if spec.dtype in _CODES:
                found.setdefault(layer, "dtype")
        elif local == "comfy_quant":
            found[layer] = "marker"
        elif local in _SCALES:
            if layer + WEIGHT in specs:
                found.setdefault(layer, "scale")
        elif local == _FOREIGN_CODES:
            found.setdefault(layer, "codes")
    return [Quantized(layer, evidence) for layer, evidence in sorted(found.items())]


# A name that only files of that layout have, each the test by which ComfyUI itself decides to
# rename; the second name keeps models apart that share the first.
_DIFFUSERS = {
    "Flux": ("single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"),
    "SD3": ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
    "AuraFlow": ("joint_transformer_blocks.0.attn.add_k_proj.weight", ""),
    "PixArt": ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"),
    "Z-Image": ("noise_refiner.0.attention.norm_k.weight", ""),
    "a U-Net": ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
}


def diffusers_model(names: Iterable[str]) -> str | None:
    """The model whose layers have the names of the diffusers library, or None.

    ComfyUI renames the weights and biases of such a file, not the markers and scales of quantized
    layers. Source: ComfyUI `comfy/model_detection.py` (`convert_diffusers_mmdit`,
    `unet_config_from_diffusers_unet`).
    """
    have = set(names)
    for model, (first, second) in _DIFFUSERS.items():
        for prefix in ("", "transformer.", "model.diffusion_model."):
            if prefix + first in have and (not second or prefix + second in have):
                return model
    return None
