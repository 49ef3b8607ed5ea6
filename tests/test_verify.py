"""Sound files verify, each fault gives its finding and no other, and the numbers are those of an
independent formula and of comfy-kitchen's own decoding."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
import torch
from comfy_kitchen.backends.eager.quantization import (
    dequantize_int8_convrot_weight,
    dequantize_int8_simple,
    quantize_int8_convrot_weight,
    quantize_int8_rowwise,
    quantize_int8_tensorwise,
)
from hypothesis import given
from hypothesis import strategies as st

import cq
from cq.core import catalog
from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.dtypes import spec_of
from cq.core.errors import PlanError, ResourceError, UsageError
from cq.core.source import cuts
from cq_analyze import Report, verify
from cq_analyze.metrics import pooled, sums
from cq_quant import quantize

Tensors = dict[str, torch.Tensor]

ROW, TENSOR, ROTATED = "blocks.0.mlp.0", "blocks.0.attn.proj", "blocks.2.mlp.2"
GROUPS = (256, 64, 16)


def marker(**settings: Any) -> torch.Tensor:
    return raw_marker(json.dumps(settings).encode())


def raw_marker(raw: bytes) -> torch.Tensor:
    return torch.tensor(list(raw), dtype=torch.uint8)


def int8(group: int | None = None) -> torch.Tensor:
    settings: dict[str, Any] = {"format": "int8_tensorwise"}
    return marker(
        **settings, **({} if group is None else {"convrot": True, "convrot_groupsize": group})
    )


def store(weight: torch.Tensor, group: int | None, scaling: str = "row") -> Tensors:
    """A layer as comfy-kitchen's own quantizers store it."""
    if group is not None:
        codes, scale = quantize_int8_convrot_weight(weight, group)
    elif scaling == "row":
        codes, scale = quantize_int8_rowwise(weight)
    else:
        codes, scale = quantize_int8_tensorwise(weight)
    return {"weight": codes, "weight_scale": scale.float(), "comfy_quant": int8(group)}


def reference() -> Tensors:
    """Layers of each scaling and rotation, with biases, and tensors that stay as they are."""
    tensors = {
        "img_in.weight": make.weight(32, 16, dtype="BF16", seed="img_in"),
        f"{ROW}.weight": make.weight(96, 64, dtype="BF16", seed="row"),
        f"{ROW}.bias": make.weight(96, dtype="BF16", seed="row bias"),
        f"{TENSOR}.weight": make.weight(64, 64, dtype="BF16", seed="tensor"),
        "steps": torch.arange(7),
        "blocks.0.norm.weight": make.weight(64, dtype="F32", seed="norm"),
    }
    for i, group in enumerate(GROUPS):
        tensors[f"blocks.{i}.mlp.2.weight"] = make.weight(48, 256, dtype="BF16", seed=group)
    return tensors


def quantized() -> Tensors:
    """What the quantized form of `reference` should be."""
    tensors = reference()
    layers: dict[str, tuple[int | None, str]] = {ROW: (None, "row"), TENSOR: (None, "tensor")}
    layers |= {f"blocks.{i}.mlp.2": (group, "row") for i, group in enumerate(GROUPS)}
    for layer, (group, scaling) in layers.items():
        stored = store(tensors.pop(f"{layer}.weight").float(), group, scaling)
        tensors |= {f"{layer}.{name}": tensor for name, tensor in stored.items()}
    return tensors


