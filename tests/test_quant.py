"""The quantize stage against comfy-kitchen's eager code, which is what ComfyUI runs on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.tensor import int8_utils

import cq
import cq_merge
import cq_quant
from cq.core import catalog, comfy, rotation, source
from cq.core.errors import CqError, InputError, PlanError, UsageError
from cq.core.formats import decode
from cq.core.manifest import HISTORY_KEY

LAYER = "blocks.0.attn"
WEIGHT = f"{LAYER}.weight"
INT8 = catalog.load("formats", "int8_tensorwise")


def save(directory: Path, weight: torch.Tensor, **others: torch.Tensor) -> Path:
    return make.save(directory / "in.safetensors", {WEIGHT: weight, **others})


def quantized(directory: Path, weight: torch.Tensor, **settings: Any) -> dict[str, torch.Tensor]:
    """The tensors of a file with `weight` quantized, read back by safetensors."""
    model = cq_quant.quantize(cq.open(save(directory, weight)), only=[LAYER], **settings)
    path = directory / "out.safetensors"
    cq.write(model, path, force=True)
    return make.load(path)


def marker_of(tensors: dict[str, torch.Tensor], layer: str = LAYER) -> dict[str, Any]:
    return json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))


# The oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", make.FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(300, 200), (64, 1024), (1, 64), (129, 1), (5, 3)])
def test_rtn_rows_are_bit_equal_to_kitchen(
    shape: tuple[int, int], dtype: str, tmp_path: Path
) -> None:
    weight = make.weight(*shape, dtype=dtype)
    found = quantized(tmp_path, weight, optimizer="rtn", scaling="row")
    codes, scales = kitchen.quantize_int8_rowwise(weight.float())
    assert make.same(codes, found[WEIGHT])
    assert make.same(scales, found[f"{LAYER}.weight_scale"])
    assert marker_of(found) == {"format": "int8_tensorwise"}


@pytest.mark.parametrize("dtype", make.FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(300, 200), (64, 1024), (1, 64), (129, 1), (5, 3)])
def test_rtn_tensor_is_bit_equal_to_kitchen(
    shape: tuple[int, int], dtype: str, tmp_path: Path
) -> None:
    weight = make.weight(*shape, dtype=dtype)
    found = quantized(tmp_path, weight, optimizer="rtn", scaling="tensor")
    codes, scales = kitchen.quantize_int8_tensorwise(weight.float())
    assert make.same(codes, found[WEIGHT])
    assert make.same(scales, found[f"{LAYER}.weight_scale"])


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_rtn_is_bit_equal_to_kitchen_in_many_segments(scaling: str, tmp_path: Path) -> None:
    weight = make.weight(2500, 1024, dtype="BF16")
    source_file = cq.open(save(tmp_path, weight))
    assert len(list(source_file.pieces(WEIGHT))) > 2
    found = quantized(tmp_path, weight, optimizer="rtn", scaling=scaling)
    quantize = {
        "row": kitchen.quantize_int8_rowwise,
        "tensor": kitchen.quantize_int8_tensorwise,
    }[scaling]
    codes, scales = quantize(weight.float())
    assert make.same(codes, found[WEIGHT])
    assert make.same(scales, found[f"{LAYER}.weight_scale"])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_rtn_is_bit_equal_to_kitchen_at_the_ends_of_float32(
    scaling: str, size: float, tmp_path: Path
) -> None:
    """All zeros too: the scale is never 0, by which a reader would divide."""
    weight = make.weight(64, 64).sign() * size
    weight[[0, 5]] = 0
    found = quantized(tmp_path, weight, optimizer="rtn", scaling=scaling)
    quantize = {
        "row": kitchen.quantize_int8_rowwise,
        "tensor": kitchen.quantize_int8_tensorwise,
    }[scaling]
    codes, scales = quantize(weight)
    assert make.same(codes, found[WEIGHT])
    assert make.same(scales, found[f"{LAYER}.weight_scale"])
    assert bool((found[f"{LAYER}.weight_scale"] > 0).all())


@pytest.mark.parametrize("optimizer", ["quip", "rtn"])
@pytest.mark.parametrize(("columns", "group"), [(768, 256), (1088, 64), (1040, 16)])
def test_rotated_rows_are_kitchens_but_for_ties(
    optimizer: str, columns: int, group: int, tmp_path: Path
) -> None:
    """The factored rotation sums in another order: 1 code in 10 000 may differ, by one step."""
    weight = make.weight(1024, columns, dtype="BF16")
    found = quantized(tmp_path, weight, optimizer=optimizer, rotate="256")
    codes, scales = kitchen.quantize_int8_convrot_weight(weight.float(), group)
    difference = (codes.int() - found[WEIGHT].int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.sum()) <= codes.numel() // 10_000
    assert torch.allclose(scales, found[f"{LAYER}.weight_scale"], rtol=1e-6, atol=0)
    assert marker_of(found) == {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": group,
    }


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("group", [None, *rotation.GROUPS])
def test_values_of_stored_tensors_are_bit_equal_to_kitchen(
    scaling: str, group: int | None, tmp_path: Path
) -> None:
    found = quantized(
        tmp_path,
        make.weight(300, 512, dtype="BF16"),
        optimizer="rtn",
        scaling=scaling,
        rotate="off" if group is None else str(group),
    )
    codes, scales = found[WEIGHT], found[f"{LAYER}.weight_scale"]
    if group is None:
        expected = kitchen.dequantize_int8_simple(codes, scales)
    else:
        expected = kitchen.dequantize_int8_convrot_weight(codes, scales, group)
    stored = {"weight": codes, "weight_scale": scales}
    assert make.same(expected, decode(INT8, stored, marker_of(found)))


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_hadamard_is_bit_equal_to_kitchen(size: int) -> None:
    assert make.same(int8_utils._build_hadamard(size), rotation.hadamard(size))


def test_rotation_lowers_the_error_of_a_weight_with_outliers(tmp_path: Path) -> None:
    weight = make.weight(256, 1024)
    errors = {}
    for optimizer in ("rtn", "quip"):
        found = quantized(tmp_path, weight, optimizer=optimizer)
        stored = {"weight": found[WEIGHT], "weight_scale": found[f"{LAYER}.weight_scale"]}
        value = decode(INT8, stored, marker_of(found))
        errors[optimizer] = float((value - weight).norm() / weight.norm())
    assert errors["quip"] < 0.6 * errors["rtn"]


def test_kitchens_linear_runs_what_is_stored(tmp_path: Path) -> None:
    """The stored layer times an input, by the code that ComfyUI calls, is near the true product."""
    weight = make.weight(128, 512)
    x = make.weight(16, 512, seed="x") * 50
    for optimizer, scaling in (("rtn", "row"), ("rtn", "tensor"), ("quip", "row")):
        found = quantized(tmp_path, weight, optimizer=optimizer, scaling=scaling)
        actual = kitchen.int8_linear(
            x,
            found[WEIGHT],
            found[f"{LAYER}.weight_scale"],
            out_dtype=torch.float32,
            convrot=marker_of(found).get("convrot", False),
            convrot_groupsize=marker_of(found).get("convrot_groupsize", 256),
        )
        expected = x @ weight.T
        assert float((expected - actual).norm() / expected.norm()) < 0.2


# Rotation groups --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "group"), [(512, 256), (320, 64), (336, 16), (68, None), (99, None)]
)
def test_rotation_falls_back_to_the_group_that_divides(
    columns: int, group: int | None, tmp_path: Path
) -> None:
    weight = make.weight(64, columns)
    model = cq_quant.quantize(cq.open(save(tmp_path, weight)), only=[LAYER])
    (note,) = model.notes
    assert group == note["rotation"]
    marker = json.loads(bytes(model.read(f"{LAYER}.comfy_quant").tolist()))
    assert group == marker.get("convrot_groupsize")
    assert (group is not None) is marker.get("convrot", False)
    if group != 256:
        assert f"K={columns} is not a multiple of 256" in note["note"]


@pytest.mark.parametrize(("rotate", "group"), [("256", 256), ("64", 64), ("16", 16), ("off", None)])
def test_rotate_sets_the_largest_group(rotate: str, group: int | None, tmp_path: Path) -> None:
    model = cq_quant.quantize(
        cq.open(save(tmp_path, make.weight(64, 512))), optimizer="rtn", rotate=rotate, only=[LAYER]
    )
    assert group == model.notes[0]["rotation"]


def test_rotate_off_is_refused_for_an_optimizer_that_rotates(tmp_path: Path) -> None:
    checkpoint = cq.open(save(tmp_path, make.weight(64, 64)))
    with pytest.raises(UsageError, match="`quip` works in the rotated basis"):
        cq_quant.quantize(checkpoint, optimizer="quip", rotate="off")
    (note,) = cq_quant.quantize(checkpoint, rotate="off").notes
    assert (note["optimizer"], note["rotation"]) == ("rtn", None)
    with pytest.raises(UsageError, match="no rotation `128`"):
        cq_quant.quantize(checkpoint, rotate="128")


# Markers and everything beside the layers -------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    metadata = {"format": "pt", "config": '{"is_512": true}', "modelspec.title": "Größe \u2028"}
    prefix = "model.diffusion_model."
    tensors = make.model(dim=256, prefix=prefix)
    tensors["vae.decoder.blocks.0.weight"] = make.weight(64, 64, dtype="F16")
    tensors["scales"] = make.noise("I64", (7,))
    return make.save(tmp_path / "base.safetensors", tensors, metadata)


def test_marker_in_a_file_has_the_bytes_of_the_official_files(base: Path, tmp_path: Path) -> None:
    cq.write(cq_quant.quantize(cq.open(base)), tmp_path / "out.safetensors")
    found = make.load(tmp_path / "out.safetensors")
    golden = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    markers = {name: value for name, value in found.items() if name.endswith(".comfy_quant")}
    assert {golden} == {bytes(value.tolist()) for value in markers.values()}
    assert {(torch.uint8, (72,))} == {(v.dtype, tuple(v.shape)) for v in markers.values()}
    layers = make.quantized_names("model.diffusion_model.")
    assert sorted(f"{layer}.comfy_quant" for layer in layers) == sorted(markers)


@pytest.mark.parametrize("optimizer", catalog.names("optimizers"))
def test_everything_else_keeps_its_bytes(optimizer: str, base: Path, tmp_path: Path) -> None:
    """Biases, norms, projections, other models: equal bytes, and nothing is lost or added."""
    before = make.load(base)
    cq.write(cq_quant.quantize(cq.open(base), optimizer=optimizer), tmp_path / "out.safetensors")
    after = make.load(tmp_path / "out.safetensors")
    layers = make.quantized_names("model.diffusion_model.")
    weights = {f"{layer}.weight" for layer in layers}
    added = {f"{layer}.{name}" for layer in layers for name in ("weight_scale", "comfy_quant")}
    assert before.keys() | added == after.keys()
    assert any(name.endswith(".bias") for name in before)
    for name in before.keys() - weights:
        assert make.same(before[name], after[name])
    assert {torch.int8} == {after[name].dtype for name in weights}


@pytest.mark.parametrize("save_quant_metadata", [False, True])
def test_source_metadata_is_kept(save_quant_metadata: bool, base: Path, tmp_path: Path) -> None:
    """ComfyUI reads a model's config from it."""
    model = cq_quant.quantize(cq.open(base), save_quant_metadata=save_quant_metadata)
    cq.write(model, tmp_path / "out.safetensors")
    found = make.metadata(tmp_path / "out.safetensors")
    added = {HISTORY_KEY} | ({comfy.HEADER_KEY} if save_quant_metadata else set())
    assert make.metadata(base) == {k: v for k, v in found.items() if k not in added}
    assert added <= found.keys()


