"""An edit changes what it names and nothing else, says what it cannot do, and makes today's form
of every older one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from jsonschema import Draft202012Validator
from processes import at_terminal
from processes import cq as run
from test_dequantize import E4M3, E5M2, LAYER, TENSOR, VARIANTS, marker

import cq
import cq_edit
from cq.core import comfy, files, manifest, sink
from cq.core.checkpoint import Checkpoint
from cq.core.dequantize import Dequantize
from cq.core.errors import CqError, InputError, PlanError, UsageError
from cq.core.shards import index_path, plan, write_shards
from cq_analyze import verify
from cq_quant import quantize

Tensors = dict[str, torch.Tensor]
ROOT = Path(__file__).resolve().parent.parent


def header(layers: dict[str, Any]) -> dict[str, str]:
    return {comfy.HEADER_KEY: comfy.header_value(layers)}


def opened(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Checkpoint:
    apart = {name: tensor.clone() for name, tensor in tensors.items()}
    return cq.open(make.save(path, apart, metadata))


def int8(layer: str, *, rotated: bool = False) -> Tensors:
    """A sound layer, as comfy-kitchen's own quantizers store it."""
    weight = make.weight(32, 64, seed=layer)
    settings: dict[str, Any] = {"format": "int8_tensorwise"}
    codes, scale = kitchen.quantize_int8_rowwise(weight)
    if rotated:
        codes, scale = kitchen.quantize_int8_convrot_weight(weight, 64)
        settings |= {"convrot": True, "convrot_groupsize": 64}
    stored = {"weight": codes, "weight_scale": scale.float(), "comfy_quant": marker(**settings)}
    return {f"{layer}.{local}": tensor for local, tensor in stored.items()}


def tensors() -> Tensors:
    return {
        **int8("blocks.0.mlp"),
        **int8("blocks.1.mlp", rotated=True),
        "blocks.0.mlp.bias": make.weight(32, dtype="BF16"),
        "blocks.1.mlp.bias": make.weight(32, dtype="BF16"),
        "norm.scale": make.weight(8, dtype="F32"),
        "steps": torch.arange(4),
    }


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "m.safetensors", tensors(), {"author": "me"})


def settings_of(checkpoint: Checkpoint, layer: str) -> Any:
    return json.loads(checkpoint.read_bytes(f"{layer}.comfy_quant"))


def written(checkpoint: Checkpoint, path: Path) -> Tensors:
    cq.write(checkpoint, path)
    return make.load(path)