def opened(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Checkpoint:
    return cq.open(make.save(path, tensors, metadata))


@pytest.fixture
def good(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "quantized.safetensors", quantized())


@pytest.fixture
def original(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "original.safetensors", reference())


def names(report: Report) -> list[tuple[str, str | None]]:
    return [(found.name, found.layer) for found in report.findings]


# Sound files


def test_verify_passes_a_sound_file(good: Checkpoint) -> None:
    report = verify(good)
    assert report.passed
    assert report.findings == ()
    assert report.notes == ()
    assert report.formats == {"int8_tensorwise": 5}
    assert [layer.layer for layer in report.layers] == [
        TENSOR,
        ROW,
        "blocks.0.mlp.2",
        "blocks.1.mlp.2",
        "blocks.2.mlp.2",
    ]


def test_verify_passes_a_sound_file_against_its_original(
    good: Checkpoint, original: Checkpoint
) -> None:
    report = verify(good, against=original)
    assert report.passed, report.findings
    assert report.fidelity is not None and report.fidelity.min_sqnr is not None
    assert report.fidelity.min_sqnr > 20
    assert report.unquantized is not None
    assert (report.unquantized.same, report.unquantized.changed) == (4, ())
    assert (report.unquantized.only_here, report.unquantized.only_in_reference) == (0, 0)


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_verify_passes_what_cq_quant_makes(tmp_path: Path, scaling: str) -> None:
    base = opened(tmp_path / "base.safetensors", make.model(dim=64))
    model = quantize(
        base, scaling=scaling, optimizer="rtn", rotate="auto", save_quant_metadata=True
    )
    deferred = verify(model, against=base, min_sqnr=20)
    assert deferred.passed, deferred.findings
    cq.write(model, tmp_path / "out.safetensors")
    written = verify(cq.open(tmp_path / "out.safetensors"), against=base, min_sqnr=20)
    assert written.passed
    assert deferred.layers == written.layers
    assert deferred.fidelity is not None and written.fidelity is not None
    assert deferred.fidelity.to_dict() == written.fidelity.to_dict()


def test_verify_computes_a_deferred_layer_once(tmp_path: Path) -> None:
    base = opened(tmp_path / "base.safetensors", make.model(blocks=1, prefix="model."))
    model = quantize(base, optimizer="rtn")
    runs: list[str] = []
    parts = tuple(_counted(part, runs) for part in model.parts)
    report = verify(Checkpoint(parts=parts, metadata={}, sources=()), against=base)
    assert report.passed
    assert sorted(runs) == sorted(set(runs))


def _counted(part: Part, runs: list[str]) -> Part:
    def produce() -> Iterator[Piece]:
        if not part.name.endswith(".comfy_quant"):
            runs.append(part.name)
        yield from part.produce()

    return dataclasses.replace(part, produce=produce, extent=None)


def test_verify_notes_that_a_plain_checkpoint_is_not_quantized(original: Checkpoint) -> None:
    report = verify(original)
    assert report.passed
    assert report.layers == ()
    assert report.notes == ("the checkpoint is not quantized: no layer has a `comfy_quant` marker",)


def test_verify_reads_markers_from_the_header_alone(tmp_path: Path) -> None:
    tensors = {k: v for k, v in quantized().items() if not k.endswith(".comfy_quant")}
    markers = {
        k.removesuffix(".comfy_quant"): json.loads(v.numpy().tobytes())
        for k, v in quantized().items()
        if k.endswith(".comfy_quant")
    }
    checkpoint = opened(tmp_path / "m.safetensors", tensors, header(markers))
    report = verify(checkpoint, against=opened(tmp_path / "r.safetensors", reference()))
    assert report.passed, report.findings
    assert report.fidelity is not None and len(report.fidelity.layers) == 5


def test_verify_notes_plain_float8_weights(tmp_path: Path) -> None:
    tensors = {"blocks.0.attn.weight": make.weight(32, 32, dtype="F8_E4M3")}
    report = verify(opened(tmp_path / "m.safetensors", tensors))
    assert report.passed
    assert "1 weights are plain 8-bit floats without scales, read at face value" in report.notes


def test_verify_knows_the_old_scaled_fp8_form(tmp_path: Path) -> None:
    scaled = {
        "a.weight": make.weight(32, 32, dtype="F8_E4M3"),
        "a.scale_weight": torch.tensor(0.5),
        "b.weight": make.weight(32, 32, dtype="F8_E5M2"),
        "b.scale_weight": torch.tensor(0.5),
    }
    old = {**scaled, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    report = verify(opened(tmp_path / "old.safetensors", old))
    assert names(report) == [("legacy.e5m2", "b")]
    assert "old `scaled_fp8` form" in report.notes[0]
    report = verify(opened(tmp_path / "unmarked.safetensors", scaled))
    assert names(report) == [("marker.missing", "a"), ("marker.missing", "b")]


@given(
    layers=st.lists(
        st.tuples(
            st.integers(1, 70),
            st.integers(1, 6),
            st.sampled_from([None, None, 4, 16, 64]),
            st.booleans(),
            st.floats(1e-20, 1e20),
        ),
        min_size=1,
        max_size=3,
    ),
    header_form=st.booleans(),
)
def test_verify_finds_nothing_in_any_sound_file(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[tuple[int, int, int | None, bool, float]],
    header_form: bool,
) -> None:
    tensors: Tensors = {}
    for i, (rows, columns, group, by_row, size) in enumerate(layers):
        rng = make.generator(rows, columns, group, size)
        shape = (rows, columns * (group or 7))
        codes = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)
        scale = torch.rand((rows, 1) if by_row else (), generator=rng) * size + size
        layer = {"weight": codes, "weight_scale": scale, "comfy_quant": int8(group)}
        tensors |= {f"l.{i}.{name}": tensor for name, tensor in layer.items()}
    markers = {
        k.removesuffix(".comfy_quant"): json.loads(v.numpy().tobytes())
        for k, v in tensors.items()
        if k.endswith(".comfy_quant")
    }
    path = tmp_path_factory.mktemp("sound") / "m.safetensors"
    report = verify(opened(path, tensors, header(markers) if header_form else None), workers=1)
    assert report.passed, report.findings
    assert len(report.layers) == len(layers)


# Every format


STORING = [name for name in catalog.names("formats") if not catalog.load("formats", name).casts]
EXPERTS = "blocks.0.experts.up"


def stored_as(
    directory: Path, format_name: str, weight: torch.Tensor, layer: str = ROW
) -> tuple[Tensors, Checkpoint]:
    """A file's tensors with `layer` in a format, and what it was made from."""
    bias = make.weight(*weight.shape[:-1], dtype="BF16", seed="bias")
    base = opened(
        directory / "base.safetensors", {f"{layer}.weight": weight, f"{layer}.bias": bias}
    )
    model = quantize(base, format=format_name, only=[layer], allow_custom_loader=True)
    return model.read_many(model.specs), base


@pytest.mark.parametrize("format_name", STORING)
@pytest.mark.parametrize("shape", [(192, 256), (183, 250), (1, 768), (900, 4096)])
def test_verify_passes_every_format(
    tmp_path: Path, format_name: str, shape: tuple[int, int]
) -> None:
    """Padded ones too: the reference knows the shape."""
    try:
        tensors, base = stored_as(tmp_path, format_name, make.weight(*shape))
    except PlanError as error:
        assert error.code == "plan.nothing"  # the format refuses the shape
        return
    report = verify(opened(tmp_path / "m.safetensors", tensors), against=base, max_error=0.2)
    assert report.passed, report.findings
    assert report.formats == {format_name: 1}
    assert report.fidelity is not None and report.fidelity.layers[0].fidelity is not None
    assert report.fidelity.layers[0].fidelity.count == shape[0] * shape[1]


@pytest.mark.parametrize("format_name", STORING)
def test_verify_finds_nothing_in_layers_of_zeros(tmp_path: Path, format_name: str) -> None:
    """Nor in rows and blocks of zeros, whose scales have nothing to say."""
    weight = make.weight(256, 512)
    weight[:128] = 0
    weight[:, 256:384] = 0
    for base_weight in (weight, torch.zeros(256, 512)):
        tensors, base = stored_as(tmp_path, format_name, base_weight)
        report = verify(opened(tmp_path / "m.safetensors", tensors), against=base)
        assert report.passed, report.findings


@pytest.mark.parametrize("format_name", STORING)
def test_verify_passes_stacked_experts_of_every_format_that_has_them(
    tmp_path: Path, format_name: str
) -> None:
    if not catalog.load("formats", format_name).experts:
        with pytest.raises(PlanError, match="stacked experts"):
            stored_as(tmp_path, format_name, make.weight(3, 192, 256), EXPERTS)
        return
    tensors, base = stored_as(tmp_path, format_name, make.weight(3, 192, 256), EXPERTS)
    report = verify(opened(tmp_path / "m.safetensors", tensors), against=base, max_error=0.2)
    assert report.passed, report.findings
    assert report.fidelity is not None and len(report.fidelity.layers) == 1


@pytest.mark.parametrize("format_name", [n for n in STORING if catalog.load("formats", n).experts])
def test_verify_sees_experts_with_a_scale_too_few(tmp_path: Path, format_name: str) -> None:
    tensors, _ = stored_as(tmp_path, format_name, make.weight(3, 192, 256), EXPERTS)
    name = next(name for name in tensors if ".weight_s" in name)
    tensors[name] = tensors[name][:2].clone()
    report = verify(opened(tmp_path / "m.safetensors", tensors))
    assert names(report) == [("scale.shape", EXPERTS)]
    assert "not one for each of its 3 experts" in report.findings[0].sentence


@pytest.mark.parametrize("format_name", STORING)
def test_verify_names_the_comfyui_that_a_format_needs(tmp_path: Path, format_name: str) -> None:
    plug = catalog.load("formats", format_name)
    tensors, _ = stored_as(tmp_path, format_name, make.weight(256, 512))
    report = verify(opened(tmp_path / "m.safetensors", tensors), header_only=True)
    assert report.first_comfyui == plug.first_comfyui
    assert list(report.custom_loaders) == ([] if plug.first_comfyui else [format_name])
    told = [note for note in report.notes if "no released ComfyUI loads" in note]
    assert bool(told) == (plug.first_comfyui is None)
    assert report.passed


def test_verify_names_the_newest_comfyui_that_is_needed(tmp_path: Path) -> None:
    both = {**stored_as(tmp_path, "nvfp4", make.weight(64, 64))[0]}
    both |= stored_as(tmp_path, "mxfp8", make.weight(64, 64), TENSOR)[0]
    checkpoint = opened(tmp_path / "m.safetensors", both)
    assert verify(checkpoint, header_only=True).first_comfyui == "0.18.0"
    experts = stored_as(tmp_path, "nvfp4", make.weight(2, 64, 64), EXPERTS)[0]
    checkpoint = opened(tmp_path / "m.safetensors", experts)
    assert verify(checkpoint, header_only=True).first_comfyui == "0.23.0"
    both[f"{ROW}.pre_quant_scale"] = torch.ones(64)
    checkpoint = opened(tmp_path / "m.safetensors", both)
    assert verify(checkpoint, header_only=True).first_comfyui == "0.30.0"


def test_verify_folds_the_smoothing_of_activations(tmp_path: Path) -> None:
    """What the layer computes is what the reference's layer does."""
    smoothing = make.weight(64, seed="smoothing").abs() + 0.5
    weight = make.weight(64, 64)
    tensors, _ = stored_as(tmp_path, "nvfp4", weight / smoothing)
    tensors[f"{ROW}.pre_quant_scale"] = smoothing
    del tensors[f"{ROW}.bias"]
    base = opened(tmp_path / "b.safetensors", {f"{ROW}.weight": weight})
    report = verify(opened(tmp_path / "m.safetensors", tensors), against=base, max_error=0.15)
    assert report.passed, report.findings


# Formats where ComfyUI cannot take them


def renamed(tensors: Tensors, layer: str, other: str) -> Tensors:
    return {name.replace(layer, other): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("format_name", STORING)
def test_verify_sees_packed_layers_by_which_comfyui_tells_the_model(
    tmp_path: Path, format_name: str
) -> None:
    tensors, _ = stored_as(tmp_path, format_name, make.weight(256, 256))
    for layer in ("img_in", "model.diffusion_model.txt_in"):
        other = renamed(tensors, ROW, layer)
        report = verify(opened(tmp_path / "m.safetensors", other))
        keeps = catalog.load("formats", format_name).keeps_shape
        assert names(report) == ([] if keeps else [("detection.packed", layer)])


@pytest.mark.parametrize("format_name", STORING)
def test_verify_sees_embeddings_in_formats_of_linear_layers(
    tmp_path: Path, format_name: str
) -> None:
    tensors, _ = stored_as(tmp_path, format_name, make.weight(256, 256))
    other = renamed(tensors, ROW, "model.embed_tokens")
    report = verify(opened(tmp_path / "m.safetensors", other))
    takes = catalog.load("formats", format_name).embeddings
    assert names(report) == ([] if takes else [("embedding.format", "model.embed_tokens")])


def test_verify_sees_rotated_experts(tmp_path: Path) -> None:
    tensors, _ = stored_as(tmp_path, "int8_tensorwise", make.weight(2, 64, 64), EXPERTS)
    tensors[f"{EXPERTS}.comfy_quant"] = int8(64)
    report = verify(opened(tmp_path / "m.safetensors", tensors))
    assert names(report) == [("experts.rotation", EXPERTS)]


def test_verify_sees_experts_in_a_format_that_has_none(tmp_path: Path) -> None:
    format_name = next(n for n in STORING if not catalog.load("formats", n).experts)
    tensors, _ = stored_as(tmp_path, format_name, make.weight(256, 256))
    stacked = {
        name.replace(ROW, EXPERTS): tensor if name.endswith("quant") else torch.stack([tensor] * 2)
        for name, tensor in tensors.items()
    }
    report = verify(opened(tmp_path / "m.safetensors", stacked))
    assert names(report) == [("experts.format", EXPERTS)]


def test_verify_sees_the_names_of_diffusers(tmp_path: Path) -> None:
    tensors = quantized()
    tensors["x_embedder.weight"] = make.weight(8, 8)
    tensors["single_transformer_blocks.0.attn.to_q.weight"] = make.weight(8, 8)
    report = verify(opened(tmp_path / "m.safetensors", tensors))
    assert names(report) == [("names.diffusers", None)]
    plain = {**reference(), **{k: v for k, v in tensors.items() if k not in quantized()}}
    assert verify(opened(tmp_path / "p.safetensors", plain)).passed


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("int8_axiswise", "another tool's word for `int8_tensorwise`"),
        ("float8_e4m3fn_rowwise", "another tool's word for `float8_e4m3fn`"),
        ("hybrid_mxfp8", "another tool's word for `mxfp8`"),
    ],
)
def test_verify_says_how_to_read_what_only_other_tools_load(
    tmp_path: Path, label: str, told: str
) -> None:
    tensors = {**quantized(), f"{ROW}.comfy_quant": marker(format=label)}
    (found,) = verify(opened(tmp_path / "m.safetensors", tensors)).findings
    assert (found.name, found.layer) == ("marker.format", ROW)
    assert told in found.sentence
    assert "--migrate" in found.mend and "--requantize" in found.mend