def test_header_form_says_what_the_markers_say(base: Path, tmp_path: Path) -> None:
    model = cq_quant.quantize(cq.open(base), save_quant_metadata=True)
    cq.write(model, tmp_path / "out.safetensors")
    document = json.loads(make.metadata(tmp_path / "out.safetensors")[comfy.HEADER_KEY])
    found = make.load(tmp_path / "out.safetensors")
    layers = make.quantized_names("model.diffusion_model.")
    assert {layer: marker_of(found, layer) for layer in layers} == document["layers"]
    assert document["format_version"] == "1.0"
    markers_only = cq_quant.quantize(cq.open(base))
    assert comfy.HEADER_KEY not in markers_only.metadata


def markers_of(checkpoint: cq.Checkpoint) -> dict[str, dict[str, Any]]:
    return {
        name.removesuffix(comfy.MARKER): comfy.parse_marker(checkpoint.read_bytes(name), layer=name)
        for name in checkpoint.specs
        if name.endswith(comfy.MARKER)
    }


def test_markers_read_what_was_written(base: Path, tmp_path: Path) -> None:
    cq.write(cq_quant.quantize(cq.open(base)), tmp_path / "out.safetensors")
    found = markers_of(cq.open(tmp_path / "out.safetensors"))
    assert sorted(make.quantized_names("model.diffusion_model.")) == sorted(found)
    assert all(
        marker == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
        for marker in found.values()
    )


