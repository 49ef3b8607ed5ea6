"""Every way in which a layer has been stored is read to the very values that it was made of; what
cannot be read is refused by name. Layers are built by hand from known codes and scales, or by
comfy-kitchen's own quantizers, never by cq."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from hypothesis import given
from hypothesis import strategies as st

import cq
import cq_quant
from cq.core import catalog, comfy, manifest, rotation
from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.dequantize import Dequantize
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.formats import decode
from cq.core.source import cuts
from cq.core.stored import describe, format_of, stored_layers
from cq_analyze import verify

Tensors = dict[str, torch.Tensor]

LAYER = "blocks.0.mlp"
ROWS, COLUMNS, BLOCK = 384, 256, 128
STORING = [name for name in catalog.names("formats") if not catalog.load("formats", name).casts]


def marker(**settings: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def header(layers: dict[str, Any]) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def opened(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Checkpoint:
    """A checkpoint of `tensors`, which may share memory."""
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    return cq.open(make.save(path, own, metadata))


def layer(stored: Tensors, name: str = LAYER) -> Tensors:
    return {f"{name}.{local}": tensor for local, tensor in stored.items()}


def written(directory: Path, checkpoint: Checkpoint, dtype: str = "F32") -> Tensors:
    """The tensors of the file that a checkpoint's plain form becomes."""
    path = directory / "plain.safetensors"
    cq.write(Dequantize(dtype=dtype).apply(checkpoint), path, force=True)
    return make.load(path)


def by_local_name(checkpoint: Checkpoint) -> tuple[Tensors, dict[str, Any]]:
    """The stored tensors of a checkpoint of one layer, and its marker."""
    tensors = checkpoint.read_many(checkpoint.specs)
    stored = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    settings = bytes(stored.pop("comfy_quant").tolist())
    return stored, comfy.parse_marker(settings, layer=LAYER)


