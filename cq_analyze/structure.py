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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cq.core import catalog, comfy, recipe, select, stored
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Format
from cq.core.knowledge import Knowledge, know
from cq.core.stored import Stored, is_code, is_scale
from cq.core.text import printable
from cq_analyze import completeness, placement, unclear
from cq_analyze.reference import is_padded
from cq_analyze.report import Finding, finding, natural

_MAX_MARKER_BYTES = 1 << 20
_MARKER_LOCAL = comfy.MARKER.removeprefix(".")
_LEGACY_SCALE = "scale_weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """A layer with a marker or an entry in the header, as ComfyUI sees it.

    `specs` are its tensors by local name, without the marker. `format` is None where the marker
    names none that ComfyUI knows; `stored` says how to decode it, None if something is wrong with
    it.
    """

    layer: str
    settings: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    format: Format | None
    stored: Stored | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The marked layers, what is wrong, what is worth saying, and the names of all tensors that are
    codes, scales or markers rather than plain numbers."""

    marked: tuple[Marked, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    coded: frozenset[str]


def examine(checkpoint: Checkpoint) -> Structure:
    """Everything that can be judged before a weight is read."""
    names = stored.by_layer(checkpoint)
    tensors = {
        layer: {local: checkpoint.specs[name] for local, name in own.items()}
        for layer, own in names.items()
    }
    findings: list[Finding] = []
    known = know(checkpoint.specs)
    markers = _markers(checkpoint, findings)
    header = _header(checkpoint, tensors, markers, findings)
    marked = []
    for layer in sorted({*markers, *header}, key=natural):
        own = {k: v for k, v in tensors.get(layer, {}).items() if k != _MARKER_LOCAL}
        fault = _header_fault(layer, header, markers, own)
        if fault is not None:
            findings.append(finding("header.disagrees", layer, fault))
        if layer in markers or "weight" in own:
            settings = header.get(layer, markers.get(layer))
            marked.append(_marked(layer, settings, own, names[layer], known, findings))
    notes, unmarked = _unmarked(checkpoint, tensors, {m.layer for m in marked}, findings)
    notes += [*_custom(marked), *placement.unrotated(marked)]
    lacking, said = completeness.judge(checkpoint.specs, tensors, [m.layer for m in marked], known)
    findings += lacking
    notes += said
    findings += unclear.misread(marked, tensors)
    if not marked and not unmarked:
        notes.insert(0, "the checkpoint is not quantized: no layer has a `comfy_quant` marker")
    model = comfy.diffusers_model(checkpoint.specs)
    if model is not None and (marked or unmarked):
        told = f"the layers have the names of diffusers ({model}), which ComfyUI renames"
        told += " without their markers and scales: it would compute with raw codes"
        findings.append(finding("names.diffusers", None, told))
    coded = {
        names[layer][local]
        for layer in [*(m.layer for m in marked), *unmarked]
        for local in tensors.get(layer, {})
        if is_code(local) or local == _MARKER_LOCAL
    }
    return Structure(
        marked=tuple(marked),
        findings=tuple(unclear.told(checkpoint, findings)),
        notes=tuple(notes),
        coded=frozenset(coded),
    )


def _header(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Mapping[str, TensorSpec]],
    markers: Mapping[str, object],
    findings: list[Finding],
) -> dict[str, dict[str, Any]]:
    """The header's settings by the file's own names of layers, where it has a layer so."""
    try:
        header = comfy.header_layers(checkpoint.metadata)
    except InputError as error:
        findings.append(finding("header.invalid", None, error.message))
        return {}
    if all(layer in tensors for layer in header):
        return header
    bare: dict[str, list[str]] = defaultdict(list)
    for layer, own in tensors.items():
        if "weight" in own:
            bare[recipe.without_prefix(layer)].append(layer)
    found = {}
    for named, settings in header.items():
        same = bare[recipe.without_prefix(named)]
        layer = same[0] if named not in tensors and len(same) == 1 else named
        found[layer] = settings
        if layer != named and layer not in markers:
            told = (
                f"is marked by the header's entry `{printable(named)}` alone, under another prefix"
            )
            findings.append(finding("header.prefix", layer, told))
    return found


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
    names: Mapping[str, str],
    known: Knowledge,
    findings: list[Finding],
) -> Marked:
    plug = None if settings is None else _format(layer, settings.get("format"), findings)
    readable = None
    if plug is not None and settings is not None:
        faults = [finding(slug, layer, told) for slug, told in _faults(layer, plug, own, settings)]
        weight = own.get("weight")
        if not faults and (weight is None or weight.numel == 0):
            faults.append(finding("weight.missing", layer, "has no weight, or an empty one"))
        if not faults:
            clue = stored.Clue(
                layer=layer, settings=settings, tensors=own, names=names, evidence="marker"
            )
            try:
                readable = stored.resolve(clue, "")
            except InputError as error:
                told = error.message.partition(" cannot be read: ")[2]
                faults.append(finding("layer.unreadable", layer, f"cannot be decoded: {told}"))
            else:
                findings += _beside(plug, readable, own)
        findings += faults
        findings += placement.misplaced(layer, plug, own, settings, known)
    return Marked(layer=layer, settings=settings or {}, specs=own, format=plug, stored=readable)