def test_quantize_takes_shards(tmp_path: Path) -> None:
    tensors = make.model()
    one = make.save(tmp_path / "one.safetensors", tensors)
    index = make.save_shards(tmp_path / "shards", tensors, count=3)
    cq.write(cq_quant.quantize(cq.open(one)), tmp_path / "a.safetensors")
    cq.write(cq_quant.quantize(cq.open(index)), tmp_path / "b.safetensors")
    expected, actual = make.load(tmp_path / "a.safetensors"), make.load(tmp_path / "b.safetensors")
    assert expected.keys() == actual.keys()
    assert all(make.same(expected[name], actual[name]) for name in expected)


def test_quantize_takes_a_part_of_several_tensors() -> None:
    """A stage before may produce a layer's tensors together."""
    weight, bias = make.weight(64, 64), make.weight(64)
    part = make.part({WEIGHT: weight, f"{LAYER}.bias": bias}, nbytes_peak=weight.nbytes)
    model = cq_quant.quantize(make.checkpoint(part), optimizer="rtn")
    assert [WEIGHT, f"{LAYER}.weight_scale", f"{LAYER}.comfy_quant", f"{LAYER}.bias"] == list(
        model.specs
    )
    assert make.same(bias, model.read(f"{LAYER}.bias"))
    assert make.same(kitchen.quantize_int8_rowwise(weight)[0], model.read(WEIGHT))