def test_verify_sees_codes_of_other_tools(tmp_path: Path) -> None:
    tensors = {**quantized(), "a.qweight": torch.ones(8, 8, dtype=torch.int32)}
    report = verify(opened(tmp_path / "m.safetensors", tensors))
    assert names(report) == [("marker.missing", "a")]


# Faults: each gives its finding and no other


def header(layers: dict[str, Any]) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def _set(**changes: torch.Tensor | None) -> Callable[[Tensors], None]:
    """Replace tensors of the layer `ROW`; None removes one."""

    def change(tensors: Tensors) -> None:
        for name, tensor in changes.items():
            tensors.pop(f"{ROW}.{name}")
            if tensor is not None:
                tensors[f"{ROW}.{name}"] = tensor

    return change


def _scale(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[f"{ROW}.weight_scale"] = change(tensors[f"{ROW}.weight_scale"].clone())

    return apply


def _first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[3, 0] = value
        return scale

    return change


FAULTS: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "no marker": ("marker.missing", _set(comfy_quant=None)),
    "no marker, float weight": (
        "marker.missing",
        _set(comfy_quant=None, weight=make.weight(96, 64, dtype="BF16")),
    ),
    "marker not JSON": ("marker.invalid", _set(comfy_quant=raw_marker(b'{"format": '))),
    "marker with a NUL": (
        "marker.invalid",
        _set(comfy_quant=raw_marker(b'{"format": "int8_tensorwise"}\0')),
    ),
    "marker not an object": ("marker.invalid", _set(comfy_quant=raw_marker(b'["int8"]'))),
    "marker not text": ("marker.invalid", _set(comfy_quant=raw_marker(b"\xff\xfe"))),
    "marker nested deep": ("marker.invalid", _set(comfy_quant=raw_marker(b"[" * 9999))),
    "marker empty": ("marker.invalid", _set(comfy_quant=torch.zeros(0, dtype=torch.uint8))),
    "marker of integers": ("marker.invalid", _set(comfy_quant=int8().int())),
    "marker too big": (
        "marker.invalid",
        _set(comfy_quant=raw_marker(b'{"format": "int8_tensorwise"}' + b" " * (1 << 20))),
    ),
    "marker without format": (
        "marker.format",
        _set(comfy_quant=marker(convrot=True, per_row=True)),
    ),
    "unknown format": ("marker.format", _set(comfy_quant=marker(format="svdquant_w4a4"))),
    "another tool's word": ("marker.format", _set(comfy_quant=marker(format="int8_axiswise"))),
    "format not a string": ("marker.format", _set(comfy_quant=marker(format=["x"]))),
    "no scale": ("scale.missing", _set(weight_scale=None)),
    "half scale": ("scale.dtype", _scale(torch.Tensor.half)),
    "scale [N]": ("scale.shape", _scale(lambda s: s.reshape(-1))),
    "scale [1]": ("scale.shape", _scale(lambda s: s[0])),
    "scale [N,2]": ("scale.shape", _scale(lambda s: s.repeat(1, 2))),
    "NaN scale": ("scale.value", _scale(_first(math.nan))),
    "infinite scale": ("scale.value", _scale(_first(math.inf))),
    "zero scale": ("scale.value", _scale(_first(0.0))),
    "negative scale": ("scale.value", _scale(_first(-1.0))),
    "scale past float32": ("values.range", _scale(_first(3e38))),
    "float weight": ("weight.dtype", _set(weight=make.weight(96, 64, dtype="BF16"))),
    "unsigned weight": ("weight.dtype", _set(weight=torch.ones(96, 64, dtype=torch.uint8))),
    "conv weight": ("weight.dtype", _set(weight=torch.ones(96, 64, 3, dtype=torch.int8))),
    "no weight": ("weight.missing", _set(weight=None)),
    "empty weight": (
        "weight.missing",
        _set(weight=torch.ones(96, 0, dtype=torch.int8), comfy_quant=int8(64)),
    ),
    "group 128": ("convrot.group", _set(comfy_quant=int8(128))),
    "group 512": ("convrot.group", _set(comfy_quant=int8(512))),
    "group over K": ("convrot.group", _set(comfy_quant=int8(256))),
    "group not a number": (
        "convrot.group",
        _set(comfy_quant=marker(format="int8_tensorwise", convrot=True, convrot_groupsize="64")),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_a_fault_and_nothing_else(
    tmp_path: Path, original: Checkpoint, fault: str
) -> None:
    name, breaks = FAULTS[fault]
    tensors = quantized()
    breaks(tensors)
    broken = opened(tmp_path / "broken.safetensors", tensors)
    for report in (verify(broken), verify(broken, against=original)):
        assert names(report) == [(name, ROW)]
        assert not report.passed
        assert report.findings[0].sentence and report.findings[0].mend
        json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if not FAULTS[f][0].endswith((".value", ".range"))]
)
def test_verify_names_structural_faults_from_the_header_alone(tmp_path: Path, fault: str) -> None:
    name, breaks = FAULTS[fault]
    tensors = quantized()
    breaks(tensors)
    report = verify(opened(tmp_path / "broken.safetensors", tensors), header_only=True)
    assert names(report) == [(name, ROW)]