CODES = torch.randint(
    -127, 128, (ROWS, COLUMNS), generator=make.generator("codes"), dtype=torch.int8
)
FLOATS = make.weight(ROWS, COLUMNS, seed="float8") * 50
E4M3, E5M2 = FLOATS.to(torch.float8_e4m3fn), FLOATS.to(torch.float8_e5m2)
TENSOR = torch.tensor(0.0123)
ROW = make.weight(ROWS, 1, seed="row").abs() + 1e-3
SQUARES = make.weight(ROWS // BLOCK, COLUMNS // BLOCK, seed="squares").abs() + 1e-3
GROUPS = make.weight(ROWS, COLUMNS // BLOCK, 1, seed="groups").abs() + 1e-3
SPREAD = SQUARES.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
GROUPED = GROUPS[..., 0].repeat_interleave(BLOCK, 1)


def rotated_back(group: int) -> torch.Tensor:
    return kitchen.dequantize_int8_convrot_weight(CODES, ROW, group)


def unpacked(group: int) -> torch.Tensor:
    """The codes as pairs of signed 4-bit numbers, the low one first, in the original basis."""
    low = CODES.bitwise_left_shift(4).bitwise_right_shift(4)
    pairs = torch.stack((low, CODES.bitwise_right_shift(4)), -1).flatten(1)
    return rotation.unrotate(pairs * ROW, group)


INT4_VALUES = unpacked(64)

VARIANTS: dict[str, tuple[Tensors, torch.Tensor, str, str]] = {
    "int8, a scale per row": (
        {"weight": CODES, "weight_scale": ROW, "comfy_quant": marker(format="int8_tensorwise")},
        CODES * ROW,
        "int8_tensorwise",
        "marker",
    ),
    "int8, one scale": (
        {"weight": CODES, "weight_scale": TENSOR, "comfy_quant": marker(format="int8_tensorwise")},
        CODES * TENSOR,
        "int8_tensorwise",
        "marker",
    ),
    "int8, one scale in a list": (
        {
            "weight": CODES,
            "weight_scale": TENSOR[None],
            "comfy_quant": marker(format="int8_tensorwise"),
        },
        CODES * TENSOR,
        "int8_tensorwise",
        "marker",
    ),
    "int8 by axis": (
        {"weight": CODES, "weight_scale": ROW[:, 0], "comfy_quant": marker(format="int8_axiswise")},
        CODES * ROW,
        "int8_tensorwise",
        "marker",
    ),
    "int8, half scale": (
        {
            "weight": CODES,
            "weight_scale": ROW.bfloat16(),
            "comfy_quant": marker(format="int8_tensorwise"),
        },
        CODES * ROW.bfloat16().float(),
        "int8_tensorwise",
        "marker",
    ),
    "int8 rotated": (
        {
            "weight": CODES,
            "weight_scale": ROW,
            "comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=64),
        },
        rotated_back(64),
        "int8_tensorwise",
        "marker",
    ),
    "comfy-quants, no format": (
        {
            "weight": CODES,
            "weight_scale": ROW,
            "comfy_quant": marker(convrot=False, per_row=True),
        },
        CODES * ROW,
        "int8_tensorwise",
        "marker",
    ),
    "comfy-quants, no format, rotated": (
        {
            "weight": CODES,
            "weight_scale": ROW,
            "comfy_quant": marker(convrot=True, convrot_groupsize=256, per_row=True),
        },
        rotated_back(256),
        "int8_tensorwise",
        "marker",
    ),
    "int8, no marker, in the old names": (
        {"weight": CODES, "scale_weight": ROW},
        CODES * ROW,
        "int8_tensorwise",
        "scale",
    ),
    "packed int4, no format": (
        {
            "weight": CODES,
            "weight_scale": ROW[:, 0],
            "comfy_quant": marker(convrot_groupsize=64, linear_dtype="int8"),
        },
        INT4_VALUES,
        "convrot_w4a4",
        "marker",
    ),
    "int8 of the seed without markers": (
        {"weight": CODES, "scale_weight": TENSOR, "scale_input": TENSOR},
        CODES * TENSOR,
        "int8_tensorwise",
        "scale",
    ),
    "int8 blocks that are rows": (
        {
            "weight": CODES,
            "weight_scale": ROW[:, 0],
            "comfy_quant": marker(format="int8_blockwise", group_size=128),
        },
        CODES * ROW,
        "int8_tensorwise",
        "marker",
    ),
    "int8 with records of smoothing that was undone": (
        {
            "weight": CODES,
            "weight_scale": ROW,
            "input_scale": TENSOR,
            "smooth_factors": torch.full((COLUMNS,), 3.0),
            "comfy_quant": marker(format="int8_tensorwise"),
        },
        CODES * ROW,
        "int8_tensorwise",
        "marker",
    ),
    "float8": (
        {
            "weight": E4M3,
            "weight_scale": TENSOR,
            "comfy_quant": marker(format="float8_e4m3fn", orig_dtype="torch.float16"),
        },
        E4M3.float() * TENSOR,
        "float8_e4m3fn",
        "marker",
    ),
    "float8 E5M2": (
        {"weight": E5M2, "weight_scale": TENSOR, "comfy_quant": marker(format="float8_e5m2")},
        E5M2.float() * TENSOR,
        "float8_e5m2",
        "marker",
    ),
    "float8 in a container of bytes": (
        {
            "weight": E4M3.view(torch.uint8),
            "weight_scale": TENSOR,
            "comfy_quant": marker(format="float8_e4m3fn"),
        },
        E4M3.float() * TENSOR,
        "float8_e4m3fn",
        "marker",
    ),
    "float8 by row": (
        {
            "weight": E4M3,
            "weight_scale": ROW[:, 0],
            "comfy_quant": marker(format="float8_e4m3fn_rowwise"),
        },
        E4M3.float() * ROW,
        "float8_e4m3fn",
        "marker",
    ),
    "float8 by square": (
        {
            "weight": E4M3,
            "weight_scale": SQUARES,
            "comfy_quant": marker(format="float8_e4m3fn_blockwise", group_size=BLOCK),
        },
        E4M3.float() * SPREAD,
        "float8_e4m3fn",
        "marker",
    ),
    "float8 in blocks of a row, labelled as if by tensor": (
        {"weight": E4M3, "weight_scale": GROUPS, "comfy_quant": marker(format="float8_e4m3fn")},
        E4M3.float() * GROUPED,
        "float8_e4m3fn",
        "marker",
    ),
    "float8 blocks that are rows": (
        {
            "weight": E4M3,
            "weight_scale": ROW[:, 0],
            "comfy_quant": marker(format="float8_e4m3fn_blockwise", group_size=BLOCK),
        },
        E4M3.float() * ROW,
        "float8_e4m3fn",
        "marker",
    ),
    "float8, no marker": (
        {"weight": E5M2, "weight_scale": ROW},
        E5M2.float() * ROW,
        "float8_e5m2",
        "scale",
    ),
    "float8, no marker, squares": (
        {"weight": E4M3, "weight_scale": SQUARES},
        E4M3.float() * SPREAD,
        "float8_e4m3fn",
        "scale",
    ),
    "float8 as it is": ({"weight": E4M3}, E4M3.float(), "plain F8_E4M3", "dtype"),
    "float8 as it is, with an input scale": (
        {"weight": E5M2, "input_scale": TENSOR},
        E5M2.float(),
        "plain F8_E5M2",
        "dtype",
    ),
}
if "int8_blockwise" in STORING:
    VARIANTS |= {
        "int8 by square": (
            {
                "weight": CODES,
                "weight_scale": SQUARES,
                "comfy_quant": marker(format="int8_blockwise", group_size=BLOCK),
            },
            CODES * SPREAD,
            "int8_blockwise",
            "marker",
        ),
        "int8 in blocks of a row, labelled square": (
            {
                "weight": CODES,
                "weight_scale": GROUPS,
                "comfy_quant": marker(format="int8_blockwise", group_size=BLOCK),
            },
            CODES * GROUPED,
            "int8_blockwise",
            "marker",
        ),
        "int8 by square, labelled by tensor": (
            {
                "weight": CODES,
                "weight_scale": SQUARES,
                "comfy_quant": marker(format="int8_tensorwise", per_row=True),
            },
            CODES * SPREAD,
            "int8_blockwise",
            "marker",
        ),
        "int8 by square, no marker": (
            {"weight": CODES, "weight_scale": SQUARES},
            CODES * SPREAD,
            "int8_blockwise",
            "scale",
        ),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_dequantize_reads_what_tools_have_written(tmp_path: Path, variant: str) -> None:
    stored, expected, label, evidence = VARIANTS[variant]
    bias = make.weight(ROWS, dtype="BF16", seed="bias")
    source = opened(tmp_path / "q.safetensors", layer({**stored, "bias": bias}))
    (found,) = stored_layers(source).values()
    assert (found.label, found.evidence, found.shape) == (label, evidence, tuple(expected.shape))
    assert describe(source) == f"1 layer: 1 {label}"
    tensors = written(tmp_path, source)
    assert sorted(tensors) == [f"{LAYER}.bias", f"{LAYER}.weight"]
    assert make.same(bias, tensors[f"{LAYER}.bias"])
    assert make.same(expected, tensors[f"{LAYER}.weight"])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("bare", [True, False])
def test_dequantize_reads_settings_from_the_header_alone(
    tmp_path: Path, prefix: str, bare: bool
) -> None:
    """ComfyUI takes the names with the file's prefix or without it."""
    settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    source = opened(
        tmp_path / "q.safetensors",
        layer({"weight": CODES, "weight_scale": ROW}, prefix + LAYER),
        header({("" if bare else prefix) + LAYER: settings}),
    )
    assert stored_layers(source)[prefix + LAYER].evidence == "header"
    plain = Dequantize().apply(source)
    assert comfy.HEADER_KEY not in plain.metadata
    assert make.same(rotated_back(64), plain.read(f"{prefix}{LAYER}.weight"))


def test_dequantize_takes_the_header_over_the_marker(tmp_path: Path) -> None:
    """As ComfyUI does, so that the values are those that it would compute with."""
    stored = {"weight": CODES, "weight_scale": ROW, "comfy_quant": marker(format="svdquant_w4a4")}
    source = opened(
        tmp_path / "q.safetensors", layer(stored), header({LAYER: {"format": "int8_tensorwise"}})
    )
    assert make.same(CODES * ROW, Dequantize().apply(source).read(f"{LAYER}.weight"))


@pytest.mark.parametrize("weight", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("size", [0, 2])
def test_dequantize_reads_scaled_fp8_by_the_weights_own_dtype(
    tmp_path: Path, weight: torch.Tensor, prefix: str, size: int
) -> None:
    """ComfyUI takes every such file for E4M3."""
    tensors = {
        **layer({"weight": weight, "scale_weight": TENSOR, "scale_input": TENSOR}, prefix + LAYER),
        f"{prefix}scaled_fp8": torch.zeros(size, dtype=torch.float8_e4m3fn),
        f"{prefix}plain.weight": weight,
        f"{prefix}norm.scale": make.weight(64, dtype="F32"),
    }
    source = opened(tmp_path / "q.safetensors", tensors)
    assert stored_layers(source)[prefix + LAYER].evidence == "scaled_fp8"
    found = written(tmp_path, source)
    assert sorted(found) == [
        f"{prefix}{LAYER}.weight",
        f"{prefix}norm.scale",
        f"{prefix}plain.weight",
    ]
    assert make.same(weight.float() * TENSOR, found[f"{prefix}{LAYER}.weight"])
    assert make.same(weight.float(), found[f"{prefix}plain.weight"])


def test_dequantize_makes_plain_float8_of_any_name_and_shape_ordinary(tmp_path: Path) -> None:
    shapes = {"a.weight": (6, 5, 3, 3), "a.bias": (7,), "gamma": (), "conv.weight": (4, 3, 2)}
    tensors = {
        name: make.weight(*shape, seed=name).to(torch.float8_e4m3fn)
        for name, shape in shapes.items()
    }
    found = written(tmp_path, opened(tmp_path / "q.safetensors", tensors))
    assert {name: tensor.float() for name, tensor in tensors.items()}.keys() == found.keys()
    for name, tensor in tensors.items():
        assert make.same(tensor.float(), found[name])


@pytest.mark.parametrize("shape", [(6,), (6, 5, 3, 3), (6, 4, 3)])
def test_dequantize_reads_scaled_weights_of_convolutions_and_norms(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    weight = make.weight(*shape).to(torch.float8_e4m3fn)
    stored = {"weight": weight, "scale_weight": TENSOR}
    source = opened(tmp_path / "q.safetensors", layer(stored))
    assert make.same(weight.float() * TENSOR, written(tmp_path, source)[f"{LAYER}.weight"])


# Blocks, padding, smoothing, experts -----------------------------------------------------------


def nvfp4(weight: torch.Tensor) -> Tensors:
    """A layer as comfy-kitchen stores it."""
    scale = weight.abs().amax() / (448 * 6)
    codes, blocks = kitchen.quantize_nvfp4(weight, scale, pad_16x=True)
    return {"weight": codes, "weight_scale": blocks, "weight_scale_2": scale}


def nvfp4_values(stored: Tensors) -> torch.Tensor:
    return kitchen.dequantize_nvfp4(
        stored["weight"],
        stored["weight_scale_2"],
        stored["weight_scale"],
        output_type=torch.float32,
    )


def test_dequantize_reads_nvfp4_with_block_scales_as_bytes(tmp_path: Path) -> None:
    stored = nvfp4(make.weight(192, 256))
    expected = nvfp4_values(stored)
    stored["weight_scale"] = stored["weight_scale"].view(torch.uint8)
    stored["comfy_quant"] = marker(format="nvfp4", group_size=16)
    source = opened(tmp_path / "q.safetensors", layer(stored))
    assert make.same(expected, written(tmp_path, source)[f"{LAYER}.weight"])


@pytest.mark.parametrize("told", ["orig_shape", "bias", "nothing"])
def test_dequantize_crops_padding_where_something_tells_of_it(tmp_path: Path, told: str) -> None:
    stored = nvfp4(make.weight(183, 250))
    expected = nvfp4_values(stored)
    settings: dict[str, Any] = {"format": "nvfp4"}
    if told == "orig_shape":
        settings["orig_shape"] = [183, 250]
    if told == "bias":
        stored["bias"] = make.weight(183)
    stored["comfy_quant"] = marker(**settings)
    source = opened(tmp_path / "q.safetensors", layer(stored))
    shape = {"orig_shape": (183, 250), "bias": (183, 256), "nothing": (192, 256)}[told]
    found = written(tmp_path, source)[f"{LAYER}.weight"]
    assert make.same(expected[: shape[0], : shape[1]].contiguous(), found)


def test_dequantize_folds_the_smoothing_of_activations_into_the_weight(tmp_path: Path) -> None:
    """`pre_quant_scale` multiplies what comes into the layer, so that y = (x s) W^T = x (W s)^T."""
    smoothing = make.weight(250, seed="smoothing").abs() + 0.5
    stored = nvfp4(make.weight(192, 250))
    expected = nvfp4_values(stored)[:, :250] * smoothing
    stored |= {"pre_quant_scale": smoothing, "comfy_quant": marker(format="nvfp4")}
    source = opened(tmp_path / "q.safetensors", layer(stored))
    found = written(tmp_path, source)
    assert list(found) == [f"{LAYER}.weight"]
    assert make.same(expected, found[f"{LAYER}.weight"])
    x = make.weight(3, 250, seed="x")
    unfolded = nvfp4_values(stored)[:, :250]
    assert torch.allclose((x * smoothing) @ unfolded.T, x @ found[f"{LAYER}.weight"].T, atol=1e-5)


@pytest.mark.parametrize("label", ["mxfp8", "hybrid_mxfp8"])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_dequantize_reads_mxfp8_and_its_hybrid(tmp_path: Path, label: str, as_bytes: bool) -> None:
    codes, scale = kitchen.quantize_mxfp8(make.weight(192, 256), pad_32x=True)
    expected = kitchen.dequantize_mxfp8(codes, scale, output_type=torch.float32)
    scale = scale.view(torch.uint8 if as_bytes else torch.float8_e8m0fnu)
    stored = {"weight": codes, "weight_scale": scale, "comfy_quant": marker(format=label)}
    if label != "mxfp8":
        stored["weight_scalar"] = TENSOR
    source = opened(tmp_path / "q.safetensors", layer(stored))
    assert describe(source) == "1 layer: 1 mxfp8"
    found = written(tmp_path, source)
    assert list(found) == [f"{LAYER}.weight"]
    assert make.same(expected, found[f"{LAYER}.weight"])


def test_dequantize_decodes_stacked_experts_one_by_one(tmp_path: Path) -> None:
    weights = [make.weight(96, 64, seed=i) for i in range(5)]
    singles = [kitchen.quantize_int8_rowwise(weight) for weight in weights]
    stored = {
        "weight": torch.stack([codes for codes, _ in singles]),
        "weight_scale": torch.stack([scale for _, scale in singles]),
        "comfy_quant": marker(format="int8_tensorwise", num_experts=5),
    }
    expected = torch.stack([codes * scale for codes, scale in singles])
    source = opened(tmp_path / "q.safetensors", layer(stored, "blocks.0.experts.up"))
    assert make.same(expected, written(tmp_path, source)["blocks.0.experts.up.weight"])


def test_dequantize_decodes_experts_with_a_scale_each(tmp_path: Path) -> None:
    codes = torch.stack([E4M3, E4M3.flip(0)])
    scales = torch.tensor([0.5, 3.0])
    stored = {
        "weight": codes,
        "weight_scale": scales,
        "comfy_quant": marker(format="float8_e4m3fn"),
    }
    source = opened(tmp_path / "q.safetensors", layer(stored, "experts.up"))
    expected = codes.float() * scales[:, None, None]
    assert make.same(expected, written(tmp_path, source)["experts.up.weight"])


# Every format of the catalogue -------------------------------------------------------------------


@pytest.mark.parametrize("name", STORING)
@pytest.mark.parametrize("shape", [(384, 512), (192, 256), (129, 256)])
def test_dequantize_gives_what_the_format_decodes(
    tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    """Segment by segment as in one go, from a file as from the stage that makes it."""
    base = opened(tmp_path / "b.safetensors", {f"{LAYER}.weight": make.weight(*shape)})
    try:
        model = cq_quant.quantize(base, format=name, only=[LAYER], allow_custom_loader=True)
    except PlanError as error:
        assert error.code == "plan.nothing"  # the format refuses the shape
        return
    kept = _kept(model, tmp_path)
    expected = decode(catalog.load("formats", name), *by_local_name(kept))
    for source in (model, kept):
        assert describe(source) == f"1 layer: 1 {name}"
        assert make.same(expected.contiguous(), written(tmp_path, source)[f"{LAYER}.weight"])
    assert expected.shape == shape


@pytest.mark.parametrize("name", STORING)
def test_dequantize_decodes_segments_as_the_whole(tmp_path: Path, name: str) -> None:
    """A layer of several pieces, and pieces that come in heights that no format can decode."""
    plug = catalog.load("formats", name)
    refused = plug.refuse(TensorSpec("F32", (900, 4096)), plug.scalings[0], None)
    weight = make.weight(1024 if refused else 900, 4096)
    assert len(list(cuts(spec_of(weight)))) > 3
    base = opened(tmp_path / "b.safetensors", {f"{LAYER}.weight": weight})
    model = cq_quant.quantize(base, format=name, only=[LAYER], allow_custom_loader=True)
    source = _kept(model, tmp_path)
    expected = decode(plug, *by_local_name(source))
    tensors = source.read_many(source.specs)
    ragged = dataclasses.replace(
        source, parts=tuple(_ragged(part, tensors) for part in source.parts)
    )
    for checkpoint in (source, ragged):
        plain = Dequantize().apply(checkpoint)
        spec = plain.specs[f"{LAYER}.weight"]
        pieces = list(plain.pieces(f"{LAYER}.weight"))
        assert [(p.start, p.start + p.tensor.shape[0]) for p in pieces] == list(cuts(spec))
        assert torch.equal(expected, torch.cat([piece.tensor for piece in pieces]))


def _ragged(part: Part, tensors: Tensors) -> Part:
    if not part.name.endswith(".weight"):
        return part
    tensor = tensors[part.name]
    edges = [0, 1, 130, 131, 500, tensor.shape[0]]

    def produce() -> Iterator[Piece]:
        for start, stop in itertools.pairwise(edges):
            yield Piece(part.name, start, tensor[start:stop])

    return dataclasses.replace(part, produce=produce, extent=None)


@pytest.mark.parametrize("name", [n for n in STORING if catalog.load("formats", n).experts])
def test_dequantize_gives_stacked_experts_of_every_format(tmp_path: Path, name: str) -> None:
    weight = make.weight(3, 192, 256)
    base = opened(tmp_path / "b.safetensors", {"blocks.0.experts.up.weight": weight})
    model = cq_quant.quantize(base, format=name, only=["*up"], allow_custom_loader=True)
    for source in (model, _kept(model, tmp_path)):
        found = written(tmp_path, source)["blocks.0.experts.up.weight"]
        assert found.shape == weight.shape
        for mine, true in zip(found, weight, strict=True):
            assert float((mine - true).norm() / true.norm()) < 0.2


def _kept(model: Checkpoint, directory: Path) -> Checkpoint:
    cq.write(model, directory / "kept.safetensors", force=True)
    return cq.open(directory / "kept.safetensors")


# What comes out ----------------------------------------------------------------------------------


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    base = opened(tmp_path / "base.safetensors", make.model(dim=128), {"kept": "yes"})
    model = cq_quant.quantize(base, optimizer="rtn", save_quant_metadata=True)
    return cq.write(model, tmp_path / "quantized.safetensors").path


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "source"])
def test_dequantize_casts_to_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    stored, expected, _, _ = VARIANTS["float8"]
    other = VARIANTS["float8 E5M2"]
    source = opened(tmp_path / "q.safetensors", {**layer(stored), **layer(other[0], "other")})
    found = written(tmp_path, source, dtype)
    asked = {"F32": torch.float32, "BF16": torch.bfloat16}.get(dtype, torch.float16)
    assert make.same(expected.to(asked), found[f"{LAYER}.weight"])
    if dtype == "source":  # the other layer's marker says nothing
        asked = torch.bfloat16
    assert make.same(other[1].to(asked), found["other.weight"])


def test_dequantize_keeps_everything_else(quantized: Path, tmp_path: Path) -> None:
    source = cq.open(quantized)
    plain = Dequantize().apply(source)
    base = cq.open(tmp_path / "base.safetensors")
    assert {name: spec.shape for name, spec in base.specs.items()} == {
        name: spec.shape for name, spec in plain.specs.items()
    }
    assert plain.metadata["kept"] == "yes"
    assert comfy.HEADER_KEY not in plain.metadata
    assert comfy.find_quantized(plain) == []
    for name in base.specs:
        if name.removesuffix(".weight") not in make.quantized_names():
            assert plain.part(name) is source.part(name)
            assert make.same(base.read(name), plain.read(name))


def test_dequantize_notes_what_becomes_of_each_layer(quantized: Path) -> None:
    notes = Dequantize(dtype="BF16").apply(cq.open(quantized)).notes
    assert sorted(make.quantized_names()) == sorted(note["layer"] for note in notes)
    first = next(note for note in notes if note["layer"] == "blocks.0.attn.qkv")
    assert (first["shape"], first["dtype"], first["format"]) == (
        [384, 128],
        "BF16",
        "int8_tensorwise",
    )
    assert (first["action"], first["evidence"]) == ("dequantize", "header")
    marker_nbytes = len(b'{"format": "int8_tensorwise"}')
    assert first["nbytes"] == 384 * 128 + 384 * 4 + marker_nbytes
    assert first["nbytes_after"] == 384 * 128 * 2
    json.dumps(notes)


def test_dequantize_plans_without_reading_a_weight(quantized: Path) -> None:
    source, runs = cq.open(quantized), []

    def counted(part: Part) -> Part:
        def produce() -> Iterator[Piece]:
            runs.append(part.name)
            yield from part.produce()

        return dataclasses.replace(part, produce=produce)

    watched = dataclasses.replace(source, parts=tuple(map(counted, source.parts)))
    plain = Dequantize().apply(watched)
    assert describe(watched) == "8 layers: 8 int8_tensorwise"
    assert runs == []
    plain.read("blocks.0.attn.qkv.weight")
    assert sorted(runs) == ["blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight_scale"]


def test_dequantize_plans_without_torch(quantized: Path) -> None:
    code = (
        "import sys, cq\n"
        "from cq.core.dequantize import Dequantize\n"
        "from cq.core.stored import describe\n"
        "source = cq.open(sys.argv[1])\n"
        "plain = Dequantize().apply(source)\n"
        "assert describe(source) == '8 layers: 8 int8_tensorwise'\n"
        "assert len(plain.parts) and plain.nbytes > source.nbytes\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, quantized], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_dequantize_produces_a_deferred_layer_once(tmp_path: Path) -> None:
    """Its part makes codes and scales together; the codes wait for the scales."""
    base = opened(tmp_path / "base.safetensors", make.model(blocks=1, dim=128))
    model = cq_quant.quantize(base, optimizer="rtn")
    runs: list[str] = []

    def counted(part: Part) -> Part:
        def produce() -> Iterator[Piece]:
            runs.append(part.name)
            yield from part.produce()

        return dataclasses.replace(part, produce=produce)

    parts = tuple(counted(part) for part in model.parts)
    plain = Dequantize().apply(dataclasses.replace(model, parts=parts))
    plain.read("blocks.0.mlp.0.weight")
    assert runs == ["blocks.0.mlp.0.weight"]


def test_dequantize_is_the_same_fused_as_through_a_file(tmp_path: Path) -> None:
    """Also through a manifest, which names the stage, and also in the record in the header."""
    base = opened(tmp_path / "base.safetensors", make.model(dim=128))
    model = cq_quant.quantize(base, format="int8_tensorwise")
    fused = Dequantize(dtype="BF16").apply(model)
    line = json.dumps(fused.manifest()).encode() + b"\n"
    again = manifest.load(line, where="stdin")
    assert again.stages[-1] == Dequantize(dtype="BF16")
    staged = Dequantize(dtype="BF16").apply(_kept(model, tmp_path))
    files = [
        cq.write(checkpoint, tmp_path / f"{i}.safetensors").path.read_bytes()
        for i, checkpoint in enumerate((fused, again, staged))
    ]
    assert files[0] == files[1] == files[2]


@given(dtype=st.sampled_from(["F32", "BF16", "F16", "source"]))
def test_dequantize_is_what_its_arguments_say(dtype: str) -> None:
    stage = Dequantize(dtype=dtype)
    assert Dequantize.from_arguments(stage.arguments()) == stage
    assert catalog.load("stages", "dequantize") is Dequantize


# Quantizing again --------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_requantizing_gives_the_same_integers(tmp_path: Path, scaling: str) -> None:
    """The largest code is 127 wherever the scale came from it, so scales come back as well, but for
    a bit: 127 s / 127 may round."""
    base = opened(tmp_path / "base.safetensors", make.model(dim=128))
    first = _kept(cq_quant.quantize(base, optimizer="rtn", scaling=scaling), tmp_path)
    again = cq_quant.quantize(Dequantize().apply(first), optimizer="rtn", scaling=scaling)
    assert first.specs == again.specs
    for name in first.specs:
        if name.endswith("weight_scale"):
            assert torch.allclose(first.read(name), again.read(name), rtol=1e-6, atol=0)
        else:
            assert make.same(first.read(name), again.read(name)), name


def test_requantizing_rotated_layers_gives_the_same_integers_but_for_ties(tmp_path: Path) -> None:
    """Rotating back and forth again sums in float32: 1 code in 10 000 may move, by one step."""
    base = opened(tmp_path / "base.safetensors", make.model(dim=256))
    first = _kept(cq_quant.quantize(base, optimizer="quip"), tmp_path)
    again = cq_quant.quantize(Dequantize().apply(first), optimizer="quip")
    for layer_name in make.quantized_names():
        one, two = (model.read(f"{layer_name}.weight").int() for model in (first, again))
        assert int((one - two).abs().max()) <= 1
        assert int((one != two).sum()) <= one.numel() // 10_000


@pytest.mark.parametrize("name", STORING)
def test_layers_that_are_stored_so_already_are_handed_on_unread(tmp_path: Path, name: str) -> None:
    """The same integers, scales and markers, in every format and scaling; what is asked for
    otherwise, or not quantized yet, is quantized."""
    base = opened(tmp_path / "base.safetensors", make.model(dim=256))
    plug = catalog.load("formats", name)
    words: dict[str, Any] = {"format": name, "allow_custom_loader": True}
    for scaling in plug.scalings:
        some = cq_quant.quantize(base, **words, scaling=scaling, only=["blocks.0.*"])
        first = _kept(some, tmp_path)
        same = cq_quant.quantize(
            first, **words, scaling=scaling, requantize=True, only=["blocks.0.*"]
        )
        assert all(same.part(tensor) is first.part(tensor) for tensor in first.specs)
        assert same.manifest() == first.manifest()
        assert {n["reason"] for n in same.notes if n["layer"].startswith("blocks.0.mlp")} == {
            "is stored so already"
        }
        more = cq_quant.quantize(first, **words, scaling=scaling, requantize=True)
        whole = cq_quant.quantize(base, **words, scaling=scaling)
        assert more.specs == whole.specs
        again = manifest.load(json.dumps(more.manifest()).encode(), where="-")
        assert make.same(again.read("blocks.1.mlp.0.weight"), more.read("blocks.1.mlp.0.weight"))
        assert more.part("blocks.0.mlp.0.weight") is first.part("blocks.0.mlp.0.weight")
        assert make.same(more.read("blocks.1.mlp.0.weight"), whole.read("blocks.1.mlp.0.weight"))
        other = "float8_e4m3fn" if name != "float8_e4m3fn" else "int8_tensorwise"
        changed = cq_quant.quantize(first, format=other, requantize=True)
        assert changed.read_bytes("blocks.0.mlp.0.comfy_quant") != first.read_bytes(
            "blocks.0.mlp.0.comfy_quant"
        )


def test_quantizing_a_quantized_checkpoint_says_what_it_holds(quantized: Path) -> None:
    with pytest.raises(PlanError, match="quantized already: 8 layers: 8 int8_tensorwise") as error:
        cq_quant.quantize(cq.open(quantized))
    assert error.value.code == "plan.already_quantized"


@pytest.mark.parametrize("variant", ["float8 by square", "comfy-quants, no format, rotated"])
def test_requantize_and_bf16_work_end_to_end(tmp_path: Path, variant: str) -> None:
    stored, expected, _, _ = VARIANTS[variant]
    norm = make.weight(64, dtype="F32")
    source = opened(tmp_path / "q.safetensors", {**layer(stored), "norm.scale": norm})
    better = cq_quant.quantize(source, optimizer="rtn", requantize=True)
    cq.write(better, tmp_path / "better.safetensors")
    reference = opened(tmp_path / "ref.safetensors", {f"{LAYER}.weight": expected})
    report = verify(cq.open(tmp_path / "better.safetensors"), against=reference, min_sqnr=30)
    assert report.passed, report.findings
    cq.write(cq_quant.quantize(source, format="bf16"), tmp_path / "plain.safetensors")
    found = make.load(tmp_path / "plain.safetensors")
    assert sorted(found) == [f"{LAYER}.weight", "norm.scale"]
    assert make.same(expected.bfloat16(), found[f"{LAYER}.weight"])
    assert make.same(norm.bfloat16(), found["norm.scale"])


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORING)
def test_dequantize_promises_memory_for_segments_not_for_the_weight(
    tmp_path: Path, name: str
) -> None:
    """From a file; what a stage produces together with its scales must be held."""
    peaks = []
    for rows in (2048, 8192):
        weight = torch.zeros(1).expand(rows, 4096)
        part = dataclasses.replace(
            make.part({}), tensors={f"{LAYER}.weight": spec_of(weight)}, produce=lambda: iter(())
        )
        model = cq_quant.quantize(
            make.checkpoint(part), format=name, only=[LAYER], allow_custom_loader=True
        )
        parts = [
            dataclasses.replace(quantized, tensors={own: spec})
            for quantized in model.parts
            for own, spec in quantized.tensors.items()
        ]
        source = make.checkpoint(*(_as_in_a_file(part) for part in parts))
        plain = Dequantize().apply(source)
        scales = sum(s.nbytes for n, s in source.specs.items() if not n.endswith(".weight"))
        peaks.append(plain.parts[0].nbytes_peak - 3 * scales)
    assert peaks[1] <= peaks[0] * 1.1
    assert peaks[0] < 80e6


def _as_in_a_file(part: Part) -> Part:
    spec = part.tensors[part.name]
    rows = next(cuts(spec))[1] if spec.shape else 1
    return dataclasses.replace(part, nbytes_peak=spec.nbytes * rows // max(1, *spec.shape[:1], 1))


# What cannot be read -----------------------------------------------------------------------------

INT8 = marker(format="int8_tensorwise")

BAD: dict[str, tuple[Tensors, str]] = {
    "unknown format": (
        {"weight": CODES, "weight_scale": ROW, "comfy_quant": marker(format="svdquant_w4a4")},
        "`svdquant_w4a4`, which this cq does not know",
    ),
    "bitsandbytes": (
        {"weight": CODES.view(torch.uint8), "comfy_quant": marker(format="bnb_nf4")},
        "`bnb_nf4`, which this cq does not know",
    ),
    "format not a text": (
        {"weight": CODES, "weight_scale": ROW, "comfy_quant": marker(format=[1])},
        r"`\[1\]`, which this cq does not know",
    ),
    "a plain dtype as a format": (
        {"weight": CODES, "weight_scale": ROW, "comfy_quant": marker(format="bf16")},
        "its format is `bf16`, but its codes are I8",
    ),
    "bytes without a marker": (
        {"weight": CODES.view(torch.uint8), "weight_scale": ROW},
        "U8 codes beside a scale in F32",
    ),
    "bytes without anything": ({"weight": CODES.view(torch.uint8)}, "it has U8 codes, and neither"),
    "int8 without anything": ({"weight": CODES}, "it has I8 codes, and neither a scale"),
    "block exponents in the order of rows without a marker": (
        {"weight": E4M3, "weight_scale": torch.ones(384, 12, dtype=torch.uint8)},
        "F8_E4M3 codes beside a scale in U8",
    ),
    "int8 without a marker": (
        {"weight": CODES, "weight_scale": ROW},
        "nothing tells whether its `int8_tensorwise` codes are rotated \\(say it",
    ),
    "int8 with an empty marker": (
        {"weight": CODES, "weight_scale": TENSOR, "comfy_quant": marker()},
        "nothing tells whether its `int8_tensorwise` codes are rotated \\(say it",
    ),
    "int8 or packed int4": (
        {"weight": CODES, "weight_scale": ROW[:, 0]},
        "may be `convrot_w4a4` of K=512 or `int8_tensorwise` of K=256, and nothing tells which",
    ),
    "int8 or packed int4, with a marker that does not tell": (
        {
            "weight": CODES,
            "weight_scale": ROW[:, 0],
            "comfy_quant": marker(full_precision_matrix_mult=True),
        },
        "may be `convrot_w4a4` of K=512 or `int8_tensorwise` of K=256, and nothing tells which",
    ),
    "no scale": ({"weight": CODES, "comfy_quant": INT8}, "there is no `weight_scale`"),
    "scale that does not fit": (
        {"weight": CODES, "weight_scale": torch.ones(COLUMNS), "comfy_quant": INT8},
        r"a scale of shape \[256\] does not fit codes of shape \[384, 256\]",
    ),
    "blocks that are not square": (
        {"weight": CODES, "weight_scale": torch.ones(3, 4), "comfy_quant": INT8},
        r"a scale of shape \[3, 4\] does not fit",
    ),
    "swizzled scales of another size": (
        {**nvfp4(make.weight(64, 64)), "comfy_quant": marker(format="nvfp4")}
        | {"weight_scale": torch.ones(128, 8, dtype=torch.uint8)},
        r"scales of shape \[128, 8\] do not fit",
    ),
    "smoothing that does not fit": (
        {
            **nvfp4(make.weight(64, 64)),
            "pre_quant_scale": torch.ones(100),
            "comfy_quant": marker(format="nvfp4"),
        },
        r"`pre_quant_scale` of shape \[100\] does not fit K=64",
    ),
    "floats under a marker": (
        {"weight": FLOATS, "weight_scale": ROW, "comfy_quant": INT8},
        "its weight is F32, which is not quantized, beside `weight_scale`",
    ),
    "floats as float8": (
        {"weight": CODES.short(), "weight_scale": ROW, "comfy_quant": INT8},
        "its format is `int8_tensorwise`, but its codes are I16",
    ),
    "float8 as int8": (
        {"weight": E4M3, "weight_scale": ROW, "comfy_quant": INT8},
        "its format is `int8_tensorwise`, but its codes are F8_E4M3",
    ),
    "no weight": ({"weight_scale": ROW, "comfy_quant": INT8}, "it has a marker but no `weight`"),
    "codes of other tools": ({"qweight": torch.ones(8, 8, dtype=torch.int32)}, "GPTQ, AWQ or"),
    "a random basis": (
        {
            "weight": CODES,
            "weight_scale": ROW,
            "hadamard_quip": torch.tensor(1, dtype=torch.int8),
            "comfy_quant": INT8,
        },
        "a randomly rotated basis",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_dequantize_refuses_what_it_cannot_read(tmp_path: Path, case: str) -> None:
    stored, told = BAD[case]
    path = tmp_path / "strange.safetensors"
    source = opened(path, layer(stored))
    with pytest.raises(InputError, match=told) as error:
        Dequantize().apply(source)
    assert f"layer `{LAYER}` of `{path}` cannot be read: " in error.value.message
    assert error.value.where == LAYER
    assert error.value.hint
    assert describe(source).startswith("1 layer: 1 ")
    assert [found.layer for found in comfy.find_quantized(source)] == [LAYER]


def test_dequantize_refuses_a_marker_that_is_not_json(tmp_path: Path) -> None:
    stored = {"weight": CODES, "weight_scale": ROW, "comfy_quant": torch.ones(3).byte()}
    source = opened(tmp_path / "q.safetensors", layer(stored))
    with pytest.raises(InputError, match=f"the marker `{LAYER}.comfy_quant` is not JSON"):
        Dequantize().apply(source)
    assert describe(source) == "1 layers"


def test_dequantize_does_not_guess_which_of_two_models_the_header_means(tmp_path: Path) -> None:
    tensors = {
        **layer({"weight": CODES, "weight_scale": ROW}, f"net.{LAYER}"),
        **layer({"weight": CODES, "weight_scale": ROW}, f"transformer.{LAYER}"),
    }
    settings = header({LAYER: {"format": "int8_tensorwise"}})
    with pytest.raises(InputError, match=r"which may be `net\..*` or `transformer\."):
        Dequantize().apply(opened(tmp_path / "q.safetensors", tensors, settings))


def test_dequantize_refuses_a_plain_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no quantized layer"):
        Dequantize().apply(opened(tmp_path / "b.safetensors", make.model()))


def test_dequantize_ignores_header_entries_of_layers_that_are_not_there(tmp_path: Path) -> None:
    tensors = {"a.weight": make.weight(8, 8)}
    source = opened(tmp_path / "b.safetensors", tensors, header({"b": {"format": "nvfp4"}}))
    plain = Dequantize().apply(source)
    assert plain.specs == source.specs
    assert plain.metadata == {}


def test_dequantize_refuses_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    stored = {"weight": CODES, "weight_scale": ROW.clone(), "comfy_quant": INT8}
    stored["weight_scale"][7] = 1e4
    source = opened(tmp_path / "q.safetensors", layer(stored))
    expected = int((CODES[7].float().abs() * 1e4 >= 65520).sum())
    with pytest.raises(InputError, match=f"^{expected} weights of `{LAYER}.weight` of") as error:
        written(tmp_path, source, "F16")
    assert error.value.code == "input.overflow"
    assert torch.isfinite(written(tmp_path, source, "BF16")[f"{LAYER}.weight"]).all()


def test_dequantize_passes_on_what_was_not_finite_before(tmp_path: Path) -> None:
    weight = E4M3.clone()
    weight.view(torch.uint8)[3, 5] = 0x7F
    found = written(tmp_path, opened(tmp_path / "q.safetensors", {"a.weight": weight}), "F16")
    assert torch.isnan(found["a.weight"]).nonzero().tolist() == [[3, 5]]


def test_dequantize_takes_only_the_dtypes_it_knows() -> None:
    with pytest.raises(UsageError, match="`I8`"):
        Dequantize(dtype="I8")
    for arguments in ({"dtype": "I8"}, {"dtype": None}, {"dtypes": "F32"}):
        with pytest.raises(InputError):
            Dequantize.from_arguments(arguments)


def test_format_of_knows_every_name_of_every_format() -> None:
    for name in STORING:
        for word in (name, *catalog.load("formats", name).aliases):
            assert format_of(word) == name
    assert format_of("hybrid_mxfp8") == "mxfp8"
    assert [format_of(word) for word in ("svdquant_w4a4", "", None, 7)] == [None] * 4


def test_find_quantized_leaves_masks_alone(tmp_path: Path) -> None:
    source = opened(tmp_path / "m.safetensors", {"mask.weight": torch.ones(3, 3).bool()})
    assert comfy.find_quantized(source) == []


def test_rotation_groups_of_the_tests_are_real() -> None:
    """The rotated variants would pass with any rotation if it were the identity."""
    assert not torch.allclose(CODES * ROW, rotated_back(64))
    assert rotation.is_group(64)