def changes(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    return [(note["change"], note["name"]) for note in checkpoint.notes]


# Removing and keeping


def test_removing_a_quantized_weight_takes_all_that_belongs_to_it(
    model: Checkpoint, tmp_path: Path
) -> None:
    edited = cq_edit.edit(model, remove_keys=["blocks.0.mlp.weight"])
    gone = {"blocks.0.mlp.weight", "blocks.0.mlp.weight_scale", "blocks.0.mlp.comfy_quant"}
    assert set(model.specs) - set(edited.specs) == gone
    for name, tensor in written(edited, tmp_path / "o.safetensors").items():
        assert make.same(tensor, tensors()[name])


def test_removing_a_layer_takes_its_entry_in_the_header(tmp_path: Path) -> None:
    entries = {f"blocks.{i}.mlp": settings_of_tensors(i) for i in range(2)}
    edited = cq_edit.edit(
        opened(tmp_path / "m.safetensors", tensors(), header(entries)), remove_keys=["blocks.0.mlp"]
    )
    assert list(comfy.header_layers(edited.metadata)) == ["blocks.1.mlp"]


def settings_of_tensors(i: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tensors()[f"blocks.{i}.mlp.comfy_quant"].numpy().tobytes())
    return found


@pytest.mark.parametrize("local", ["weight_scale", "comfy_quant"])
def test_a_scale_or_marker_alone_is_not_removed(model: Checkpoint, local: str) -> None:
    with pytest.raises(PlanError, match="cannot be removed alone") as caught:
        cq_edit.edit(model, remove_keys=[f"*.{local}"])
    assert caught.value.code == "plan.torn_layer"
    assert "--allow-broken" in (caught.value.hint or "")
    broken = cq_edit.edit(model, remove_keys=[f"*.{local}"], allow_broken=True)
    assert f"blocks.0.mlp.{local}" not in broken.specs
    assert verify(broken).findings


@pytest.mark.parametrize(
    ("layer", "local"),
    [("asym", "weight_codebook"), ("smoothed", "pre_quant_scale")],
)
def test_what_changes_the_value_silently_is_not_removed(
    tmp_path: Path, layer: str, local: str
) -> None:
    source = cq.open(make.save(tmp_path / "b.safetensors", make.model(dim=64)))
    made = quantize(source, format="asym_w4a8_int8" if layer == "asym" else "nvfp4")
    stored = written(made, tmp_path / "q.safetensors")
    stored["blocks.0.mlp.0.pre_quant_scale"] = torch.ones(64)
    model = opened(tmp_path / "m.safetensors", stored)
    with pytest.raises(PlanError, match="cannot be removed alone"):
        cq_edit.edit(model, remove_keys=[f"blocks.0.mlp.0.{local}"])


def test_an_optional_tensor_of_a_layer_goes_alone(tmp_path: Path) -> None:
    stored = {"weight": E4M3, "weight_scale": TENSOR, "input_scale": TENSOR}
    stored["comfy_quant"] = marker(format="float8_e4m3fn")
    model = opened(tmp_path / "m.safetensors", {f"{LAYER}.{k}": v for k, v in stored.items()})
    edited = cq_edit.edit(model, remove_keys=["*.input_scale"])
    assert changes(edited) == [("remove", f"{LAYER}.input_scale")]


def test_a_pattern_that_matches_nothing_says_what_is_near(model: Checkpoint) -> None:
    for words in ({"remove_keys": ["norm.scal"]}, {"keep_keys": ["norm.scal"]}):
        with pytest.raises(PlanError, match="matches no tensor") as caught:
            cq_edit.edit(model, **words)  # type: ignore[arg-type]
        assert "norm.scale" in (caught.value.hint or "")


def test_keeping_a_weight_keeps_its_scales(model: Checkpoint) -> None:
    edited = cq_edit.edit(model, keep_keys=["blocks.1.mlp.weight", "steps"])
    assert set(edited.specs) == {*int8("blocks.1.mlp"), "steps"}
    with pytest.raises(PlanError, match="not the weight that it belongs to"):
        cq_edit.edit(model, keep_keys=["*.weight_scale"])
    with pytest.raises(PlanError, match="nothing of"):
        cq_edit.edit(model, remove_keys=["*"])


# Adding


def test_added_tensors_bring_their_markers(model: Checkpoint, tmp_path: Path) -> None:
    other = {**int8("new.mlp"), "extra": torch.ones(3)}
    path = make.save(tmp_path / "other:1.safetensors", other)
    edited = cq_edit.edit(model, add_keys=[f"{path}:new.mlp.weight"])
    assert set(edited.specs) - set(model.specs) == set(int8("new.mlp"))
    assert verify(edited).passed
    stored = written(edited, tmp_path / "o.safetensors")
    assert all(make.same(stored[name], tensor) for name, tensor in int8("new.mlp").items())
    assert "other:1.safetensors" in json.dumps(edited.manifest())


def test_added_layers_enter_the_header_form(tmp_path: Path) -> None:
    base = opened(
        tmp_path / "m.safetensors",
        {k: v for k, v in tensors().items() if not k.startswith("blocks.1")},
        header({"blocks.0.mlp": settings_of_tensors(0)}),
    )
    alone = {k: v for k, v in int8("new.mlp").items() if not k.endswith("comfy_quant")}
    entry = {"format": "int8_tensorwise"}
    path = make.save(tmp_path / "o.safetensors", alone, header({"new.mlp": entry}))
    edited = cq_edit.edit(base, add_keys=[str(path)])
    assert comfy.header_layers(edited.metadata)["new.mlp"] == entry
    assert settings_of(edited, "new.mlp") == entry
    assert verify(edited).passed


def test_a_taken_name_needs_replace_and_takes_the_old_layer_away(
    model: Checkpoint, tmp_path: Path
) -> None:
    plain = {"blocks.0.mlp.weight": make.weight(32, 64, dtype="BF16")}
    path = make.save(tmp_path / "o.safetensors", plain)
    with pytest.raises(PlanError, match="already") as caught:
        cq_edit.edit(model, add_keys=[str(path)])
    assert "--replace" in (caught.value.hint or "")
    edited = cq_edit.edit(model, add_keys=[str(path)], replace=True)
    assert "blocks.0.mlp.weight_scale" not in edited.specs
    assert edited.specs["blocks.0.mlp.weight"].dtype == "BF16"
    assert verify(edited).passed


def test_scales_of_another_file_do_not_join_codes(model: Checkpoint, tmp_path: Path) -> None:
    path = make.save(tmp_path / "o.safetensors", int8("blocks.0.mlp"))
    with pytest.raises(PlanError, match="does not belong"):
        cq_edit.edit(model, add_keys=[f"{path}:*.weight_scale"], replace=True)


def test_an_added_file_that_is_missing_or_changed_is_told_by_name(
    model: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"gone\.safetensors` does not exist"):
        cq_edit.edit(model, add_keys=[f"{tmp_path}/gone.safetensors:re:a:b"])
    path = make.save(tmp_path / "o.safetensors", {"x": torch.ones(3)})
    line = json.dumps(cq_edit.edit(model, add_keys=[str(path)]).manifest()).encode()
    make.save(path, {"x": torch.zeros(3)})
    with pytest.raises(PlanError, match="has changed since"):
        manifest.load(line, where="stdin")


# Renaming


def test_a_layer_moves_as_a_whole_with_its_entry_in_the_header(tmp_path: Path) -> None:
    entries = {f"blocks.{i}.mlp": settings_of_tensors(i) for i in range(2)}
    model = opened(tmp_path / "m.safetensors", tensors(), header(entries))
    for words in (["re:^blocks[.](\\d)[.]mlp=layers.\\1.ff"], ["re:^blocks=layers", "re:mlp=ff"]):
        edited = cq_edit.edit(model, rename=words)
        assert {n.rpartition(".")[0] for n in edited.specs} == {
            "layers.0.ff",
            "layers.1.ff",
            "norm",
            "",
        }
        assert set(comfy.header_layers(edited.metadata)) == {"layers.0.ff", "layers.1.ff"}
        assert verify(edited).passed
    stored = written(edited, tmp_path / "o.safetensors")
    assert make.same(stored["layers.1.ff.weight"], tensors()["blocks.1.mlp.weight"])


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("norm=final", "norm.scale", "final.scale"),
        ("norm.=", "norm.scale", "scale"),
        ("norm=", "norm.scale", "scale"),
        ("norm.scale=n", "norm.scale", "n"),
        ("re:^=net.", "steps", "net.steps"),
        ("blocks.0=first", "blocks.0.mlp.bias", "first.mlp.bias"),
    ],
)
def test_rules_rename_tensors_layers_and_prefixes(
    model: Checkpoint, rule: str, old: str, new: str
) -> None:
    edited = cq_edit.edit(model, rename=[rule])
    assert old not in edited.specs
    assert edited.specs[new] == model.specs[old]


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("re:[.]weight_scale$=.s", "away from the rest of the quantized layer"),
        ("blocks.0.mlp.weight=w", "away from the rest"),
        ("blocks.0=blocks.1", "would be called"),
        ("norm.scale=steps", "would be called"),
        ("norm.scale=blocks.0.mlp.input_scale", "a part of the quantized layer"),
        ("zzz=y", "changes no name"),
        ("re:^steps$=", "leaves `steps` no name"),
    ],
)
def test_a_rule_that_tears_or_collides_is_refused(model: Checkpoint, rule: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        cq_edit.edit(model, rename=[rule])


@pytest.mark.parametrize("rule", ["x", "=y", "re:=y", "re:(=y", "re:a=\\3"])
def test_a_rule_that_is_none_is_a_usage_error(model: Checkpoint, rule: str) -> None:
    with pytest.raises(UsageError):
        cq_edit.edit(model, rename=[rule])


def test_a_name_that_no_format_may_have_is_refused(tmp_path: Path) -> None:
    source = cq.open(make.save(tmp_path / "b.safetensors", make.model(dim=64)))
    cq.write(quantize(source, format="nvfp4"), tmp_path / "q.safetensors")
    model = cq.open(tmp_path / "q.safetensors")
    with pytest.raises(PlanError, match=r"detection\.packed"):
        cq_edit.edit(model, rename=["blocks.0.mlp.0=x_embedder"])


# Markers


def test_settings_are_patched_in_marker_and_header(tmp_path: Path) -> None:
    entries = {f"blocks.{i}.mlp": settings_of_tensors(i) for i in range(2)}
    model = opened(tmp_path / "m.safetensors", tensors(), header(entries))
    edited = cq_edit.edit(model, set_quant=[("*.0.*", '{"full_precision_matrix_mult": true}')])
    wanted = {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
    assert settings_of(edited, "blocks.0.mlp") == wanted
    assert comfy.header_layers(edited.metadata)["blocks.0.mlp"] == wanted
    assert settings_of(edited, "blocks.1.mlp") == settings_of_tensors(1)
    back = cq_edit.edit(edited, set_quant={"*": {"full_precision_matrix_mult": None}})
    assert settings_of(back, "blocks.0.mlp") == settings_of_tensors(0)


def test_a_filter_is_a_format_or_a_pattern(tmp_path: Path) -> None:
    stored = {**tensors(), f"{LAYER}x.weight": E4M3, f"{LAYER}x.weight_scale": TENSOR}
    stored[f"{LAYER}x.comfy_quant"] = marker(format="float8_e4m3fn")
    model = opened(tmp_path / "m.safetensors", stored)
    patch = [("*", {"full_precision_matrix_mult": True})]
    for filters, count in ((["float8_e4m3fn"], 1), (["int8_tensorwise"], 2), (["*.1.*"], 1)):
        assert len(cq_edit.edit(model, set_quant=patch, quant_filter=filters).notes) == count
    with pytest.raises(PlanError, match=r"no layer of .* is stored as `nvfp4`"):
        cq_edit.edit(model, set_quant=patch, quant_filter=["nvfp4"])
    with pytest.raises(PlanError, match="leaves none"):
        cq_edit.edit(model, set_quant=[("*.0.*", patch[0][1])], quant_filter=["*.1.*"])
    with pytest.raises(UsageError, match="means nothing without `--set-quant`"):
        cq_edit.edit(model, quant_filter=["*"], set_meta={"a": "b"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{'convrot': true}", "are not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "not a JSON object"),
        ('{"convrot": 1}', "cannot be `1`"),
        ('{"convrot_groupsize": true}', "cannot be `true`"),
        ('{"linear_dtype": "int2"}', "cannot be"),
        ('{"orig_dtype": "rubbish"}', 'cannot be `"rubbish"`'),
        ('{"convrot": true, "convrot": false}', "name `convrot` twice"),
        ('{"full_precision_matrix_mult": NaN}', "are not JSON"),
    ],
)
def test_settings_are_real_json_of_the_right_types(model: Checkpoint, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        cq_edit.edit(model, set_quant=[("*", text)])


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"full_precision": True}, "plan.setting"),
        ({"linear_dtype": "int8"}, "plan.setting"),
        ({"format": "nvfp5"}, "plan.no_format"),
        ({"format": "nvfp4"}, "plan.setting_decodes"),
        ({"format": None}, "plan.no_format"),
        ({"convrot": True, "convrot_groupsize": 16}, "plan.setting_decodes"),
        ({"convrot": None}, "plan.setting_decodes"),
        ({"num_experts": 7}, "plan.setting"),
    ],
)
def test_settings_by_which_numbers_are_read_stay(
    model: Checkpoint, settings: dict[str, Any], code: str
) -> None:
    with pytest.raises(PlanError) as caught:
        cq_edit.edit(model, set_quant=[("blocks.1.mlp", settings)])
    assert caught.value.code == code