def test_verify_counts_values_that_are_not_finite(tmp_path: Path) -> None:
    tensors = quantized()
    tensors[f"{ROW}.bias"][[2, 5]] = math.nan
    tensors["blocks.0.norm.weight"][0] = -math.inf
    report = verify(opened(tmp_path / "m.safetensors", tensors))
    assert names(report) == [
        ("values.nonfinite", f"{ROW}.bias"),
        ("values.nonfinite", "blocks.0.norm.weight"),
    ]
    assert report.findings[0].sentence == "holds 2 values that are not finite"


def test_verify_does_not_take_an_overflowing_sum_for_infinity(tmp_path: Path) -> None:
    tensors = {**quantized(), "big": torch.full((64,), 60000.0).half()}
    assert verify(opened(tmp_path / "m.safetensors", tensors)).passed


@pytest.mark.parametrize(
    ("layers", "finding"),
    [
        ({ROTATED: {"format": "int8_tensorwise"}}, ("header.disagrees", ROTATED)),
        ({"blocks.7.mlp": {"format": "int8_tensorwise"}}, ("header.disagrees", "blocks.7.mlp")),
        (7, ("header.invalid", None)),
    ],
)
def test_verify_reports_a_header_that_disagrees(
    tmp_path: Path, layers: Any, finding: tuple[str, str | None]
) -> None:
    report = verify(opened(tmp_path / "m.safetensors", quantized(), header(layers)))
    assert names(report) == [finding]


