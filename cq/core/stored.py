"""How each layer of a checkpoint is stored: the one place that reads every tool's way to say it.

Owns the answer to "which format, which settings, which tensors" from names, dtypes, shapes and
markers; reads no weight and needs no torch. What ComfyUI itself would make of a file is the
question of `cq verify`, which is stricter.

Source: ComfyUI `comfy/utils.py:convert_old_quants` (header over markers, the old `scaled_fp8`
form); for other tools' files: comfy-quants docs/formats/int8_w8a8.md (markers without a format),
silveroxides/convert_to_quant and its forks (other names, scales of other shapes, `orig_shape`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cq.core import catalog, comfy, recognition
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.fellows import Fellows
from cq.core.formats import Format, block_of
from cq.core.recipe import without_prefix
from cq.core.text import printable

SCALED_FP8 = "scaled_fp8"
SMOOTHING = "pre_quant_scale"
UNCLEAR = "input.unclear"  # the code of errors that a person who knows the layer can settle
_MARKER = comfy.MARKER.removeprefix(".")
_CANONICAL = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
_OTHER_SCALES = frozenset({*_CANONICAL, "input_scale", SMOOTHING})
# Beside the weight, but no part of its value: what the runtime does with activations, and a record
# of smoothing that the tool undid before it stored the weight.
_INERT = frozenset({"input_scale", "smooth_factors", "weight_scalar", _MARKER})
_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_PLAIN_FLOAT8 = frozenset({*_FLOAT8, "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_INT8 = ("int8_tensorwise", "int8_blockwise")
# mxfp8 with one more scale for graphics cards without MXFP8; the block scales say everything.
_SUPERSETS = {"hybrid_mxfp8": "mxfp8"}
_LARGEST_PADDING = 32
_SAMPLE = TensorSpec("F32", (1024, 1024))  # a shape that every format takes
_HINT = "start from the unquantized checkpoint, or add a plug; `cq plugins` lists the formats"


def is_scale(local: str) -> bool:
    """Whether a tensor of a quantized layer holds scales, by its local name.

    >>> [n for n in ("weight", "bias", "weight_scale", "input_scale") if is_scale(n)]
    ['weight_scale', 'input_scale']
    """
    return local.startswith(("weight_scale", "weight_s_")) or local in _OTHER_SCALES


def is_code(local: str) -> bool:
    """Whether a tensor of a quantized layer is part of its stored weight (so the bias is not)."""
    return local == "weight" or local.startswith("weight_") or is_scale(local)


def is_owned(local: str) -> bool:
    """Whether a tensor is there because its layer is quantized: codes, scales, marker, records."""
    return is_code(local) or local in _INERT


def is_optional(local: str) -> bool:
    """Whether a quantized layer decodes to the same weight without the tensor."""
    return _CANONICAL.get(local, local) in _INERT - {_MARKER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One quantized layer, ready to be decoded.

    `format` is the plug that understands it, with `settings` in that plug's words. `tensors` and
    `names` are the specs and the full names of the tensors that make up the weight, by local name
    in today's words; `owned` are all names that go when the layer becomes plain. `shape` is the
    weight's own, without padding as far as the file tells. `evidence` says what showed it:
    `header`, `marker`, `scaled_fp8`, `scale` or `dtype`.
    """

    layer: str
    format: Format
    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    names: Mapping[str, str]
    owned: tuple[str, ...]
    shape: tuple[int, ...]
    evidence: str

    @property
    def weight(self) -> TensorSpec:
        """The stored weight."""
        return self.tensors["weight"]

    @property
    def label(self) -> str:
        """The format's name, or the dtype of a weight whose numbers stand for themselves."""
        return f"plain {self.weight.dtype}" if self.format.casts else self.format.name


def stored_layers(checkpoint: Checkpoint) -> dict[str, Stored]:
    """All quantized layers by name, in the checkpoint's order; weights in plain 8-bit floats, under
    any name, among them.

    Raises: InputError for what no format reads, naming file and layer, and for a marker or a header
    entry that is not what it should be.
    """
    shown = ", ".join(source.shown for source in checkpoint.sources)
    return {found.layer: resolve(found, shown) for found in clues(checkpoint)}


