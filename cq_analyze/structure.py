"""What names, dtypes, shapes and markers tell of a quantized checkpoint.

Owns the question which layers say that they are quantized, and what ComfyUI would trip over, often
without a word, when it loads them. Reads markers and nothing else; no torch for a checkpoint in a
file.

Source: ComfyUI `comfy/utils.py:convert_old_quants` (the header form overrides markers; the old
`scaled_fp8` form), `comfy/ops.py:_load_quantized_module` (no marker: the weight is plain numbers).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cq.core import catalog, comfy, select
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Format
from cq.core.text import printable
from cq_analyze.report import Finding, finding, natural

_MAX_MARKER_BYTES = 1 << 20
_MARKER_LOCAL = comfy.MARKER.removeprefix(".")
_LEGACY_SCALE = "scale_weight"
_OTHER_SCALES = frozenset({_LEGACY_SCALE, "scale_input", "input_scale", "pre_quant_scale"})
_LEGACY_KEY = "scaled_fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """A layer with a marker or an entry in the header, as ComfyUI sees it.

    `stored` are its tensors by local name, without the marker. `format` is None where the marker
    names none that is known; `sound` says that nothing is wrong with the layer so far.
    """

    layer: str
    settings: Mapping[str, Any]
    stored: Mapping[str, TensorSpec]
    format: Format | None
    sound: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The marked layers, what is wrong, what is worth saying, and the names of all tensors that are
    codes, scales or markers rather than plain numbers."""

    marked: tuple[Marked, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    coded: frozenset[str]


def is_scale(local: str) -> bool:
    """Whether a tensor of a quantized layer holds scales, by its local name.

    >>> [n for n in ("weight", "bias", "weight_scale", "input_scale") if is_scale(n)]
    ['weight_scale', 'input_scale']
    """
    return local.startswith(("weight_scale", "weight_s_")) or local in _OTHER_SCALES


def is_code(local: str) -> bool:
    """Whether a tensor of a quantized layer is part of its stored weight (so the bias is not)."""
    return local.startswith("weight") or is_scale(local)


def examine(checkpoint: Checkpoint) -> Structure:
    """Everything that can be judged before a weight is read."""
    tensors = _by_layer(checkpoint.specs)
    findings: list[Finding] = []
    header = _header(checkpoint, findings)
    markers = _markers(checkpoint, findings)
    marked = []
    for layer in sorted({*markers, *header}, key=natural):
        own = {k: v for k, v in tensors.get(layer, {}).items() if k != _MARKER_LOCAL}
        fault = _header_fault(layer, header, markers, own)
        if fault is not None:
            findings.append(finding("header.disagrees", layer, fault))
        if layer in markers or "weight" in own:
            settings = header.get(layer, markers.get(layer))
            marked.append(_marked(layer, settings, own, findings))
    notes, unmarked = _unmarked(checkpoint, tensors, {m.layer for m in marked}, findings)
    if not marked and not unmarked:
        notes.insert(0, "the checkpoint is not quantized: no layer has a `comfy_quant` marker")
    coded = {
        f"{layer}.{local}"
        for layer in [*(m.layer for m in marked), *unmarked]
        for local in tensors.get(layer, {})
        if is_code(local) or local == _MARKER_LOCAL
    }
    return Structure(
        marked=tuple(marked),
        findings=tuple(findings),
        notes=tuple(notes),
        coded=frozenset(coded),
    )


def _by_layer(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    found: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        layer, _, local = name.rpartition(".")
        found[layer][local] = spec
    return dict(found)


def _header(checkpoint: Checkpoint, findings: list[Finding]) -> dict[str, dict[str, Any]]:
    try:
        return comfy.header_layers(checkpoint.metadata)
    except InputError as error:
        findings.append(finding("header.invalid", None, error.message))
        return {}


def _markers(checkpoint: Checkpoint, findings: list[Finding]) -> dict[str, dict[str, Any] | None]:
    """Settings of every layer with a marker tensor; None for one that cannot be read."""
    found: dict[str, dict[str, Any] | None] = {}
    for name, spec in checkpoint.specs.items():
        if not name.endswith(comfy.MARKER):
            continue
        layer = name.removesuffix(comfy.MARKER)
        found[layer] = None
        if spec.dtype != "U8" or len(spec.shape) != 1:
            what = f"has a marker stored as {spec}, not as 1-D U8"
        elif spec.nbytes > _MAX_MARKER_BYTES:
            what = f"has a marker of {spec.nbytes} bytes"
        else:
            raw = checkpoint.read_bytes(name)
            try:
                found[layer] = comfy.parse_marker(raw, layer=layer)
                continue
            except InputError as error:
                what = "has a marker that " + error.message.removeprefix(f"the marker `{name}` ")
        findings.append(finding("marker.invalid", layer, what))
    return found


def _header_fault(
    layer: str,
    header: Mapping[str, Mapping[str, Any]],
    markers: Mapping[str, Mapping[str, Any] | None],
    own: Mapping[str, TensorSpec],
) -> str | None:
    if layer not in header:
        return None
    if layer not in markers and "weight" not in own:
        return "stands in the header's `_quantization_metadata`, but there is no such layer"
    marker = markers.get(layer)
    if marker is not None and _said(marker) != _said(header[layer]):
        return "has other settings in the header's `_quantization_metadata` than in its marker"
    return None


def _said(settings: Mapping[str, Any]) -> dict[str, Any]:
    # A flag that is off says what a flag left out says.
    return {k: v for k, v in settings.items() if v is not None and v is not False}


def _marked(
    layer: str,
    settings: Mapping[str, Any] | None,
    own: Mapping[str, TensorSpec],
    findings: list[Finding],
) -> Marked:
    plug = None if settings is None else _format(layer, settings.get("format"), findings)
    sound = False
    if plug is not None and settings is not None:
        faults = [finding(slug, layer, told) for slug, told in plug.check(own, settings)]
        weight = own.get("weight")
        if not faults and (weight is None or weight.numel == 0):
            faults.append(finding("weight.missing", layer, "has no weight, or an empty one"))
        findings += faults
        sound = not faults
    return Marked(layer=layer, settings=settings or {}, stored=own, format=plug, sound=sound)


def _format(layer: str, name: object, findings: list[Finding]) -> Format | None:
    if name is None:
        findings.append(finding("marker.format", layer, "has a marker without a `format`"))
        return None
    known = catalog.names("formats")
    if not isinstance(name, str) or name not in known:
        shown = printable(str(name))
        findings.append(
            finding(
                "marker.format",
                layer,
                f"has the format `{shown}`, which this cq does not know",
                mend=select.nearest(shown, known)
                or "this cq knows " + ", ".join(f"`{n}`" for n in known),
            )
        )
        return None
    plug: Format = catalog.load("formats", name)
    return plug


def _unmarked(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Mapping[str, TensorSpec]],
    marked: set[str],
    findings: list[Finding],
) -> tuple[list[str], list[str]]:
    """Notes, and the layers that look quantized without saying so."""
    legacy = comfy.HEADER_KEY not in checkpoint.metadata and any(
        _LEGACY_KEY in own for own in tensors.values()
    )
    plain = converted = 0
    layers = []
    by_shape = comfy.find_quantized(dataclasses.replace(checkpoint, metadata={}))
    for layer in sorted((found.layer for found in by_shape), key=natural):
        if layer in marked:
            continue
        own = tensors[layer]
        weight = own["weight"]
        scales = [local for local in own if is_scale(local)]
        if weight.dtype.startswith("F8") and not scales:
            plain += 1  # read at face value, so nothing is lost; not coded
            continue
        layers.append(layer)
        if legacy and _LEGACY_SCALE in own and weight.dtype == "F8_E4M3":
            converted += 1
        elif legacy and _LEGACY_SCALE in own and weight.dtype == "F8_E5M2":
            told = "is a scaled F8_E5M2 weight of the old form, which ComfyUI reads as F8_E4M3"
            findings.append(finding("weight.dtype", layer, told))
        else:
            beside = f" beside `{scales[0]}`" if scales else ""
            told = f"stores {weight.dtype} codes{beside} but has no `comfy_quant` marker"
            if weight.is_float:
                told = f"has a `{scales[0]}` but no `comfy_quant` marker"
            findings.append(finding("marker.missing", layer, told))
    notes = []
    if plain:
        notes.append(f"{plain} weights are plain 8-bit floats without scales, read at face value")
    if converted:
        notes.append(f"{converted} layers are in the old `scaled_fp8` form, which ComfyUI converts")
    return notes, layers