def test_verify_decodes_as_the_header_says_where_it_overrides_markers(
    tmp_path: Path, original: Checkpoint
) -> None:
    lost = header({ROTATED: {"format": "int8_tensorwise"}})
    report = verify(opened(tmp_path / "m.safetensors", quantized(), lost), against=original)
    assert names(report) == [("convrot.lost", ROTATED), ("header.disagrees", ROTATED)]


def test_verify_accepts_a_header_that_says_the_same_in_other_words(tmp_path: Path) -> None:
    same = {ROW: {"format": "int8_tensorwise", "convrot": False}}
    assert verify(opened(tmp_path / "m.safetensors", quantized(), header(same))).passed


def test_verify_needs_the_reference_to_see_a_lost_rotation(
    tmp_path: Path, original: Checkpoint
) -> None:
    for i in range(len(GROUPS)):
        layer = f"blocks.{i}.mlp.2"
        broken = opened(
            tmp_path / f"{i}.safetensors", {**quantized(), f"{layer}.comfy_quant": int8()}
        )
        assert verify(broken).passed
        report = verify(broken, against=original)
        assert names(report) == [("convrot.lost", layer)]
        assert f"rotated in groups of {GROUPS[i]}," in report.findings[0].sentence
        found = next(found for found in report.layers if found.layer == layer)
        assert found.fidelity is not None and found.fidelity.sqnr < 6


# The reference