def test_a_marker_that_could_not_be_read_may_be_mended(tmp_path: Path) -> None:
    stored = tensors() | {"blocks.0.mlp.comfy_quant": marker(format="int9_tensorwise")}
    model = opened(tmp_path / "m.safetensors", stored)
    assert not verify(model).passed
    edited = cq_edit.edit(model, set_quant=[("blocks.0.mlp", {"format": "int8_tensorwise"})])
    assert verify(edited).passed
    assert settings_of(edited, "blocks.0.mlp") == settings_of_tensors(0)


# Casting


def test_plain_floats_are_cast_and_codes_are_left(model: Checkpoint, tmp_path: Path) -> None:
    edited = cq_edit.edit(model, cast=["*=bf16"])
    assert changes(edited) == [("cast", "norm.scale")]
    stored = written(edited, tmp_path / "o.safetensors")
    assert make.same(stored["norm.scale"], tensors()["norm.scale"].bfloat16())
    widened = cq_edit.edit(model, cast={"blocks.0.mlp": "fp32"})
    assert make.same(widened.read("blocks.0.mlp.bias"), tensors()["blocks.0.mlp.bias"].float())


def test_a_cast_that_overflows_or_cannot_be_is_an_error(tmp_path: Path) -> None:
    model = opened(tmp_path / "m.safetensors", {**tensors(), "big": torch.tensor([1e5, torch.inf])})
    with pytest.raises(InputError, match=r"1 values of `big` of .* overflow fp16"):
        cq.write(cq_edit.edit(model, cast=["big=fp16"]), tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()
    for name in ("blocks.0.mlp.weight", "blocks.0.mlp.weight_scale"):
        with pytest.raises(PlanError, match="part of a quantized layer") as caught:
            cq_edit.edit(model, cast=[f"{name}=bf16"])
        assert "cq quant --requantize" in (caught.value.hint or "")
    with pytest.raises(PlanError, match="not floating point"):
        cq_edit.edit(model, cast=["steps=bf16"])
    for rule in ("big", "big=int8", "=bf16"):
        with pytest.raises(UsageError):
            cq_edit.edit(model, cast=[rule])


# Metadata and the header form


def test_metadata_is_set_and_removed(model: Checkpoint) -> None:
    edited = cq_edit.edit(model, set_meta=["title=a=b"], remove_meta=["auth*"])
    assert edited.metadata == {"title": "a=b"}
    for wrong in ({"a=b": "c"}, {"": "c"}, {"a": 1}, {"a": "\udcff"}):
        with pytest.raises(UsageError):
            cq_edit.edit(model, set_meta=wrong)  # type: ignore[arg-type]
    for key in (comfy.HEADER_KEY, manifest.HISTORY_KEY):
        with pytest.raises(UsageError):
            cq_edit.edit(model, set_meta={key: "{}"})
        with pytest.raises(PlanError, match="matches no metadata entry"):
            cq_edit.edit(model, remove_meta=[key])


def test_the_header_form_is_complete_and_goes_again(model: Checkpoint, tmp_path: Path) -> None:
    saved = cq_edit.edit(model, save_quant_metadata=True)
    told = {f"blocks.{i}.mlp": settings_of_tensors(i) for i in range(2)}
    assert comfy.header_layers(saved.metadata) == told
    assert verify(saved).passed
    dropped = cq_edit.edit(saved, drop_quant_metadata=True)
    assert dropped.metadata == model.metadata
    with pytest.raises(PlanError, match="has no `_quantization_metadata`"):
        cq_edit.edit(model, drop_quant_metadata=True)
    alone = {k: v for k, v in tensors().items() if not k.endswith("comfy_quant")}
    header_only = opened(tmp_path / "h.safetensors", alone, header(told))
    marked = cq_edit.edit(header_only, drop_quant_metadata=True)
    assert [settings_of(marked, layer) for layer in told] == list(told.values())
    assert verify(marked).passed


def test_a_broken_header_form_can_be_dropped(tmp_path: Path) -> None:
    model = opened(tmp_path / "m.safetensors", tensors(), {comfy.HEADER_KEY: "{"})
    with pytest.raises(InputError, match="is not JSON") as caught:
        cq_edit.edit(model, set_meta={"a": "b"})
    assert "--drop-quant-metadata" in (caught.value.hint or "")
    assert verify(cq_edit.edit(model, drop_quant_metadata=True)).passed


def test_where_header_and_marker_disagree_edit_asks(tmp_path: Path) -> None:
    told = {"blocks.1.mlp": {"format": "int8_tensorwise"}}
    model = opened(tmp_path / "m.safetensors", tensors(), header(told))
    with pytest.raises(PlanError, match="other settings") as caught:
        cq_edit.edit(model, set_meta={"a": "b"})
    assert "--prefer" in (caught.value.hint or "")
    by_header = cq_edit.edit(model, prefer="header")
    assert settings_of(by_header, "blocks.1.mlp") == told["blocks.1.mlp"]
    by_markers = cq_edit.edit(model, prefer="markers")
    assert comfy.header_layers(by_markers.metadata) == {"blocks.1.mlp": settings_of_tensors(1)}
    assert verify(by_header).passed and verify(by_markers).passed


def test_entries_of_layers_that_are_not_there_go(tmp_path: Path) -> None:
    told = {"blocks.1.mlp": settings_of_tensors(1), "gone": {"format": "nvfp4"}}
    model = opened(tmp_path / "m.safetensors", tensors(), header(told))
    assert [f.name for f in verify(model).findings] == ["header.disagrees"]
    edited = cq_edit.edit(model, set_meta={"a": "b"})
    assert verify(edited).passed
    assert ("header", "gone") in changes(edited)


# Migrating

# Scales in another number than ComfyUI reads: only other codes would go with them.
UNFIT = [
    *("float8 by row", "float8 by square", "float8 blocks that are rows", "float8, no marker"),
    *("float8, no marker, squares", "float8 in blocks of a row, labelled as if by tensor"),
    "int8 in blocks of a row, labelled square",
]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in UNFIT])
def test_every_older_form_becomes_todays(tmp_path: Path, variant: str) -> None:
    stored, expected, label, _ = VARIANTS[variant]
    source = opened(tmp_path / "m.safetensors", {f"{LAYER}.{k}": v for k, v in stored.items()})
    edited = cq_edit.edit(source, migrate="comfy_quant")
    plain = label.startswith("plain")
    assert plain or verify(edited).passed, verify(edited).findings
    out = written(edited, tmp_path / "o.safetensors")
    assert make.bits(out[f"{LAYER}.weight"]) == make.bits(stored["weight"])
    values = Dequantize().apply(cq.open(tmp_path / "o.safetensors")).read(f"{LAYER}.weight")
    assert make.same(values, expected)
    if not plain:
        assert settings_of(edited, LAYER)["format"] == label
    assert not {n.rpartition(".")[2] for n in out} & {"scale_weight", "scale_input"}


