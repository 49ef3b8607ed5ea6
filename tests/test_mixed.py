"""Several formats in one file: recipes, `--only PATTERN=FORMAT`, and reasons for refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make
import processes
import pytest
import torch
from jsonschema import validate

import cq
import cq_quant
from cq.core import catalog, comfy
from cq.core.errors import PlanError, UsageError
from cq.core.manifest import HISTORY_KEY

PREFIX = "model.diffusion_model."
ROOT = Path(__file__).parent.parent


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.save(tmp_path / "base.safetensors", make.model(dim=256, prefix=PREFIX))


def markers(path: Path) -> dict[str, dict[str, Any]]:
    return {
        name.removesuffix(comfy.MARKER): comfy.parse_marker(bytes(value.tolist()), layer=name)
        for name, value in make.load(path).items()
        if name.endswith(comfy.MARKER)
    }


def recipe(directory: Path, *rules: dict[str, Any]) -> Path:
    path = directory / "layers.json"
    path.write_text(json.dumps({"cq": 1, "kind": "recipe", "rules": rules}))
    return path


RULES = (
    {"layers": "*.mlp.0", "format": "nvfp4", "reason": "the widest"},
    {"layers": "*.mlp.2", "format": "float8_e4m3fn"},
    {"layers": "*.attn.proj", "skip": True},
)
EXPECTED = {
    f"{PREFIX}blocks.{i}.{layer}": format_name
    for i in range(2)
    for layer, format_name in (
        ("attn.qkv", "int8_tensorwise"),
        ("mlp.0", "nvfp4"),
        ("mlp.2", "float8_e4m3fn"),
    )
}


def test_a_recipe_mixes_formats_in_one_file(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    cq.write(cq_quant.quantize(cq.open(base), recipe=recipe(tmp_path, *RULES)), out)
    assert {name: marker["format"] for name, marker in markers(out).items()} == EXPECTED


def test_only_mixes_formats_in_one_file(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    only = ["*.mlp.0=nvfp4", "*.mlp.2=float8_e4m3fn", "*.qkv"]
    cq.write(cq_quant.quantize(cq.open(base), only=only), out)
    assert {name: marker["format"] for name, marker in markers(out).items()} == EXPECTED


def test_a_mixed_file_is_sound_and_says_who_loads_it(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = processes.quick("quant", base, "--recipe", recipe(tmp_path, *RULES), "-o", out)
    assert done.code == 0, done.err
    assert "ComfyUI 0.27.0 or newer loads the result" in done.err
    checked = processes.cq("verify", out, "--against", base, "--json")
    assert checked.code == 0, checked.out
    report = json.loads(checked.out)
    assert {layer["layer"]: layer["format"] for layer in report["layers"]} == EXPECTED


def test_a_recipe_travels_inside_the_manifest(base: Path, tmp_path: Path) -> None:
    """Whoever runs the manifest needs no recipe file, and a file's history says what was done."""
    path = recipe(tmp_path, *RULES)
    done = processes.cq("quant", base, "--recipe", path, "--defer")
    direct = tmp_path / "direct.safetensors"
    cq.write(cq_quant.quantize(cq.open(base), recipe=path), direct)
    path.unlink()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(done.out)
    deferred = tmp_path / "deferred.safetensors"
    assert processes.quick("run", manifest, "-o", deferred).code == 0
    assert direct.read_bytes() == deferred.read_bytes()
    history = json.loads(make.metadata(deferred)[HISTORY_KEY])
    assert list(RULES) == history["stages"][0]["rules"]


def test_recipes_match_their_schema(tmp_path: Path) -> None:
    schema = json.loads((ROOT / "docs/reference/schemas/recipe.schema.json").read_text())
    validate(json.loads(recipe(tmp_path, *RULES, {"layers": "*", "_note": 1}).read_text()), schema)


def test_a_rule_that_matches_nothing_is_an_error(base: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, {"layers": "*.mlp.1", "format": "nvfp4"})
    done = processes.quick("quant", base, "--recipe", path, "-o", tmp_path / "out.safetensors")
    assert done.code == 4
    assert "`*.mlp.1` matches no layer" in done.err
    assert "did you mean" in done.err


