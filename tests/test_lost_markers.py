"""A layer that has lost its marker, in part or whole, is read as what it is or not at all: never as
something else that its tensors would fit as well."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from processes import cq as run
from test_families import read

import cq
from cq.core import catalog
from cq.core.checkpoint import Checkpoint
from cq.core.dequantize import Dequantize
from cq.core.errors import InputError, PlanError
from cq.core.stored import UNCLEAR
from cq_analyze import verify
from cq_edit import edit, split_components
from cq_quant import quantize

Tensors = dict[str, torch.Tensor]
STORING = [name for name in catalog.names("formats") if not catalog.load("formats", name).casts]
LAYER = "blocks.1.mlp.0"
N, K, BLOCKS = 128, 256, 4
GROUP = 64  # not the one that a marker without a group would have
# Formats that their tensors tell, with nothing of the marker left.
TOLD = ["awq_w4a16", "float8_e4m3fn", "float8_e5m2", "int8_blockwise", "mxfp8", "nvfp4"]


def held(tensors: Tensors) -> Checkpoint:
    return make.checkpoint(*(make.part({n: t.contiguous()}) for n, t in tensors.items()))


def base() -> Tensors:
    return {
        f"blocks.{i}.mlp.0.weight": make.weight(N, K, dtype="BF16", seed=i) for i in range(BLOCKS)
    }


def stored(name: str, *, rotated: bool = True) -> Tensors:
    """`base` in a format."""
    plug = catalog.load("formats", name)
    words: dict[str, Any] = {"optimizer": "rtn"}
    if plug.rotation != "never" and rotated:
        words["rotate"] = str(GROUP)
    elif plug.rotation == "optional":
        words["rotate"] = "off"
    made = quantize(held(base()), format=name, allow_custom_loader=True, only=["blocks.*"], **words)
    return made.read_many(made.specs)


def marker(settings: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def settings_of(tensors: Tensors, layer: str = LAYER) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tensors[f"{layer}.comfy_quant"].numpy().tobytes())
    return found


def without(tensors: Tensors, *keys: str, layer: str = LAYER) -> Tensors:
    left = {k: v for k, v in settings_of(tensors, layer).items() if k not in keys}
    return tensors | {f"{layer}.comfy_quant": marker(left)}


def bare(tensors: Tensors, layer: str = "") -> Tensors:
    """Without the markers of a layer, or of all."""
    return {n: t for n, t in tensors.items() if not (n.startswith(layer) and "comfy" in n)}


def value(checkpoint: Checkpoint) -> torch.Tensor:
    return Dequantize().apply(checkpoint).read(f"{LAYER}.weight")


def sole(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if n.startswith(LAYER)}


def flat(tensors: Tensors) -> Tensors:
    """With scales of rows in one dimension, as some tools write them."""
    return {
        n: t.flatten() if n.endswith("weight_scale") and t.shape == (N, 1) else t
        for n, t in tensors.items()
    }


# The claim


@pytest.mark.parametrize("shape", [dict, flat], ids=["own", "flat"])
@pytest.mark.parametrize("fellows", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", STORING)
def test_whatever_is_lost_of_a_marker_a_layer_becomes_what_it_was_or_nothing(
    name: str, rotated: bool, fellows: bool, shape: Callable[[Tensors], Tensors]
) -> None:
    whole = stored(name, rotated=rotated)
    expected = value(held(whole))
    model = shape(whole) if fellows else shape(sole(whole))
    keys = set(settings_of(whole)) - {"format"}
    left = [
        without(model, "format", *gone)
        for count in range(len(keys) + 1)
        for gone in combinations(sorted(keys), count)
    ]
    read = 0
    for broken in [*left, bare(model, LAYER), bare(model)]:
        for change in (lambda source: edit(source, migrate="comfy_quant"), lambda source: source):
            try:
                found = change(held(broken))
                mended = value(found)
            except (InputError, PlanError) as error:
                assert error.hint, error
                continue
            read += 1
            assert make.same(mended, expected), (settings_of(whole), broken.keys())
    assert read >= (2 * len(left) if name in TOLD else 0)


@pytest.mark.parametrize("name", TOLD)
def test_formats_that_tensors_tell_get_the_marker_back_that_they_had(name: str) -> None:
    whole = stored(name)
    for broken in (bare(whole), bare(whole, LAYER), without(whole, "format")):
        mended = edit(held(broken), migrate="comfy_quant")
        assert json.loads(mended.read_bytes(f"{LAYER}.comfy_quant")) == settings_of(whole)
        assert verify(mended, against=held(base())).passed


@pytest.mark.parametrize("name", ["convrot_w4a4", "asym_w4a8_int8", "int8_tensorwise"])
def test_a_rotation_that_the_marker_still_tells_is_enough(name: str) -> None:
    whole = stored(name)
    mended = edit(held(without(whole, "format")), migrate="comfy_quant")
    assert json.loads(mended.read_bytes(f"{LAYER}.comfy_quant")) == settings_of(whole)


# Packed int4 and int8


def test_bytes_that_may_be_int4_or_int8_are_refused_until_somebody_says_it() -> None:
    whole = stored("convrot_w4a4")
    model = held(bare(whole))
    told = r"may be `convrot_w4a4` of K=256 or `int8_tensorwise` of K=128"
    with pytest.raises(InputError, match=told) as caught:
        edit(model, migrate="comfy_quant")
    assert caught.value.code == UNCLEAR
    assert '--set-quant PATTERN \'{"format": "convrot_w4a4"' in (caught.value.hint or "")
    with pytest.raises(InputError, match=told):
        quantize(model, requantize=True)
    report = verify(model)
    assert {f.name for f in report.findings} == {"marker.missing"}
    assert all("nothing tells which" in f.sentence for f in report.findings)
    said = edit(
        model,
        migrate="comfy_quant",
        set_quant={"*": {"format": "convrot_w4a4", "convrot_groupsize": GROUP}},
    )
    assert verify(said, against=held(base())).passed
    assert json.loads(said.read_bytes(f"{LAYER}.comfy_quant")) == settings_of(whole)


@pytest.mark.parametrize("kind", ["convrot_w4a4", "int8_tensorwise"])
def test_layers_of_other_blocks_tell_how_wide_it_is(kind: str) -> None:
    whole = flat(stored(kind, rotated=kind != "int8_tensorwise"))
    plain = bare(sole(whole)) | {n: t for n, t in base().items() if not n.startswith(LAYER)}
    what = (
        "group by which its `convrot_w4a4`" if kind == "convrot_w4a4" else "its `int8_tensorwise`"
    )
    with pytest.raises(InputError, match=what):
        edit(held(plain), migrate="comfy_quant")
    kept = {"convrot_groupsize": GROUP} if kind == "convrot_w4a4" else {"convrot": False}
    left = plain | {f"{LAYER}.comfy_quant": marker(kept)}
    assert make.same(value(edit(held(left), migrate="comfy_quant")), value(held(whole)))
    if kind == "convrot_w4a4":  # a group alone may also be what is left of rotated int8
        with pytest.raises(InputError, match="nothing tells which"):
            edit(held(sole(left)), migrate="comfy_quant")


def test_verify_finds_a_layer_that_is_half_as_wide_as_its_fellows() -> None:
    whole = stored("convrot_w4a4")
    wrong = whole | {
        f"{LAYER}.weight_scale": whole[f"{LAYER}.weight_scale"][:, None],
        f"{LAYER}.comfy_quant": marker({"format": "int8_tensorwise"}),
    }
    (found,) = verify(held(wrong)).findings
    assert (found.name, found.layer) == ("weight.shape", LAYER)
    assert "decodes to K=128, but 3 of 4 layers `blocks.*.mlp.0` have K=256" in found.sentence
    asked = {LAYER: {"format": "convrot_w4a4", "convrot_groupsize": GROUP}}
    said = edit(held(wrong), set_quant=asked, allow_broken=True)
    assert verify(edit(said, migrate="comfy_quant"), against=held(base())).passed
    plain = {n: t for n, t in base().items() if not n.startswith(LAYER)} | sole(wrong)
    assert [f.name for f in verify(held(plain)).findings] == ["weight.shape"]
    with pytest.raises(PlanError, match="decodes to K=128"):
        edit(
            held(bare(whole, LAYER)),
            migrate="comfy_quant",
            set_quant={LAYER: {"format": "int8_tensorwise"}},
        )


# Rotated int8


@pytest.mark.parametrize("some", [True, False], ids=["one", "all"])
def test_rotated_int8_without_a_marker_does_not_become_unrotated(some: bool) -> None:
    whole = stored("int8_tensorwise")
    model = held(bare(whole, LAYER if some else ""))
    told = "nothing tells whether its `int8_tensorwise` codes are rotated"
    for change in (
        lambda: edit(model, migrate="comfy_quant"),
        lambda: quantize(model, requantize=True),
        lambda: quantize(model, format="bf16"),
    ):
        with pytest.raises(InputError, match=told) as caught:
            change()
        assert ("as other layers' are" in caught.value.message) == some
        group = GROUP if some else 256
        assert f'"convrot": true, "convrot_groupsize": {group}}}' in (caught.value.hint or "")
    finding = next(f for f in verify(model).findings if f.layer == LAYER)
    assert (finding.name, told in finding.sentence) == ("marker.missing", True)
    assert "--set-quant" in finding.mend
    asked = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
    said = edit(model, set_quant={LAYER if some else "*": asked})
    assert verify(said, against=held(base())).passed


def test_int8_among_unrotated_fellows_and_of_older_tools_is_still_migrated() -> None:
    whole = stored("int8_tensorwise", rotated=False)
    assert verify(edit(held(bare(whole, LAYER)), migrate="comfy_quant")).passed
    old = {n.replace("weight_scale", "scale_weight"): t for n, t in bare(whole).items()}
    assert make.same(value(edit(held(old), migrate="comfy_quant")), value(held(whole)))
    # Layers that could not have been rotated say nothing of those that could.
    narrow = make.weight(N, 9, dtype="BF16")
    made = quantize(held({"a.weight": narrow}), optimizer="rtn", rotate="off", only=["a"])
    with pytest.raises(InputError, match="nothing tells"):
        edit(held(bare(whole) | made.read_many(made.specs)), migrate="comfy_quant")


def test_integers_under_another_dtype_are_told_to_be_beyond_an_edit() -> None:
    whole = stored("int8_tensorwise", rotated=False)
    model = held(whole | {f"{LAYER}.weight": whole[f"{LAYER}.weight"].view(torch.uint8)})
    (found,) = verify(model).findings
    assert (found.name, found.layer) == ("weight.dtype", LAYER)
    assert "no edit mends them" in found.mend
    with pytest.raises(InputError, match="its codes are U8"):
        edit(model, migrate="comfy_quant")
    packed = stored("nvfp4")  # of these the label alone is wrong
    packed[f"{LAYER}.weight"] = packed[f"{LAYER}.weight"].view(torch.int8)
    (found,) = verify(held(packed)).findings
    assert found.name == "weight.dtype" and "--migrate" in found.mend
    assert verify(edit(held(packed), migrate="comfy_quant"), against=held(base())).passed


# Saying it


def test_a_layer_without_a_marker_gets_one_that_is_checked() -> None:
    whole = stored("nvfp4")
    model = held(bare(whole, LAYER))
    said = edit(model, set_quant={LAYER: {"format": "nvfp4"}})
    assert [(n["change"], n["name"]) for n in said.notes] == [("marker", f"{LAYER}.comfy_quant")]
    assert verify(said, against=held(base())).passed
    for settings, told in (
        ({"format": "mxfp8"}, "cannot have this marker as it is"),
        ({"format": "nvfp4", "convrot": True}, "has no setting `convrot`"),
        ({"format": "nvfp9"}, "cannot have the format"),
    ):
        with pytest.raises(PlanError, match=told):
            edit(model, set_quant={LAYER: settings})
    with pytest.raises(PlanError, match="matches no quantized layer"):
        edit(model, set_quant={LAYER: {"full_precision_matrix_mult": True}})
    both = edit(
        model, set_quant=[("*", {"format": "nvfp4"}), ("*", {"full_precision_matrix_mult": True})]
    )
    assert json.loads(both.read_bytes(f"{LAYER}.comfy_quant")) == {
        "format": "nvfp4",
        "full_precision_matrix_mult": True,
    }


@pytest.mark.parametrize("words", [{}, {"migrate": "comfy_quant"}])
def test_what_is_said_of_a_lost_marker_may_be_said_in_several_patches(words: Any) -> None:
    whole = stored("int8_tensorwise")
    narrow = make.weight(N, 9, dtype="BF16")  # which no group divides
    made = quantize(held({"a.weight": narrow}), optimizer="rtn", rotate="off", only=["a"])
    said = [
        ("*", {"format": "int8_tensorwise"}),
        ("blocks.*", {"convrot": True, "convrot_groupsize": GROUP}),
    ]
    model = held(bare(whole | made.read_many(made.specs)))
    mended = edit(model, set_quant=said, **words)
    assert verify(mended, against=held(base() | {"a.weight": narrow})).passed
    with pytest.raises(PlanError, match="so it is not changed"):
        edit(mended, set_quant=[("blocks.*", {"convrot_groupsize": 16})], **words)


def test_plain_float8_is_no_layer_that_lost_its_marker() -> None:
    plain = {"a.weight": make.weight(8, 8).to(torch.float8_e4m3fn)}
    with pytest.raises(PlanError, match="matches no quantized layer"):
        edit(held(stored("nvfp4") | plain), set_quant={"a": {"format": "float8_e4m3fn"}})


# Markers of strange types, settings that mean nothing


@pytest.mark.parametrize("left", [{"format": ["x"]}, {"format": {"a": 1}}, {"params": 3}, {"": []}])
@pytest.mark.parametrize("name", ["int8_tensorwise", "asym_w4a8_int8"])
def test_a_marker_of_strange_types_is_told_or_mended(name: str, left: dict[str, Any]) -> None:
    model = held(stored(name) | {f"{LAYER}.comfy_quant": marker(left)})
    for words in (
        {"set_quant": {"*": {"full_precision_matrix_mult": True}}},
        {"set_quant": {LAYER: {"format": name}}},
        {"migrate": "comfy_quant"},
        {"save_quant_metadata": True},
        {"quant_filter": [name], "set_quant": {"*": {"full_precision_matrix_mult": True}}},
    ):
        try:
            edit(model, **words)
        except (PlanError, InputError) as error:
            assert error.message
    assert not verify(model).passed
    whole = edit(model, set_quant={LAYER: settings_of(stored(name))}, allow_broken=True)
    assert make.same(value(whole), value(held(stored(name))))


# Removing, splitting, renaming


@pytest.mark.parametrize("local", ["pre_quant_scale", "weight_correction"])
def test_what_comfyui_does_not_read_goes_alone(local: str) -> None:
    whole = stored("int8_tensorwise") | {f"{LAYER}.{local}": torch.ones(K)}
    assert [f.name for f in verify(held(whole)).findings] == ["scale.ignored"]
    edited = edit(held(whole), remove_keys=[f"*.{local}"])
    assert verify(edited).passed
    smoothed = stored("nvfp4") | {f"{LAYER}.pre_quant_scale": torch.ones(K)}
    with pytest.raises(PlanError, match="cannot be removed alone"):
        edit(held(smoothed), remove_keys=["*.pre_quant_scale"])


def test_components_get_the_header_form_where_they_have_layers_for_it() -> None:
    unet = {f"model.diffusion_model.{n}": t for n, t in stored("nvfp4").items()}
    vae = {"first_stage_model.decoder.conv_in.weight": make.weight(2, 2)}
    parts = split_components(held(unet | vae), save_quant_metadata=True)
    saved = {name for name, part in parts.items() if "_quantization_metadata" in part.metadata}
    assert (sorted(parts), saved) == (["diffusion-model", "vae"], {"diffusion-model"})
    with pytest.raises(PlanError, match="has a marker"):
        split_components(
            held({**{f"model.diffusion_model.{n}": t for n, t in base().items()}, **vae}),
            save_quant_metadata=True,
        )


def skeleton(path: Path) -> Path:
    """A file with the names and shapes of a released model, and a hole for its weights."""
    entries, end = {}, 0
    for name, spec in read("wan21-t2v-1.3b").items():
        entries[name] = make.entry(spec.dtype, list(spec.shape), end, end + spec.nbytes)
        end += spec.nbytes
    path.write_bytes(make.file_bytes(entries))
    os.truncate(path, path.stat().st_size + end)
    return path


def test_a_rename_away_from_comfyuis_names_is_told(tmp_path: Path) -> None:
    path = skeleton(tmp_path / "m.safetensors")
    told = "is of no family that cq knows, and was Wan"
    done = run("edit", path, "--rename", "re:^blocks=layers", "--dry-run")
    assert (done.code, told in done.err) == (0, True), done.err
    prefixed = ("--rename", "re:^=model.diffusion_model.", "--dry-run")
    done = run("edit", path, *prefixed)
    assert (done.code, "by its new names" in done.err) == (0, False), done.err


# The command


@pytest.mark.parametrize(
    "words",
    [
        ["--set-quant", "*"],
        ["--set-quant", "*", "MODEL"],
        ["MODEL", "--set-quant", "*", "-o", "x.safetensors"],
        ["MODEL", "--set-quant=*", "--dry-run"],
        ["--set-quant", '{"convrot": true}', "MODEL"],
    ],
)
def test_settings_without_a_pattern_or_without_json_are_told(
    tmp_path: Path, words: list[str]
) -> None:
    path = make.save(tmp_path / "m.safetensors", stored("nvfp4"))
    done = run("edit", *(str(path) if word == "MODEL" else word for word in words))
    assert (done.code, done.out) == (2, "")
    assert "needs 2 values, a pattern and a JSON object" in done.err


def test_a_pattern_may_look_like_the_option(tmp_path: Path) -> None:
    path = make.save(tmp_path / "m.safetensors", stored("nvfp4"))
    json_ = '{"full_precision_matrix_mult": true}'
    done = run("edit", path, "--set-quant", "*", json_, "--set-quant", "*", json_, "--dry-run")
    assert done.code == 0, done.err
    done = run("edit", path, "--dry-run", "--set-quant", "--set-quant", json_)
    assert "matches no quantized layer" in done.err


def test_the_whole_way_on_files(tmp_path: Path) -> None:
    """What `verify` says to do, is done, and then nothing is wrong."""
    path = make.save(tmp_path / "m.safetensors", bare(stored("int8_tensorwise")))
    out = tmp_path / "o.safetensors"
    refused = run("edit", path, "--migrate", "comfy_quant", "-o", out)
    assert (refused.code, "--set-quant PATTERN" in refused.err) == (3, True)
    asked = f'{{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": {GROUP}}}'
    done = run("edit", path, "--migrate", "comfy_quant", "--set-quant", "*", asked, "-o", out)
    assert done.code == 0, done.err
    assert verify(cq.open(out), against=held(base())).passed