@pytest.mark.parametrize("variant", UNFIT)
def test_what_needs_other_codes_is_not_migrated(tmp_path: Path, variant: str) -> None:
    stored = VARIANTS[variant][0]
    source = opened(tmp_path / "m.safetensors", {f"{LAYER}.{k}": v for k, v in stored.items()})
    with pytest.raises(PlanError, match="cannot be migrated") as caught:
        cq_edit.edit(source, migrate="comfy_quant")
    assert "cq quant --requantize" in (caught.value.hint or "")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("flags", [0, 2])
def test_scaled_fp8_gets_markers_by_the_weights_own_dtype(
    tmp_path: Path, prefix: str, flags: int
) -> None:
    """Mislabelled e5m2, names of the old form, its flag, and a static scale that says nothing."""
    old: Tensors = {f"{prefix}scaled_fp8": torch.zeros(flags, dtype=torch.float8_e4m3fn)}
    for layer, codes in (("a", E4M3), ("b", E5M2)):
        old[f"{prefix}{layer}.weight"] = codes
        old[f"{prefix}{layer}.scale_weight"] = TENSOR.reshape(1)
    old[f"{prefix}a.scale_input"] = torch.tensor(0.25)
    old[f"{prefix}b.scale_input"] = torch.tensor(1.0)
    source = opened(tmp_path / "m.safetensors", old, {"keep": "me"})
    edited = cq_edit.edit(source, migrate="comfy_quant")
    extra = {"full_precision_matrix_mult": True} if flags else {}
    assert settings_of(edited, f"{prefix}a") == {"format": "float8_e4m3fn", **extra}
    assert settings_of(edited, f"{prefix}b") == {"format": "float8_e5m2", **extra}
    local = ("comfy_quant", "weight", "weight_scale")
    names = {f"{prefix}{layer}.{n}" for layer in "ab" for n in local} | {f"{prefix}a.input_scale"}
    assert set(edited.specs) == names
    assert edited.specs[f"{prefix}a.weight_scale"].shape == ()
    assert edited.metadata == {"keep": "me"}
    assert verify(edited).passed
    assert make.same(written(edited, tmp_path / "o.safetensors")[f"{prefix}b.weight"], E5M2)


