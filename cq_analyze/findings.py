"""Every finding that `cq verify` knows: its name, what it means, and how to mend it.

Owns the words that do not depend on the layer; `docs/findings.md` is made of this table. Where a
finding is found, its sentence is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_AGAIN = "quantize the original checkpoint again with `cq quant`"
_MIGRATE = "`cq edit --migrate comfy_quant` writes what ComfyUI reads; the weights stay as they are"
_NAMED = """`cq edit --migrate comfy_quant --set-quant PATTERN '{"format": …}'`"""
_REQUANTIZE = "`cq quant --requantize` makes it anew, `cq quant --format bf16` makes it plain"
_PICTURES = "render both series again with the same names, seeds and sizes"


class Kind(NamedTuple):
    """What a finding of that name means and how to mend it, each a sentence part. `heard` is what
    ComfyUI does: `silent` (it computes nonsense without a word), `fails`, or `-`."""

    meaning: str
    mend: str
    heard: str = "silent"


KINDS: dict[str, Kind] = {
    # Markers and the header
    "marker.missing": Kind(
        "codes or scales without a `comfy_quant` marker: ComfyUI computes with the raw codes",
        f"{_MIGRATE}, where the tensors or the other layers tell what it is; else say it, with"
        f" {_NAMED}; or {_AGAIN}",
    ),
    "marker.invalid": Kind(
        "a marker that is not 1-D U8 JSON", f"{_MIGRATE}; or set it with `cq edit --set-quant`"
    ),
    "marker.format": Kind(
        "a marker whose `format` is missing or one that ComfyUI does not know",
        f"{_MIGRATE}; if it cannot tell the format, {_NAMED} does; {_REQUANTIZE}",
        "fails",
    ),
    "marker.linear_dtype": Kind(
        "a `linear_dtype` that is neither int4 nor int8",
        """`cq edit --set-quant PATTERN '{"linear_dtype": "int4"}'`""",
    ),
    "header.invalid": Kind(
        "a metadata entry `_quantization_metadata` that cannot be read",
        "`cq edit --drop-quant-metadata`; the `comfy_quant` tensors say the same",
        "fails",
    ),
    "header.disagrees": Kind(
        "the header says something else than the markers; ComfyUI believes the header",
        "`cq edit --save-quant-metadata --prefer markers` (or `--prefer header`)",
    ),
    "header.prefix": Kind(
        "the header names layers without the prefix of the file: ComfyUI's checkpoint loader"
        " computes with raw codes",
        _MIGRATE,
    ),
    "legacy.e5m2": Kind(
        "a scaled F8_E5M2 weight of the old `scaled_fp8` form, which ComfyUI reads as F8_E4M3",
        _MIGRATE,
    ),
    # Weights and scales
    "weight.missing": Kind("a layer without a weight", _AGAIN, "fails"),
    "weight.dtype": Kind(
        "a weight of another dtype than its format's",
        f"{_MIGRATE} where packed codes or 8-bit floats are only labelled otherwise; of integers"
        f" under another dtype nothing tells what the bytes mean, so no edit mends them: {_AGAIN}",
    ),
    "weight.shape": Kind(
        "a weight of a shape that its format does not have, or half or twice as wide as in all"
        " other blocks",
        _AGAIN,
    ),
    "fp8.container": Kind(
        "8-bit floats in a container of integers, whose values ComfyUI converts",
        _MIGRATE,
    ),
    "scale.missing": Kind("a scale that the format needs is not there", _AGAIN, "fails"),
    "scale.dtype": Kind("a scale in another dtype than ComfyUI reads", _MIGRATE),
    "scale.shape": Kind(
        "a scale of another shape than ComfyUI reads: what it multiplies is another axis, or fails",
        f"{_MIGRATE}; of scales that ComfyUI has no place for, {_REQUANTIZE}",
    ),
    "scale.value": Kind("scales that are not finite, zero or negative", _AGAIN),
    "scale.ignored": Kind(
        "a tensor that belongs to the weight's value, but that ComfyUI does not read for the"
        " format: what it undoes is not undone",
        _REQUANTIZE,
    ),
    "scale.order": Kind(
        "block scales in the order of rows, not swizzled (only seen with `--against`)",
        _AGAIN,
    ),
    "codes.order": Kind(
        "4-bit codes with the nibbles of a byte swapped (only seen with `--against`)", _AGAIN
    ),
    "codebook.shape": Kind("a codebook that is not 16 levels", _AGAIN, "fails"),
    "group.size": Kind(
        "groups along K that the format does not have",
        """`cq edit --set-quant PATTERN '{"group_size": …}'` if the marker is wrong, else """
        + _AGAIN,
        "fails",
    ),
    # Rotation
    "convrot.group": Kind(
        "a rotation group that is no power of 4, or does not divide K",
        """`cq edit --set-quant PATTERN '{"convrot_groupsize": …}'` with the group that the tool"""
        " used",
        "fails",
    ),
    "convrot.lost": Kind(
        "a marker that speaks of another rotation than the weight has (only seen with `--against`)",
        """`cq edit --allow-broken --set-quant PATTERN '{"convrot": …, "convrot_groupsize": …}'`"""
        " with what the sentence says",
    ),
    "convrot.params": Kind(
        "an embedding table whose rotation stands inside `params`, where ComfyUI does not look",
        """`cq edit --set-quant PATTERN '{"convrot": true, "convrot_groupsize": …}'`""",
    ),
    # Where a format may stand
    "detection.packed": Kind(
        "a packed format on a layer by whose shape ComfyUI tells the model",
        f"{_AGAIN}, which keeps such layers or takes a format that keeps the shape",
    ),
    "embedding.format": Kind(
        "an embedding table in a format that ComfyUI takes for linear layers only",
        f"{_AGAIN}, with `int8_tensorwise` or `float8_e4m3fn` for embedding tables",
    ),
    "experts.format": Kind(
        "stacked experts in a format that ComfyUI does not take for them",
        f"{_AGAIN}, with a format that ComfyUI takes for stacked experts, such as"
        " `int8_tensorwise`",
    ),
    "experts.rotation": Kind(
        "stacked experts that are rotated, of which ComfyUI 0.33 drops the flag",
        f"{_AGAIN}, which leaves stacked experts unrotated",
    ),
    "layer.unloadable": Kind(
        "a quantized layer of a model that ComfyUI builds without quantized layers, such as CLIP",
        "`cq quant --format bf16` makes it plain; or take the model from the original file",
    ),
    "names.diffusers": Kind(
        "layers with the names of diffusers: ComfyUI renames the weights, not markers and scales",
        "quantize the original checkpoint with `cq quant --native-names`, which gives layers the"
        " model's own names first; `cq edit --rename` moves whole layers",
    ),
    # The model
    "layers.missing": Kind(
        "a layer, or a whole block, that the model's family has; ComfyUI leaves a layer that the"
        " file lacks uninitialized",
        "take the checkpoint that has all of it, or bring the layer with `cq edit --add-keys FILE`",
    ),
    "tensors.missing": Kind(
        "a norm, table or other tensor beside the layers that the model's family has; ComfyUI"
        " leaves it uninitialized",
        "take the checkpoint that has all of it, or bring it with `cq edit --add-keys FILE`",
    ),
    "layers.surplus": Kind(
        "a quantized layer that the model's family does not have, so ComfyUI will not load it",
        "`cq edit --rename` if its name is another tool's, `cq edit --remove-keys` if it is not"
        " needed",
    ),
    "bias.missing": Kind(
        "a layer without the bias that it should have; ComfyUI leaves it uninitialized",
        "bring it from the original with `cq edit --add-keys FILE`",
    ),
    "bias.shape": Kind(
        "a bias that is not one number for each output of its layer",
        "bring it from the original with `cq edit --add-keys FILE --replace`",
        "fails",
    ),
    "layer.unreadable": Kind("a layer whose tensors do not fit together", _AGAIN, "fails"),
    # Values
    "values.nonfinite": Kind(
        "a plain tensor with NaN or infinite values",
        "mend or exchange the checkpoint that the tensor came from",
    ),
    "values.range": Kind("a weight that decodes to values that are not finite", _AGAIN),
    "values.unlike": Kind(
        "a weight that decodes to something else than the reference's, for no reason that shows",
        "see that the reference is what the file was made from; if it is, the layer's scales are"
        f" lost: {_AGAIN}",
    ),
    "kitchen.disagrees": Kind(
        "comfy-kitchen decodes the layer to other values than cq",
        "report it to the authors of cq with the file's header; `CQ_KITCHEN=0` leaves it out",
        "-",
    ),
    # The reference
    "reference.missing": Kind(
        "a layer that the reference does not have",
        "give the checkpoint that the file was made from, in the same naming",
        "-",
    ),
    "reference.lost": Kind(
        "tensors of the reference that a part of the model lacks here",
        "take the checkpoint that has all of it, or bring them with `cq edit --add-keys FILE`;"
        " `--fail-on` names the findings that count, if they were removed on purpose",
    ),
    "reference.differs": Kind(
        "a plain tensor that is far from the reference's, further than any rounding",
        "give the checkpoint that the file was made from, or bring the tensor from it with `cq edit"
        " --add-keys FILE --replace`",
        "-",
    ),
    "reference.shape": Kind(
        "a tensor of another shape than the reference's",
        "give the checkpoint that the file was made from",
        "-",
    ),
    "reference.nonfinite": Kind(
        "a reference with values that are not finite", "mend or exchange the reference", "-"
    ),
    # Pictures
    "images.missing": Kind("a picture that only one of the two series has", _PICTURES, "-"),
    "images.shape": Kind("two pictures of one name and different sizes", _PICTURES, "-"),
    "images.unreadable": Kind("a file that is not a picture", "render or copy it again", "-"),
}


def mend(name: str) -> str:
    """How to mend a finding of that name, which a format from elsewhere may have made up."""
    return KINDS[name].mend if name in KINDS else _AGAIN


def markdown() -> str:
    """The table as the page `docs/findings.md`."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Findings of `cq verify`"
    yield ""
    yield "Generated from the code by `make docs`. A finding is why a checkpoint does not verify."
    yield "The third column says what ComfyUI 0.33 does with such a file: *silent* is the worst, a"
    yield "wrong result without a word. `--fail-on NAME` (or a glob such as `scale.*`) lets only"
    yield "those names decide the exit code."
    yield ""
    yield "| name | what it means | ComfyUI | how to mend it |"
    yield "|---|---|---|---|"
    for name, kind in KINDS.items():
        yield f"| `{name}` | {kind.meaning} | {kind.heard} | {kind.mend} |"