def test_verify_matches_names_under_another_prefix(tmp_path: Path, good: Checkpoint) -> None:
    prefixed = {f"model.diffusion_model.{k}": v for k, v in reference().items()}
    report = verify(good, against=opened(tmp_path / "r.safetensors", prefixed))
    assert report.passed, report.findings
    assert report.fidelity is not None and len(report.fidelity.layers) == 5
    assert report.unquantized is not None and report.unquantized.same == 4


def test_verify_does_not_guess_between_two_prefixes(tmp_path: Path, good: Checkpoint) -> None:
    other = reference()
    weight = other.pop(f"{TENSOR}.weight")
    other |= {f"net.{TENSOR}.weight": weight, f"model.{TENSOR}.weight": weight.clone()}
    report = verify(good, against=opened(tmp_path / "r.safetensors", other))
    assert names(report) == [("reference.missing", TENSOR)]


def test_verify_reports_layers_that_the_reference_lacks_or_shapes_otherwise(
    tmp_path: Path, good: Checkpoint
) -> None:
    other = reference()
    del other[f"{TENSOR}.weight"]
    other[f"{ROW}.weight"] = make.weight(96, 65)
    other["blocks.0.mlp.2.weight"] = make.weight(47, 256)
    other["blocks.1.mlp.2.weight"][3, 3] = math.nan
    other["blocks.2.mlp.2.bias"] = make.weight(48)
    other["img_in.weight"] = make.weight(32, 17)
    report = verify(good, against=opened(tmp_path / "r.safetensors", other))
    assert names(report) == [
        ("reference.missing", TENSOR),
        ("reference.shape", ROW),
        ("reference.shape", "blocks.0.mlp.2"),
        ("reference.nonfinite", "blocks.1.mlp.2"),
        ("bias.missing", "blocks.2.mlp.2"),
        ("reference.shape", "img_in.weight"),
    ]
    assert report.fidelity is not None
    assert [layer.layer for layer in report.fidelity.layers] == ["blocks.2.mlp.2"]


def test_verify_counts_unquantized_tensors_that_changed(tmp_path: Path, good: Checkpoint) -> None:
    other = reference()
    other["img_in.weight"] = other["img_in.weight"] * 1.5
    other["blocks.0.norm.weight"] = other["blocks.0.norm.weight"].bfloat16()
    other["steps"] = other["steps"] + 1
    other["lost"] = torch.ones(3)
    report = verify(good, against=opened(tmp_path / "r.safetensors", other))
    assert names(report) == [("reference.lost", "lost")]
    found = report.unquantized
    assert found is not None
    assert (found.same, found.only_here, found.only_in_reference) == (1, 0, 1)
    assert [c.name for c in found.changed] == ["img_in.weight", "steps", "blocks.0.norm.weight"]
    assert found.changed[0].fidelity is not None
    assert found.changed[0].fidelity.relative_error == pytest.approx(1 / 3, rel=1e-2)