def test_migrating_is_what_quant_would_have_written(tmp_path: Path) -> None:
    """The header form alone, other words and other shapes: equal bytes come of them."""
    base = cq.open(make.save(tmp_path / "b.safetensors", make.model(dim=64)))
    cq.write(quantize(base), tmp_path / "q.safetensors")
    stored = make.load(tmp_path / "q.safetensors")
    entries, old = {}, {}
    for name, tensor in stored.items():
        layer, _, local = name.rpartition(".")
        if local == "comfy_quant":
            told = json.loads(tensor.numpy().tobytes())
            entries[layer] = {**told, "format": "int8_axiswise"}
        elif local == "weight_scale":
            old[name] = tensor.flatten()
        else:
            old[name] = tensor
    model = opened(tmp_path / "m.safetensors", old, header(entries))
    edited = cq_edit.edit(model, migrate="comfy_quant")
    out = written(edited, tmp_path / "o.safetensors")
    assert set(out) == set(stored)
    assert all(make.same(out[name], tensor) for name, tensor in stored.items())
    assert comfy.HEADER_KEY not in edited.metadata


def test_a_sound_file_has_nothing_to_migrate(model: Checkpoint) -> None:
    assert cq_edit.edit(model, migrate="comfy_quant").notes == ()


# Components