def describe(checkpoint: Checkpoint) -> str:
    """What the checkpoint holds quantized, for people: `57 layers: 40 int8_tensorwise, 17 nvfp4`.

    Reads markers at most, and never raises for what they say.
    """
    try:
        counts = Counter(_label(found) for found in clues(checkpoint))
    except InputError:
        return f"{len(comfy.find_quantized(checkpoint))} layers"
    total = sum(counts.values())
    told = ", ".join(f"{n} {label}" for label, n in sorted(counts.items(), key=lambda c: -c[1]))
    return f"{total} {'layer' if total == 1 else 'layers'}: {told}"


def _label(found: Clue) -> str:
    try:
        return resolve(found, "").label
    except InputError:
        return printable(str((found.settings or {}).get("format", "of unknown format")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Clue:
    """What a checkpoint says of one layer: its marker (None without one), its tensors by local name
    as the file has them, their full names, what showed that it is quantized, and the layers beside
    it, which are asked where the marker does not tell enough."""

    layer: str
    settings: Mapping[str, Any] | None
    tensors: Mapping[str, TensorSpec]
    names: Mapping[str, str]
    evidence: str
    fellows: Fellows | None = field(default=None, compare=False, repr=False)


def by_layer(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Full names of all tensors, by layer and local name."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in checkpoint.specs:
        layer, _, local = name.rpartition(".")
        found[layer][local] = name
    return dict(found)


def clues(checkpoint: Checkpoint) -> Iterator[Clue]:
    """The layers that are quantized in some way, in the checkpoint's order.

    Raises: InputError for a marker or a header entry that is not what it should be.
    """
    specs, layers = checkpoint.specs, by_layer(checkpoint)
    header = header_settings(checkpoint, layers)
    evident = {
        quantized.layer: quantized.evidence for quantized in comfy.find_quantized(checkpoint)
    }
    fellows = Fellows(checkpoint, layers, header)
    legacy = any(SCALED_FP8 in own for own in layers.values())
    for layer, own in layers.items():
        settings, evidence = header.get(layer), evident.get(layer)
        if settings is not None:
            evidence = "header"
        elif _MARKER in own:
            settings = fellows.settings(layer)
            evidence = "marker"
        elif legacy and "scale_weight" in own:
            evidence = SCALED_FP8
        named = {local: specs[name] for local, name in own.items()}
        if evidence is not None:
            yield Clue(
                layer=layer,
                settings=settings,
                tensors=named,
                names=own,
                evidence=evidence,
                fellows=fellows,
            )
        for local, name in own.items():
            part_of_layer = evidence is not None and is_owned(local)
            if not part_of_layer and local != SCALED_FP8 and named[local].dtype in _PLAIN_FLOAT8:
                spec, names = {"weight": named[local]}, {"weight": name}
                yield Clue(layer=name, settings=None, tensors=spec, names=names, evidence="dtype")


def header_settings(
    checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, str]]
) -> dict[str, Mapping[str, Any]]:
    """The header's settings by the file's own layer names, which may carry another prefix; `layers`
    are what `by_layer` says.

    Raises: InputError for a header form that is none, or a name that two layers may have.
    """
    header = comfy.header_layers(checkpoint.metadata)
    if not header:
        return {}
    bare: dict[str, list[str]] = defaultdict(list)
    for layer, own in layers.items():
        if "weight" in own:
            bare[without_prefix(layer)].append(layer)
    found: dict[str, Mapping[str, Any]] = {}
    for name, settings in header.items():
        if "weight" in layers.get(name, {}):
            found[name] = settings
            continue
        same = bare[without_prefix(name)]
        if len(same) > 1:
            raise InputError(
                f"the metadata entry `{comfy.HEADER_KEY}` names the layer `{printable(name)}`,"
                f" which may be `{same[0]}` or `{same[1]}`",
                where=printable(name),
                hint="quantize the two models of the file apart",
                code="input.marker",
            )
        if same:
            found.setdefault(same[0], settings)
    return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """One layer on its way from clue to `Stored`."""

    clue: Clue
    shown: str
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def bad(self, what: str, hint: str = _HINT, code: str = "input.stored") -> InputError:
        layer = printable(self.clue.layer)
        return InputError(
            f"layer `{layer}` of `{self.shown}` cannot be read: {what}",
            where=layer,
            hint=hint,
            code=code,
        )


def resolve(clue: Clue, shown: str) -> Stored:
    """How the layer of a clue is stored; `shown` is the checkpoint's name in messages.

    Raises: InputError if it is not known, or its tensors do not fit together.
    """
    reader = _Reader(clue, shown)
    for local, spec in clue.tensors.items():
        own = _CANONICAL.get(local, local)
        if is_code(own) and own not in _INERT and (own == local or own not in clue.tensors):
            reader.tensors[own], reader.names[own] = spec, clue.names[local]
    _see_readable(reader)
    plug, settings = _format(reader)
    owned = tuple(name for local, name in clue.names.items() if is_owned(local))
    return Stored(
        layer=clue.layer,
        format=plug,
        settings=settings,
        tensors=reader.tensors,
        names=reader.names,
        owned=owned,
        shape=_shape(reader, plug, settings),
        evidence=clue.evidence,
    )


def _see_readable(reader: _Reader) -> None:
    """Raise for layers that no marker could make readable."""
    locals_, weight = reader.clue.tensors, reader.tensors.get("weight")
    if weight is None:
        codes = next((n for n in locals_ if n.endswith("qweight")), None)
        if codes is not None:
            raise reader.bad(f"its codes stand in `{codes}`, in a layout of GPTQ, AWQ or nunchaku")
        raise reader.bad("it has a marker but no `weight`", "restore the file or its missing shard")
    if "hadamard_quip" in locals_:
        raise reader.bad("its weight is in a randomly rotated basis that only its own tool undoes")
    if weight.is_float:
        beside = next((n for n in reader.tensors if n != "weight"), _MARKER)
        raise reader.bad(
            f"its weight is {weight.dtype}, which is not quantized, beside `{beside}`",
            f"remove `{beside}` if the weight is plain",
        )


def _format(reader: _Reader) -> tuple[Format, dict[str, Any]]:
    """The plug and its settings: by the marker's word, corrected by what the tensors are."""
    weight, scale = reader.tensors["weight"], reader.tensors.get("weight_scale")
    settings = dict(reader.clue.settings or {})
    label = settings.get("format")
    if label is None:
        name = _recognized(reader, weight)
        if name is None:
            return catalog.load("formats", "fp32"), {}
    else:
        name = format_of(label)
        if name is None:
            shown = printable(str(label))
            raise reader.bad(f"its format is `{shown}`, which this cq does not know")
    if name in _FLOAT8.values() and weight.dtype in _FLOAT8:
        # The old form carries no dtype, and is labelled e4m3 whatever it is
        name = _FLOAT8[weight.dtype]
    if scale is not None and (name in _INT8 or name in _FLOAT8.values()):
        block = block_of(_matrix(weight, weight), _matrix(scale, weight))
        settings["group_size"] = block
        if block is None:
            label = None  # of blocks that the tool did not make after all
        if name in _INT8:
            name = _INT8[block is not None]
    plug: Format = catalog.load("formats", name)
    if plug.rotation == "never" and settings.get("convrot"):
        raise reader.bad(f"its marker speaks of a rotation, which `{name}` does not have")
    _see_dtype(reader, plug, weight)
    _see_rotation(reader, plug)
    settings["format"] = label if label in plug.aliases else name
    return plug, {key: value for key, value in settings.items() if value is not None}


def format_of(label: object) -> str | None:
    """The name of the format that markers call `label`, ComfyUI's or another tool's word for it.

    >>> format_of("int8_axiswise"), format_of("svdquant_w4a4")
    ('int8_tensorwise', None)
    """
    if not isinstance(label, str):
        return None
    known = catalog.names("formats")
    label = _SUPERSETS.get(label, label)
    if label in known:
        return label
    return next((name for name in known if label in _aliases(name)), None)


def _aliases(name: str) -> tuple[str, ...]:
    with suppress(PlanError):  # a plug that cannot be loaded is no reason not to read the file
        return tuple(catalog.load("formats", name).aliases)
    return ()


def _recognized(reader: _Reader, weight: TensorSpec) -> str | None:
    """The format of a layer whose marker names none; None for numbers meant as they are.

    Raises: InputError if no format has such tensors, or several have and no other layer tells.
    """
    clue = reader.clue
    if not any(map(is_scale, reader.tensors)):
        if weight.dtype in _PLAIN_FLOAT8 and clue.settings is None:
            return None
        raise reader.bad(
            f"it has {weight.dtype} codes, and neither a scale nor a marker's `format`"
        )
    specs = matrix_specs(reader.tensors)
    try:
        return recognition.format_of(clue.layer, specs, clue.settings or {}, clue.fellows)
    except recognition.Unclear as unclear:
        raise reader.bad(unclear.what, unclear.hint, UNCLEAR) from None


def _see_rotation(reader: _Reader, plug: Format) -> None:
    """Raise if weights may be stored rotated and no marker says by which rotation. Layers with
    names that only older tools wrote are not: those rotated none."""
    clue = reader.clue
    old = plug.rotation == "optional" and _CANONICAL.keys() & clue.tensors.keys()
    told = clue.settings or {}
    if "format" in told or old or len(reader.tensors["weight"].shape) != 2:
        return
    try:
        recognition.see_rotation(clue.layer, plug, reader.tensors, told, clue.fellows)
    except recognition.Unclear as unclear:
        raise reader.bad(unclear.what, unclear.hint, UNCLEAR) from None


def reads(plug: Format, local: str) -> bool:
    """Whether readers of the format look at a tensor of that local name beside its codes.

    >>> from cq.core import catalog
    >>> int8, nvfp4 = (catalog.load("formats", n) for n in ("int8_tensorwise", "nvfp4"))
    >>> reads(int8, "weight_scale"), reads(int8, "pre_quant_scale"), reads(nvfp4, "pre_quant_scale")
    (True, False, True)
    """
    own = _CANONICAL.get(local, local)
    if own == SMOOTHING:
        return plug.smooths
    known = {name for scaling in plug.scalings for name in plug.tensors(_SAMPLE, scaling)}
    return plug.casts or own in known | {_MARKER}


def _see_dtype(reader: _Reader, plug: Format, weight: TensorSpec) -> None:
    """Raise if the plug's codes have another dtype. Bytes that are no integers may be called so."""
    usual = plug.tensors(_SAMPLE, plug.scalings[0])["weight"]
    is_integer = usual == TensorSpec("I8", _SAMPLE.shape)
    accepted = {"I8"} if is_integer else {usual.dtype, "I8", "U8"}
    if plug.casts or weight.dtype not in accepted:
        raise reader.bad(f"its format is `{plug.name}`, but its codes are {weight.dtype}")


def _matrix(spec: TensorSpec, weight: TensorSpec) -> tuple[int, ...]:
    """The shape of one matrix's share of a layer's tensor: stacked experts lead with E."""
    stacked = len(weight.shape) == 3 and spec.shape[:1] == weight.shape[:1]
    return spec.shape[1:] if stacked else spec.shape


def matrix_specs(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """A layer's tensors as one matrix has them: without the leading E of stacked experts, and a
    weight of another number of dimensions as a matrix of its rows."""
    weight = tensors["weight"]
    found = {n: TensorSpec(s.dtype, _matrix(s, weight)) for n, s in tensors.items()}
    if len(weight.shape) not in {2, 3}:
        found["weight"] = TensorSpec(weight.dtype, (*weight.shape[:1], weight.row_numel))
    return found


def _shape(reader: _Reader, plug: Format, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The weight's own shape, from the format and from what else tells how much is padding."""
    weight = reader.tensors["weight"]
    if plug.casts:
        return weight.shape
    if len(weight.shape) not in {2, 3} and (not weight.shape or not plug.keeps_shape):
        raise reader.bad(f"its weight is {len(weight.shape)}-D")
    bias = {k: spec for k, spec in reader.clue.tensors.items() if k == "bias"}
    specs = matrix_specs({**bias, **reader.tensors})
    smoothing = specs.pop(SMOOTHING, None)
    try:
        rows, columns = plug.shape(specs, settings)
    except InputError as error:
        raise reader.bad(error.message, error.hint or _HINT) from error
    if smoothing is not None and smoothing.numel != 1:
        if not 0 <= columns - smoothing.numel < _LARGEST_PADDING:
            raise reader.bad(
                f"its `{SMOOTHING}` of shape {list(smoothing.shape)} does not fit K={columns}"
            )
        columns = smoothing.numel
    if len(weight.shape) == 2:
        return rows, columns
    return (weight.shape[0], rows, columns) if len(weight.shape) == 3 else weight.shape