def test_plain_tensors_that_are_others_than_the_references_are_found(
    tmp_path: Path, good: Checkpoint
) -> None:
    """Not what rounding or a cast does, and not what was taken from another model's file."""
    other = reference()
    other["img_in.weight"] = -other["img_in.weight"]
    other["img_in.extra"] = torch.ones(3)
    other["first_stage_model.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
    report = verify(good, against=opened(tmp_path / "r.safetensors", other))
    assert names(report) == [("reference.lost", "img_in"), ("reference.differs", "img_in.weight")]
    assert "lacks `extra`" in str(report.findings[0])
    named = verify(good, against=opened(tmp_path / "r2.safetensors", other), fail_on=["scale.*"])
    assert named.passed


def test_biases_that_make_up_for_the_error_of_their_layers_are_no_finding(
    tmp_path: Path, good: Checkpoint
) -> None:
    specs = [name for name in good.specs if name.endswith(".bias")]
    other = reference()
    for name in specs:
        other[name] = other[name] * 4
    against = opened(tmp_path / "r.safetensors", other)
    assert {name for name, _ in names(verify(good, against=against))} == {"reference.differs"}
    stages = [{"op": "quant", "bias_correction": True}]
    history = {"cq.history": json.dumps({"cq": 1, "sources": [], "stages": stages})}
    told = opened(tmp_path / "told.safetensors", quantized(), history)
    assert verify(told, against=against).passed


def test_gates_are_not_kept_by_layers_that_cannot_be_measured(
    tmp_path: Path, good: Checkpoint
) -> None:
    other = reference()
    del other[f"{TENSOR}.weight"]
    against = opened(tmp_path / "r.safetensors", other)
    report = verify(good, against=against, min_sqnr=5, max_error=0.9, fail_on=["scale.*"])
    assert not report.passed
    for gate in report.gates:
        assert [layer for layer, value in gate.failures if math.isnan(value)] == [TENSOR]
        assert gate.count == gate.measured + 1
        assert gate.to_dict()["failures"] == [{"layer": TENSOR, "value": None}]


@pytest.mark.parametrize("dtype", make.TORCH_DTYPES)
def test_verify_compares_tensors_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    left = {**quantized(), "steps": make.noise(dtype, (5, 3), seed=1)}
    right = {**reference(), "steps": make.noise(dtype, (5, 3), seed=2)}
    one, two = opened(tmp_path / "1.safetensors", left), opened(tmp_path / "2.safetensors", right)
    changed = verify(one, against=two).unquantized
    assert changed is not None and [c.name for c in changed.changed] == ["steps"]
    json.dumps(changed.to_dict(), allow_nan=False)
    right["steps"] = left["steps"]
    equal = verify(one, against=opened(tmp_path / "3.safetensors", right)).unquantized
    assert equal is not None and equal.changed == ()


def test_verify_refuses_a_quantized_reference(good: Checkpoint) -> None:
    with pytest.raises(PlanError, match="quantized itself: 5 layers") as error:
        verify(good, against=good)
    assert error.value.exit_code == 4 and error.value.hint


# The numbers


def kitchen(layer: Tensors) -> torch.Tensor:
    settings = json.loads(layer["comfy_quant"].numpy().tobytes())
    if settings.get("convrot"):
        group = settings["convrot_groupsize"]
        return dequantize_int8_convrot_weight(layer["weight"], layer["weight_scale"], group)
    return dequantize_int8_simple(layer["weight"], layer["weight_scale"])


def test_verify_decodes_as_comfy_kitchen_does(good: Checkpoint, original: Checkpoint) -> None:
    tensors, originals = quantized(), reference()
    report = verify(good, against=original)
    assert len(report.layers) == 5
    for layer in report.layers:
        stored = {
            name: tensors[f"{layer.layer}.{name}"]
            for name in ("weight", "weight_scale", "comfy_quant")
        }
        w = originals[f"{layer.layer}.weight"].float().numpy().astype(np.float64)
        v = kitchen(stored).float().numpy().astype(np.float64)
        e = v - w
        found = layer.fidelity
        assert found is not None
        # Rotation may sum in another order than comfy-kitchen's product: float32 rounding, no more.
        assert found.sqnr == pytest.approx(10 * np.log10((w**2).sum() / (e**2).sum()), rel=1e-6)
        assert found.relative_error == pytest.approx(np.sqrt((e**2).sum() / (w**2).sum()), rel=1e-6)
        cosine = (w * v).sum() / np.sqrt((w**2).sum() * (v**2).sum())
        assert found.cosine == pytest.approx(cosine, rel=1e-12)
        assert found.max_abs_error == pytest.approx(np.abs(e).max(), rel=1e-4)
        assert found.mean_shift == pytest.approx(e.mean(), rel=1e-3, abs=1e-10)


def test_verify_is_exact_where_decoding_gives_the_reference(tmp_path: Path) -> None:
    tensors = quantized()
    layer = {n: tensors[f"{ROW}.{n}"] for n in ("weight", "weight_scale", "comfy_quant")}
    exact = {f"{ROW}.weight": kitchen(layer)}
    stored = {f"{ROW}.{name}": tensor for name, tensor in layer.items()}
    report = verify(
        opened(tmp_path / "m.safetensors", stored),
        against=opened(tmp_path / "r.safetensors", exact),
        min_sqnr=200,
        max_error=0,
    )
    assert report.passed
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["layers"][0]["fidelity"]["exact"] is True
    assert document["layers"][0]["fidelity"]["sqnr_db"] is None
    assert document["fidelity"]["min_sqnr_db"] is None
    assert document["fidelity"]["worst"] == []


def test_verify_pools_layers_by_energy(good: Checkpoint, original: Checkpoint) -> None:
    report = verify(good, against=original)
    assert report.fidelity is not None
    every = [layer.fidelity for layer in report.layers if layer.fidelity is not None]
    signal = sum(s.reference_energy for s in every)
    error = sum(s.error_energy for s in every)
    assert report.fidelity.overall.sqnr == pytest.approx(10 * math.log10(signal / error))
    assert report.fidelity.mean_sqnr == pytest.approx(sum(s.sqnr for s in every) / len(every))
    assert report.fidelity.min_sqnr == min(s.sqnr for s in every)
    worst = [layer.fidelity.sqnr for layer in report.fidelity.worst if layer.fidelity]
    assert worst == sorted(s.sqnr for s in every)


def test_sums_of_large_arrays_do_not_depend_on_threads() -> None:
    """300 000 elements are several rows at a time, and a rest."""
    w = make.weight(1, 300_001)
    v = w + 0.01 * make.weight(1, 300_001, seed=1)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sums(w, v))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    exact, error = w.double().numpy().ravel(), (v.double() - w.double()).numpy().ravel()
    assert found[0].count == exact.size
    assert found[0].reference_energy == pytest.approx(float(exact @ exact), rel=1e-12)
    assert found[0].error_energy == pytest.approx(float(error @ error), rel=1e-12)
    assert found[0].error_sum == pytest.approx(math.fsum(error), rel=1e-9)
    assert found[0].max_abs_error == float(np.abs(error).max())