def combined() -> Tensors:
    unet = {f"model.diffusion_model.{k}": v for k, v in tensors().items()}
    return {
        **unet,
        "first_stage_model.decoder.conv_in.weight": make.weight(2, 2),
        "text_encoders.t5xxl.transformer.encoder.x.weight": make.weight(2, 2),
        "text_encoders.t5xxl.logit_scale": torch.tensor(1.0),
        "text_encoders.clip_l.transformer.text_model.x.weight": make.weight(2, 2),
    }


def test_components_are_extracted_without_their_prefix(tmp_path: Path) -> None:
    entries = {f"model.diffusion_model.blocks.{i}.mlp": settings_of_tensors(i) for i in range(2)}
    model = opened(tmp_path / "m.safetensors", combined(), header(entries))
    for name in ("transformer", "diffusion-model", "model.diffusion_model"):
        found = cq_edit.edit(model, extract_component=name)
        assert set(found.specs) == set(tensors())
        assert set(comfy.header_layers(found.metadata)) == {"blocks.0.mlp", "blocks.1.mlp"}
        assert verify(found).passed
    text = cq_edit.edit(model, extract_component="text_encoders.t5xxl")
    assert set(text.specs) == {"encoder.x.weight", "logit_scale"}
    parts = cq_edit.split_components(model, set_meta={"a": "b"})
    assert sorted(parts) == [
        "diffusion-model",
        "text_encoders.clip_l",
        "text_encoders.t5xxl",
        "vae",
    ]
    assert sum(len(part.specs) for part in parts.values()) == len(model.specs)
    assert all(part.metadata["a"] == "b" for part in parts.values())
    with pytest.raises(PlanError, match="several components called `text-encoder`"):
        cq_edit.edit(model, extract_component="text-encoder")
    with pytest.raises(PlanError, match="no component called `lora`"):
        cq_edit.edit(model, extract_component="lora")


# The stage


EVERYTHING: dict[str, Any] = {
    "remove_keys": ["steps"],
    "rename": ["blocks.0=b", "re:^norm=n"],
    "set_quant": [("blocks.0.mlp", {"full_precision_matrix_mult": True})],
    "quant_filter": ["int8_tensorwise"],
    "cast": ["norm.*=fp16"],
    "set_meta": {"a": "b"},
    "remove_meta": ["author"],
    "save_quant_metadata": True,
    "migrate": "comfy_quant",
    "prefer": "markers",
}