def test_a_recipe_that_is_none_is_an_input_error(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text('{"_default": {"format": ""}}')
    done = processes.quick("quant", base, "--recipe", path)
    assert (done.code, done.out) == (3, "")
    assert "is not a recipe" in done.err


def test_a_format_that_is_always_rotated_cannot_be_told_not_to(base: Path) -> None:
    with pytest.raises(PlanError, match="always rotated"):
        cq_quant.quantize(cq.open(base), format="convrot_w4a4", optimizer="rtn", rotate="off")


@pytest.mark.parametrize("format_name", catalog.names("formats"))
def test_a_format_without_rotation_refuses_what_needs_it(format_name: str, base: Path) -> None:
    plug = catalog.load("formats", format_name)
    if plug.rotation != "never" or plug.casts:
        return
    for settings, words in (
        ({"optimizer": "quip"}, "optimizer `quip`"),
        ({"rotate": "64"}, "`--rotate 64`"),
    ):
        with pytest.raises(PlanError, match="rotated basis") as caught:
            cq_quant.quantize(
                cq.open(base), format=format_name, allow_custom_loader=True, **settings
            )
        assert words in caught.value.message


def test_an_unknown_rotation_is_a_usage_error(base: Path) -> None:
    with pytest.raises(UsageError, match="no rotation `128`"):
        cq_quant.quantize(cq.open(base), rotate="128")


def test_the_default_optimizer_goes_with_the_format(base: Path) -> None:
    found = {}
    for name in ("int8_tensorwise", "convrot_w4a4", "nvfp4", "mxfp8"):
        notes = cq_quant.quantize(cq.open(base), format=name).notes
        (found[name],) = {note["optimizer"] for note in notes if note["action"] == "quantize"}
    assert found == {
        "int8_tensorwise": "quip",
        "convrot_w4a4": "quip",
        "nvfp4": "rtn",
        "mxfp8": "rtn",
    }


# Names of the diffusers library -----------------------------------------------------------------

DIFFUSERS = {
    "Flux": ["single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"],
    "SD3": ["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"],
    "AuraFlow": ["joint_transformer_blocks.0.attn.add_k_proj.weight"],
    "PixArt": [
        "transformer_blocks.0.attn1.to_q.weight",
        "adaln_single.emb.timestep_embedder.linear_1.bias",
        "pos_embed.proj.bias",
    ],
    "Z-Image": ["noise_refiner.0.attention.to_q.weight", "noise_refiner.0.attention.norm_k.weight"],
}


@pytest.mark.parametrize("model", DIFFUSERS)
def test_diffusers_names_are_refused_with_the_reason(model: str, tmp_path: Path) -> None:
    """ComfyUI renames their weights while it loads and drops markers and scales in silence."""
    tensors = {
        name: make.weight(128, 128) if name.endswith(".weight") else make.weight(128)
        for name in DIFFUSERS[model]
    }
    path = make.save(tmp_path / "in.safetensors", tensors)
    with pytest.raises(PlanError, match="names of diffusers") as caught:
        cq_quant.quantize(cq.open(path))
    assert model in caught.value.message
    assert cq_quant.quantize(cq.open(path), format="fp16").specs  # a cast has no marker to lose


def test_native_names_are_not_taken_for_diffusers(base: Path) -> None:
    assert comfy.diffusers_model(cq.open(base).specs) is None
    qwen = ["transformer_blocks.0.attn.add_q_proj.weight", "txt_in.weight", "proj_out.weight"]
    assert comfy.diffusers_model(qwen) is None


# Quantized sources ------------------------------------------------------------------------------


@pytest.fixture
def quantized(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "int8.safetensors"
    cq.write(cq_quant.quantize(cq.open(base), optimizer="rtn"), path)
    return path


def test_a_quantized_source_is_told_what_it_is(quantized: Path) -> None:
    done = processes.quick("quant", quantized)
    assert done.code == 4
    assert "8 layers: 8 int8_tensorwise" in done.err
    assert "--requantize" in done.err


def test_requantizing_in_the_same_format_gives_the_same_integers(
    quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again.safetensors"
    done = processes.quick("quant", quantized, "--requantize", "--optimizer", "rtn", "-o", out)
    assert done.code == 0, done.err
    before, after = make.load(quantized), make.load(out)
    assert set(before) == set(after)
    for name, tensor in before.items():
        if tensor.dtype == torch.int8:
            assert torch.equal(tensor, after[name])


def test_requantizing_leaves_layers_that_are_kept_as_they_are(
    quantized: Path, tmp_path: Path
) -> None:
    """Not in float32, nor in any other dtype that would double them in silence."""
    out = tmp_path / "again.safetensors"
    model = cq_quant.quantize(
        cq.open(quantized), format="nvfp4", requantize=True, skip=["*.attn.proj"]
    )
    cq.write(model, out)
    before, found = make.load(quantized), make.load(out)
    for name in before:
        if ".attn.proj." in name:
            assert make.same(before[name], found[name])
    assert found[f"{PREFIX}blocks.0.mlp.0.weight"].dtype == torch.uint8
    assert processes.cq("verify", out).code == 0


def test_a_cast_with_only_undoes_these_layers_alone(quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "partly.safetensors"
    done = processes.quick("quant", quantized, "--format", "bf16", "--only", "*.mlp.0", "-o", out)
    assert done.code == 0, done.err
    found = make.load(out)
    assert found[f"{PREFIX}blocks.0.mlp.0.weight"].dtype == torch.bfloat16
    assert f"{PREFIX}blocks.0.mlp.0.weight_scale" not in found
    assert found[f"{PREFIX}blocks.0.mlp.2.weight"].dtype == torch.int8
    assert set(markers(out)) == {n for n in markers(quantized) if not n.endswith(".mlp.0")}


def test_what_is_saved_is_counted_from_the_quantized_file(quantized: Path) -> None:
    notes = cq_quant.quantize(cq.open(quantized), format="bf16").notes
    note = next(n for n in notes if n["layer"].endswith("blocks.0.mlp.0"))
    assert note["nbytes"] < note["nbytes_after"]


def test_a_cast_to_fp16_that_overflows_names_the_tensor(tmp_path: Path) -> None:
    weight = make.weight(64, 64, dtype="BF16")
    weight[3, 4] = 1e6
    path = make.save(tmp_path / "in.safetensors", {"blocks.0.a.weight": weight})
    done = processes.quick("quant", path, "--format", "fp16", "-o", tmp_path / "out.safetensors")
    assert done.code == 3
    assert "`blocks.0.a.weight`" in done.err
    assert "overflows fp16" in done.err


def test_bf16_undoes_a_quantization(base: Path, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.safetensors"
    assert processes.quick("quant", quantized, "--format", "bf16", "-o", out).code == 0
    plain, original = make.load(out), make.load(base)
    assert {n: (t.dtype, t.shape) for n, t in plain.items()} == {
        n: (t.dtype, t.shape) for n, t in original.items()
    }
    for name, tensor in original.items():
        error = float((plain[name].float() - tensor.float()).norm() / tensor.float().norm())
        assert error < 0.05