def test_sums_follow_the_formulas_over_any_segments() -> None:
    w, v = make.weight(300, 500, seed=1), make.weight(300, 500, seed=2)
    whole = sums(w, v)
    parts = pooled([sums(w[:7], v[:7]), sums(w[7:211], v[7:211]), sums(w[211:], v[211:])])
    a, b = w.numpy().astype(np.float64), v.numpy().astype(np.float64)
    for found in (whole, parts):
        assert found.count == a.size
        assert found.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((b - a) ** 2).sum()))
        assert found.cosine == pytest.approx((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
        assert found.mean_shift == pytest.approx((b - a).mean())
        assert found.max_abs_error == np.abs(b - a).max()


def test_sums_of_zero_references_are_plain_json() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert sums(zero, zero).to_dict()["exact"] is True
    lost = sums(zero, one)
    assert (-math.inf, math.inf, None) == (lost.sqnr, lost.relative_error, lost.cosine)
    json.dumps(lost.to_dict(), allow_nan=False)
    json.dumps(sums(torch.tensor([math.nan]), torch.ones(1)).to_dict(), allow_nan=False)


# Gates


def test_gates_name_the_layers_that_fail(good: Checkpoint, original: Checkpoint) -> None:
    report = verify(good, against=original)
    assert report.fidelity is not None
    ranked = sorted(report.fidelity.layers, key=lambda la: la.fidelity.sqnr if la.fidelity else 0)
    limits = [la.fidelity for la in ranked if la.fidelity]
    between = (limits[1].sqnr + limits[2].sqnr) / 2
    gated = verify(good, against=original, min_sqnr=between, max_error=limits[0].relative_error)
    low, high = gated.gates
    assert not gated.passed
    assert gated.findings == ()
    assert [name for name, _ in low.failures] == [la.layer for la in ranked[:2]]
    assert not low.holds
    assert high.holds and high.measured == 5
    assert verify(good, against=original, min_sqnr=limits[0].sqnr).passed
    tight = verify(good, against=original, max_error=limits[-1].relative_error)
    assert [name for name, _ in tight.gates[0].failures] == [la.layer for la in ranked[:4]]


def test_gates_that_measure_nothing_do_not_hold(original: Checkpoint) -> None:
    report = verify(original, against=original, min_sqnr=10)
    assert report.findings == ()
    assert not report.passed


@pytest.mark.parametrize("gate", [{"min_sqnr": 30.0}, {"max_error": 0.1}])
def test_gates_need_a_reference(good: Checkpoint, gate: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        verify(good, **gate)  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", [{"min_sqnr": math.nan}, {"max_error": -0.1}])
def test_gates_must_be_numbers_that_make_sense(
    good: Checkpoint, original: Checkpoint, gate: dict[str, float]
) -> None:
    with pytest.raises(UsageError):
        verify(good, against=original, **gate)  # type: ignore[arg-type]


def test_header_only_takes_no_reference(good: Checkpoint, original: Checkpoint) -> None:
    with pytest.raises(UsageError):
        verify(good, against=original, header_only=True)


# How it runs


def test_verify_reports_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    base = opened(tmp_path / "base.safetensors", make.model(blocks=3, dim=128))
    cq.write(quantize(base, optimizer="rtn"), tmp_path / "q.safetensors")
    model = cq.open(tmp_path / "q.safetensors")
    one = verify(model, against=base, workers=1)
    assert one == verify(model, against=base, workers=2)
    assert one.to_dict() == verify(model, against=base, workers=5).to_dict()


def test_verify_measures_a_layer_of_several_segments_as_one(tmp_path: Path) -> None:
    """Scales are cut with their rows; the codes of a deferred layer wait for their scales."""
    w = make.weight(300, 8192)
    assert len(list(cuts(spec_of(w)))) == 3
    base = opened(tmp_path / "r.safetensors", {"blocks.0.mlp.weight": w})
    model = quantize(base, optimizer="rtn", rotate="64")
    cq.write(model, tmp_path / "m.safetensors")
    stored = make.load(tmp_path / "m.safetensors")
    value = kitchen({name.rpartition(".")[2]: tensor for name, tensor in stored.items()})
    for checkpoint in (model, cq.open(tmp_path / "m.safetensors")):
        found = verify(checkpoint, against=base).layers[0].fidelity
        assert found is not None
        assert found.sqnr == pytest.approx(sums(w, value).sqnr, rel=1e-6)


def test_verify_takes_rows_of_a_reference_cut_otherwise(tmp_path: Path) -> None:
    w = make.weight(300, 64)
    stored = {f"a.{name}": tensor for name, tensor in store(w, 64).items()}
    model = opened(tmp_path / "m.safetensors", stored)
    whole = opened(tmp_path / "r.safetensors", {"a.weight": w})
    part = make.part({"a.weight": w})

    def ragged() -> Iterator[Piece]:
        for start, stop in ((0, 1), (1, 130), (130, 131), (131, 300)):
            yield Piece("a.weight", start, w[start:stop])

    cut = make.checkpoint(dataclasses.replace(part, produce=ragged))
    assert verify(model, against=cut).layers == verify(model, against=whole).layers


def test_verify_reports_all_bytes_as_progress(good: Checkpoint, original: Checkpoint) -> None:
    seen: list[Any] = []
    verify(good, against=original, workers=1, on_progress=seen.append)
    assert seen[-1].done == seen[-1].total > 0


def test_verify_keeps_to_the_memory_limit(good: Checkpoint) -> None:
    with pytest.raises(ResourceError):
        verify(good, memory_limit=1000)


def test_header_only_imports_no_torch(tmp_path: Path, good: Checkpoint) -> None:
    code = (
        "import sys, cq, cq_analyze\n"
        "report = cq_analyze.verify(cq.open(sys.argv[1]), header_only=True)\n"
        "assert report.passed and len(report.layers) == 5, report.findings\n"
        "report.to_dict()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    path = tmp_path / "quantized.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_report_is_plain_versioned_json(good: Checkpoint, original: Checkpoint) -> None:
    document = verify(good, against=original, min_sqnr=90).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["cq"], document["kind"], document["passed"]) == (1, "verify", False)
    assert document["gates"][0]["failures"]