def test_notes_explain_every_weight(base: Path) -> None:
    model = cq_quant.quantize(cq.open(base), skip=["*.mlp.2"])
    weights = [n.removesuffix(".weight") for n in make.load(base) if n.endswith(".weight")]
    assert sorted(weights) == sorted(note["layer"] for note in model.notes)
    assert {"quantize", "keep"} == {note["action"] for note in model.notes}
    assert all(note["reason"] for note in model.notes)
    for note in model.notes:
        if note["action"] == "quantize":
            sizes = [
                model.specs[f"{note['layer']}.{name}"].nbytes for name in ("weight", "weight_scale")
            ]
            assert sum(sizes) == note["nbytes_after"]
    assert "`--skip *.mlp.2`" in {note["reason"] for note in model.notes}


def test_part_bounds_the_memory_of_a_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of any height is held in segments: its peak does not grow with its rows."""
    monkeypatch.setattr(source, "_CUT_ELEMENTS", 1 << 14)
    peaks = []
    for rows in (1024, 4096):
        model = cq_quant.quantize(cq.open(save(tmp_path, make.weight(rows, 64))), only=[LAYER])
        peaks.append(
            model.part(WEIGHT).nbytes_peak - 2 * model.specs[f"{LAYER}.weight_scale"].nbytes
        )
    assert peaks[0] == peaks[1]


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("optimizer", catalog.names("optimizers"))
@pytest.mark.parametrize(("nan", "infinite"), [(1, 0), (0, 1), (2, 3)])
def test_nonfinite_weights_are_refused_with_their_counts(
    nan: int, infinite: int, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    weight = make.weight(300, 256, dtype="BF16")
    weight.view(-1)[1000 : 1000 + nan] = float("nan")
    weight.view(-1)[40_000 : 40_000 + infinite] = float("-inf")
    path = save(tmp_path, weight)
    model = cq_quant.quantize(cq.open(path), optimizer=optimizer, scaling=scaling)
    with pytest.raises(InputError) as caught:
        cq.write(model, tmp_path / "out.safetensors")
    assert (caught.value.exit_code, caught.value.code) == (3, "input.nonfinite")
    assert f"`{WEIGHT}` of `{path}`" in caught.value.message
    assert f"{nan} NaN and {infinite} infinite" in caught.value.message
    assert f"--skip {LAYER}" in (caught.value.hint or "")
    assert [path] == list(tmp_path.iterdir())


def test_weights_beyond_float32_are_refused(tmp_path: Path) -> None:
    weight = make.weight(64, 64, dtype="F64")
    weight[3, 3] = 1e300
    with pytest.raises(InputError, match="overflows float32"):
        quantized(tmp_path, weight, optimizer="rtn")


def test_the_largest_float32_is_quantized(tmp_path: Path) -> None:
    weight = make.weight(64, 64)
    weight[3, 3] = torch.finfo(torch.float32).max
    found = quantized(tmp_path, weight, optimizer="rtn")
    assert int(found[WEIGHT][3, 3]) == 127
    assert torch.isfinite(found[f"{LAYER}.weight_scale"]).all()


def test_nonfinite_values_elsewhere_are_none_of_our_business(tmp_path: Path) -> None:
    bias = torch.full((64,), float("nan"))
    path = save(tmp_path, make.weight(64, 64), **{f"{LAYER}.bias": bias})
    cq.write(cq_quant.quantize(cq.open(path)), tmp_path / "out.safetensors")
    assert make.same(bias, make.load(tmp_path / "out.safetensors")[f"{LAYER}.bias"])


QUANTIZED = {
    "marker": ({f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, {}),
    "header": ({}, {comfy.HEADER_KEY: json.dumps({"layers": {LAYER: {"format": "nvfp4"}}})}),
    "scale": ({f"{LAYER}.weight_scale": torch.tensor(1.0)}, {}),
    "legacy scale": ({f"{LAYER}.scale_weight": torch.tensor(1.0)}, {}),
    "fp8": ({WEIGHT: make.noise("F8_E4M3", (64, 64))}, {}),
    "e5m2": ({WEIGHT: make.noise("F8_E5M2", (64, 64))}, {}),
    "int8": ({WEIGHT: make.noise("I8", (64, 64))}, {}),
    "uint8": ({WEIGHT: make.noise("U8", (64, 32))}, {}),
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_quantized_checkpoint_is_refused(how: str, tmp_path: Path) -> None:
    tensors, metadata = QUANTIZED[how]
    everything = {WEIGHT: make.weight(64, 64), "blocks.1.x.weight": make.weight(64, 64), **tensors}
    path = make.save(tmp_path / "in.safetensors", everything, metadata)
    with pytest.raises(PlanError) as caught:
        cq_quant.quantize(cq.open(path))
    assert (caught.value.exit_code, caught.value.code) == (4, "plan.already_quantized")
    assert f"`{LAYER}`" in caught.value.message
    assert str(path) in caught.value.message


def test_own_output_is_refused_as_input(base: Path, tmp_path: Path) -> None:
    cq.write(cq_quant.quantize(cq.open(base)), tmp_path / "out.safetensors")
    with pytest.raises(PlanError, match="8 layers"):
        cq_quant.quantize(cq.open(tmp_path / "out.safetensors"))
    with pytest.raises(PlanError, match="quantized already"):
        cq_quant.quantize(cq_quant.quantize(cq.open(base)))


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"layers": []}', '{"layers": {"a": 1}}'])
def test_a_broken_header_form_is_an_input_error(text: str, tmp_path: Path) -> None:
    path = make.save(
        tmp_path / "in.safetensors", {WEIGHT: make.weight(64, 64)}, {comfy.HEADER_KEY: text}
    )
    with pytest.raises(InputError, match="_quantization_metadata"):
        cq_quant.quantize(cq.open(path))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b'{"a": 1}\0'])
def test_a_broken_marker_is_an_input_error(raw: bytes) -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.comfy_quant"):
        comfy.parse_marker(raw, layer=LAYER)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"format": "int8_tensorwize"}, "plan.no_format"),
        ({"optimizer": "rnt"}, "plan.no_optimizer"),
        ({"scaling": "block"}, "plan.scaling"),
        ({"only": ["blocks.9.*"]}, "plan.pattern"),
        ({"skip": ["blocks.9.*"]}, "plan.pattern"),
        ({"skip": ["*"]}, "plan.nothing"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, Any], code: str, base: Path) -> None:
    with pytest.raises(CqError) as caught:
        cq_quant.quantize(cq.open(base), **settings)
    assert (caught.value.exit_code, caught.value.code) == (4, code)
    assert caught.value.hint or code == "plan.pattern"


def test_nothing_to_quantize_is_an_error(tmp_path: Path) -> None:
    path = make.save(tmp_path / "lora.safetensors", {"a.lora_A": torch.ones(4, 4)})
    with pytest.raises(PlanError, match="there is no layer to quantize") as caught:
        cq_quant.quantize(cq.open(path))
    assert (caught.value.exit_code, caught.value.code) == (4, "plan.nothing")


# The old entry point ----------------------------------------------------------------------------


def test_convert_to_int8_equals_the_pipeline(base: Path, tmp_path: Path) -> None:
    written = cq_quant.convert_to_int8(
        input_file=str(base), output_file=tmp_path / "old.safetensors", comfy_quant=True
    )
    cq.write(cq_quant.quantize(cq.open(base), optimizer="quip"), tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == written.path.read_bytes()
    assert written.to_dict()["nbytes"] == written.path.stat().st_size


def adapter(directory: Path, name: str) -> Path:
    layer = "lora_unet_blocks_0_attn_qkv"
    return make.save(
        directory / f"{name}.safetensors",
        {
            f"{layer}.lora_down.weight": make.weight(4, 256, seed=name),
            f"{layer}.lora_up.weight": make.weight(768, 4, seed=(name, "up")),
            f"{layer}.alpha": torch.tensor(2.0),
        },
    )


@pytest.mark.parametrize("dampen", [True, False])
def test_convert_to_int8_merges_as_the_pipeline_does(
    dampen: bool, base: Path, tmp_path: Path
) -> None:
    first, second, third = (adapter(tmp_path, name) for name in ("first", "second", "third"))
    cq_quant.convert_to_int8(
        input_file=base,
        output_file=tmp_path / "old.safetensors",
        merge_lora_paths=[str(first), str(second)],
        merge_lora_path=str(third),
        merge_lora_scale=0.7,
        merge_lora_dampen=dampen,
        optimizer="rtn",
    )
    merged = cq_merge.merge(
        cq.open(base), [str(p) for p in (first, second, third)], scale=0.7, dampen=dampen
    )
    cq.write(cq_quant.quantize(merged, optimizer="rtn"), tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == (
        tmp_path / "old.safetensors"
    ).read_bytes()


def test_convert_to_int8_merges_one_adapter(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, "style")
    cq_quant.convert_to_int8(
        input_file=base, output_file=tmp_path / "old.safetensors", merge_lora_path=path
    )
    merged = cq_merge.merge(cq.open(base), [str(path)])
    cq.write(cq_quant.quantize(merged), tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == (
        tmp_path / "old.safetensors"
    ).read_bytes()


def test_convert_to_int8_refuses_a_file_without_markers(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comfy_quant=False"):
        cq_quant.convert_to_int8(
            input_file=base, output_file=tmp_path / "out.safetensors", comfy_quant=False
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_to_int8_replaces_only_with_force(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(PlanError):
        cq_quant.convert_to_int8(input_file=base, output_file=out)
    assert out.read_bytes() == b"precious"
    cq_quant.convert_to_int8(input_file=base, output_file=out, force=True)
    assert make.load(out)