def test_the_stage_travels_in_a_manifest(model: Checkpoint, tmp_path: Path) -> None:
    path = make.save(tmp_path / "other.safetensors", {"x": torch.ones(3)})
    edited = cq_edit.edit(model, **EVERYTHING, add_keys=[f"{path}:x"])
    again = manifest.load(json.dumps(edited.manifest()).encode(), where="stdin")
    assert again.manifest() == edited.manifest()
    cq.write(edited, tmp_path / "a.safetensors")
    cq.write(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    history = json.loads(make.metadata(tmp_path / "a.safetensors")[manifest.HISTORY_KEY])
    assert history["stages"][-1]["add_keys"][0]["name"] == "other.safetensors"
    stage = edited.stages[-1]
    assert cq_edit.EditStage.from_arguments(stage.arguments()).arguments() == stage.arguments()


@pytest.mark.parametrize(
    "arguments",
    [
        {"remove": ["x"]},
        {"remove_keys": "x"},
        {"remove_keys": [1]},
        {"set_quant": [["*", "{}"]]},
        {"set_quant": [["*", {"convrot": 3}]]},
        {"add_keys": ["x"]},
        {"add_keys": [{"path": "x", "strength": 1}]},
        {"rename": ["x"]},
        {"cast": ["x=int8"]},
        {"set_meta": {"a": "b"}},
        {"set_meta": ["a"]},
        {"migrate": "gguf"},
        {"allow_broken": 1},
    ],
)
def test_arguments_that_are_none_are_an_input_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        cq_edit.EditStage.from_arguments(arguments)
    assert caught.value.code.startswith("input")


def test_editing_reads_no_tensor_that_it_does_not_change(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = cq_edit.edit(model, **EVERYTHING)
    extents = {part.name for part in edited.parts if part.extent is not None}
    computed = {part.name for part in edited.parts} - extents
    assert computed == {"b.mlp.comfy_quant", "n.scale"}
    assert all(part.extent or part.constant or part.name == "n.scale" for part in edited.parts)


def test_editing_a_merged_checkpoint_is_the_same_fused_as_through_a_file(tmp_path: Path) -> None:
    base = cq.open(make.save(tmp_path / "b.safetensors", make.model(dim=64)))
    words: dict[str, Any] = {"rename": ["blocks=layers"], "remove_keys": ["blocks.1.mlp.0"]}
    cq.write(cq_edit.edit(quantize(base), **words), tmp_path / "fused.safetensors")
    cq.write(quantize(base), tmp_path / "q.safetensors")
    staged = cq_edit.edit(cq.open(tmp_path / "q.safetensors"), **words)
    cq.write(staged, tmp_path / "staged.safetensors")
    assert (tmp_path / "fused.safetensors").read_bytes() == (
        tmp_path / "staged.safetensors"
    ).read_bytes()


def test_an_edit_of_nothing_is_a_usage_error(model: Checkpoint) -> None:
    with pytest.raises(UsageError, match="nothing to edit"):
        cq_edit.edit(model)
    with pytest.raises(UsageError, match="`--prefer` cannot be `both`"):
        cq_edit.edit(model, prefer="both")
    with pytest.raises(UsageError, match="exclude"):
        cq_edit.edit(model, save_quant_metadata=True, drop_quant_metadata=True)


# Files: in place, shards, holes


def test_in_place_keeps_the_file_until_the_new_one_is_complete(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    path.chmod(0o640)
    before = path.read_bytes()
    edited = cq_edit.edit(model, remove_keys=["steps"])
    with pytest.raises(PlanError, match="never overwrites"):
        cq.write(edited, path, force=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(CqError, match="no space"):
        patched.setattr(files, "reserve", full)
        cq.write(edited, path, in_place=True)
    assert path.read_bytes() == before
    cq.write(edited, path, in_place=True)
    assert "steps" not in make.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]


def test_in_place_through_a_link_replaces_the_file_behind_it(
    model: Checkpoint, tmp_path: Path
) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to("m.safetensors")
    done = run("edit", link, "--remove-keys", "steps", "--in-place", "-q")
    assert (done.code, done.err) == (0, "")
    assert link.is_symlink()
    assert "steps" not in make.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("limit", [2_000, 4_000, 1 << 30])
def test_shards_hold_whole_layers_and_make_the_same_checkpoint(
    model: Checkpoint, tmp_path: Path, limit: int
) -> None:
    index = tmp_path / "out" / "m.safetensors.index.json"
    index.parent.mkdir()
    wrote = write_shards(model, index, max_bytes=limit)
    shards = sorted(index.parent.glob("*.safetensors"))
    assert len(shards) == {2_000: 3, 4_000: 2, 1 << 30: 1}[limit]
    assert wrote.nbytes == sum(path.stat().st_size for path in shards)
    for path in shards:
        held = make.load(path)
        layers = {name.rpartition(".")[0] for name in held if "." in name}
        assert path.stat().st_size <= limit or len(layers) == 1
        assert all(n in held for n in tensors() if n.rpartition(".")[0] in layers)
    again = cq.open(index)
    assert again.metadata == model.metadata
    assert written(again, tmp_path / "one.safetensors").keys() == tensors().keys()
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert not list(index.parent.glob("*.partial*"))


def test_shards_go_on_where_they_were_cut_off(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "s.safetensors.index.json"
    shards = plan(model, index, 2_000)
    real = sink.FileSink.copy

    def cut(self: Any, name: str, *rest: Any) -> None:
        if name in shards[2].checkpoint.specs:
            raise KeyboardInterrupt
        real(self, name, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sink.FileSink, "copy", cut)
        write_shards(model, index, max_bytes=2_000, workers=1)
    assert not index.exists()
    assert not any(shard.path.exists() for shard in shards)
    made = index.with_name(f"{index.name}.partial")
    times = [(made / shards[i].path.name).stat().st_mtime_ns for i in range(2)]
    with pytest.raises(PlanError, match="unfinished work of another command"):
        write_shards(model, index, max_bytes=3_000)
    wrote = write_shards(model, index, max_bytes=2_000)
    assert wrote.parts_resumed > 0
    assert [shards[i].path.stat().st_mtime_ns for i in range(2)] == times
    assert set(cq.open(index).specs) == set(model.specs)
    with pytest.raises(PlanError, match="exists already"):
        write_shards(model, index, max_bytes=2_000)
    write_shards(model, index, max_bytes=2_000, force=True)


def test_shards_need_a_name_and_a_size(model: Checkpoint, tmp_path: Path) -> None:
    assert index_path("a.safetensors") == Path("a.safetensors.index.json")
    with pytest.raises(UsageError, match="cannot name several files"):
        index_path("a.bin")
    with pytest.raises(UsageError, match="0 bytes"):
        write_shards(model, tmp_path / "a.safetensors", max_bytes=0)


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="no holes on this system")
def test_holes_are_not_read_and_read_as_zeros(tmp_path: Path) -> None:
    spec = make.entry("U8", [1 << 24], 0, 1 << 24)
    raw = make.file_bytes({"a": spec, "b": make.entry("U8", [4], 1 << 24, (1 << 24) + 4)})
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(raw)
        file.seek(len(raw) + (1 << 23))
        file.write(b"data")
        file.seek(len(raw) + (1 << 24))
        file.write(b"tail")
    fd = os.open(path, os.O_RDONLY)
    assert files.hole(fd, len(raw) + (1 << 20), 1 << 22) == 1 << 22
    assert files.hole(fd, len(raw) + (1 << 24), 4) == 0
    os.close(fd)
    cq.write(cq_edit.edit(cq.open(path), set_meta={"a": "b"}), tmp_path / "o.safetensors")
    copy = cq.open(tmp_path / "o.safetensors")
    whole = copy.read("a").numpy().tobytes()
    assert whole == bytes(1 << 23) + b"data" + bytes((1 << 23) - 4)
    assert copy.read_bytes("b") == b"tail"


# The command


def test_edit_pipes_a_manifest_and_writes_a_file(model: Checkpoint, tmp_path: Path) -> None:
    passed = run("edit", tmp_path / "m.safetensors", "--remove-keys", "steps")
    assert passed.code == 0
    assert "1 removed" in passed.err
    out = tmp_path / "o.safetensors"
    done = run(
        *("edit", "--set-quant", "*", '{"full_precision_matrix_mult": true}'),
        *("--save-quant-metadata", "-o", out),
        stdin=passed.out.encode(),
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["source"][0]["path"] == str(out)
    assert verify(cq.open(out)).passed
    assert len(json.loads(make.metadata(out)[manifest.HISTORY_KEY])["stages"]) == 2


def test_edit_shows_the_difference_and_its_json_is_as_described(
    model: Checkpoint, tmp_path: Path
) -> None:
    words = ("edit", tmp_path / "m.safetensors", "--cast", "norm*=bf16", "--rename", "blocks=b")
    shown = run(*words, "--dry-run")
    assert shown.code == 0
    assert "F32[8]" in shown.out and "BF16[8]" in shown.out and "-16 B" in shown.out
    assert "nothing was written" in shown.err
    document = json.loads(run(*words, "--dry-run", "--json").out)
    described("plan", document)
    assert {note["change"] for note in document["decisions"]} == {"cast", "rename"}
    person = at_terminal(*words, cwd=tmp_path)
    assert "hint: add `-o FILE`" in person.out


def described(name: str, document: Any) -> None:
    path = ROOT / "docs" / "reference" / "schemas" / f"{name}.schema.json"
    Draft202012Validator(json.loads(path.read_text())).validate(document)


def test_edit_splits_components_into_a_directory(tmp_path: Path) -> None:
    path = make.save(tmp_path / "m.safetensors", combined())
    where = tmp_path / "parts"
    dry = run("edit", path, "--split-components", "-o", where, "--dry-run", "--json")
    described("split", json.loads(dry.out))
    assert not where.exists()
    done = run("edit", path, "--split-components", "-o", where, "--json")
    assert done.code == 0, done.err
    described("split", json.loads(done.out))
    assert sorted(p.name for p in where.iterdir()) == [
        "m-diffusion-model.safetensors",
        "m-text_encoders.clip_l.safetensors",
        "m-text_encoders.t5xxl.safetensors",
        "m-vae.safetensors",
    ]
    assert set(make.load(where / "m-diffusion-model.safetensors")) == set(tensors())
    again = run("edit", path, "--split-components", "-o", where)
    assert (again.code, "exists already" in again.err) == (4, True)


def test_edit_shards_and_unshards(model: Checkpoint, tmp_path: Path) -> None:
    path, index = tmp_path / "m.safetensors", tmp_path / "s.safetensors.index.json"
    done = run("edit", path, "--max-shard-size", "2kB", "-o", index)
    assert done.code == 0, done.err
    assert "ComfyUI reads single files only" in done.err
    one = tmp_path / "one.safetensors"
    assert run("edit", index, "--unshard", "-o", one).code == 0
    assert one.read_bytes() == path.read_bytes()
    refused = run("edit", path, "--unshard", "-o", one, "--force")
    assert (refused.code, "one file already" in refused.err) == (4, True)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--set-quant", "*"], 2, "needs 2 values"),
        ([], 2, "nothing to edit"),
        (["--in-place", "-o", "x", "--set-meta", "a=b"], 2, "exclude each other"),
        (["--split-components"], 2, "add `-o DIR`"),
        (["--max-shard-size", "1kB"], 2, "several files need a name"),
        (["--set-meta", "a"], 2, "is not a metadata entry"),
        (["--remove-keys", "re:("], 2, "not a regular expression"),
        (["--remove-keys", "*.comfy_quant"], 4, "cannot be removed alone"),
    ],
)
def test_edit_says_what_is_wrong(
    model: Checkpoint, tmp_path: Path, words: list[str], code: int, told: str
) -> None:
    done = run("edit", tmp_path / "m.safetensors", *words)
    assert (done.code, done.out) == (code, "")
    assert told in done.err
    assert "Traceback" not in done.err


def test_in_place_refuses_what_is_no_single_file(model: Checkpoint, tmp_path: Path) -> None:
    piped = run("edit", tmp_path / "m.safetensors", "--remove-keys", "steps").out.encode()
    done = run("edit", "--in-place", "--set-meta", "a=b", stdin=piped)
    assert (done.code, "single file" in done.err) == (2, True)


def test_editing_needs_no_torch_unless_it_computes(model: Checkpoint, tmp_path: Path) -> None:
    script = (
        "import sys; from cq.cli.main import run; from cq.cli.output import Terminal\n"
        "code = run(sys.argv[1:], Terminal()); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = ["edit", str(tmp_path / "m.safetensors"), "--rename", "blocks=b", "--set-quant", "*"]
    words += ['{"full_precision_matrix_mult": true}', "-q", "-o", str(tmp_path / "o.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert verify(cq.open(tmp_path / "o.safetensors")).passed