def _beside(
    plug: Format, readable: stored.Stored, own: Mapping[str, TensorSpec]
) -> Iterator[Finding]:
    """What is wrong with tensors that ComfyUI reads beside the weight, whatever its format."""
    rows = readable.shape[0]
    bias, scale = own.get("bias"), own.get("input_scale")
    if len(readable.shape) == 3:  # stacked experts, of which ComfyUI reads no such tensors
        return
    if bias is not None:
        # A format that pads may know the padded height alone.
        meant = TensorSpec("F32", (*bias.shape, *readable.shape[1:]))
        if bias.shape != (rows,) and not is_padded(readable, meant):
            told = f"has a bias of shape {list(bias.shape)} for {rows} outputs"
            yield finding("bias.shape", readable.layer, told)
        elif not bias.is_float:
            told = f"has a bias of {bias.dtype}, whose integers ComfyUI takes for what they are not"
            yield finding("bias.shape", readable.layer, told)
    if scale is not None and plug.largest_input is not None:
        if scale.shape not in {(), (1,)}:
            told = f"has an `input_scale` of shape {list(scale.shape)}; ComfyUI needs []"
            yield finding("scale.shape", readable.layer, told)
        elif scale.dtype != "F32":
            told = f"has a {scale.dtype} `input_scale`; ComfyUI needs F32"
            yield finding("scale.dtype", readable.layer, told)


def _faults(
    layer: str, plug: Format, own: Mapping[str, TensorSpec], settings: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What the format finds wrong; of stacked experts, in each of them."""
    if not placement.stacked(layer, own):
        return list(plug.check(own, settings))
    experts = own["weight"].shape[0]
    unstacked = [
        (
            "scale.shape",
            f"has a `{local}` of shape {list(spec.shape)}, not one for each of its"
            f" {experts} experts",
        )
        for local, spec in own.items()
        if local.startswith("weight") and spec.shape[:1] != (experts,)
    ]
    return unstacked or list(plug.check(stored.matrix_specs(own), settings))


def _custom(marked: list[Marked]) -> list[str]:
    """A note on each format that no released ComfyUI loads."""
    plugs = {m.format.name: m.format for m in marked if m.format is not None}
    return [
        f"no released ComfyUI loads `{name}`; it needs {plug.loader or 'a loader for it'}"
        for name, plug in sorted(plugs.items())
        if plug.first_comfyui is None and not plug.casts
    ]


def _format(layer: str, name: object, findings: list[Finding]) -> Format | None:
    if name is None:
        told = "has a marker without a `format`, which ComfyUI refuses"
        findings.append(finding("marker.format", layer, told))
        return None
    known = catalog.names("formats")
    if isinstance(name, str) and name in known:
        plug: Format = catalog.load("formats", name)
        return plug
    shown, meant = printable(str(name)), stored.format_of(name)
    if meant is not None:
        told = f"has the format `{shown}`, another tool's word for `{meant}`, which ComfyUI does"
        findings.append(finding("marker.format", layer, f"{told} not know"))
    else:
        told = f"has the format `{shown}`, which this cq does not know"
        mend = select.nearest(shown, known)
        mend = mend or "this cq knows " + ", ".join(f"`{n}`" for n in known)
        findings.append(finding("marker.format", layer, told, mend=mend))
    return None


def _unmarked(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Mapping[str, TensorSpec]],
    marked: set[str],
    findings: list[Finding],
) -> tuple[list[str], list[str]]:
    """Notes, and the layers that look quantized without saying so."""
    legacy = comfy.HEADER_KEY not in checkpoint.metadata and any(
        stored.SCALED_FP8 in own for own in tensors.values()
    )
    plain = converted = 0
    layers = []
    by_shape = comfy.find_quantized(dataclasses.replace(checkpoint, metadata={}))
    for layer in sorted((found.layer for found in by_shape), key=natural):
        if layer in marked:
            continue
        own = tensors.get(layer, {})
        weight = own.get("weight")
        if weight is None:
            told = "holds codes of GPTQ, AWQ or nunchaku, which ComfyUI does not read"
            findings.append(finding("marker.missing", layer, told))
            continue
        scales = [local for local in own if is_scale(local)]
        if weight.dtype.startswith("F8") and not scales:
            plain += 1  # read at face value, so nothing is lost; not coded
            continue
        layers.append(layer)
        if legacy and _LEGACY_SCALE in own and weight.dtype == "F8_E4M3":
            converted += 1
        elif legacy and _LEGACY_SCALE in own and weight.dtype == "F8_E5M2":
            told = "is a scaled F8_E5M2 weight of the old form, which ComfyUI reads as F8_E4M3"
            findings.append(finding("legacy.e5m2", layer, told))
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
