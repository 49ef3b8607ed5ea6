"""Whether a model is whole is judged by what its family's releases have: held against the tensor
lists of all of them."""

from __future__ import annotations

import json
import random
import struct
from collections import defaultdict
from itertools import product
from pathlib import Path

import make
import pytest
from test_families import (
    KNOWN,
    PACKED,
    STRANGERS,
    Specs,
    expected,
    quantized,
    read,
    sd_vae,
    under,
)

import cq
import cq_edit
from cq.core import catalog, families
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError
from cq.core.knowledge import know
from cq.core.roster import filled, place
from cq_analyze import completeness, verify
from cq_quant import quantize

LINEAR = TensorSpec("BF16", (64, 64))
each_skeleton = pytest.mark.parametrize("skeleton", KNOWN)


def judged(specs: Specs) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Names and layers of the findings, and the notes."""
    tensors: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        layer, _, local = name.rpartition(".")
        tensors[layer][local] = spec
    marked = [layer for layer, own in tensors.items() if "comfy_quant" in own]
    found, notes = completeness.judge(specs, tensors, marked, know(specs))
    return [(one.name, one.layer) for one in found], notes


def without(specs: Specs, *starts: str) -> Specs:
    return {name: spec for name, spec in specs.items() if not name.startswith(starts)}


def coded(skeleton: str) -> Specs:
    return quantized(read(skeleton), "float8_e4m3fn", families.load(KNOWN[skeleton][0]))


# The rosters --------------------------------------------------------------------------------------


@each_skeleton
def test_a_roster_says_every_tensor_of_a_release_and_no_other(skeleton: str) -> None:
    roster = families.load(KNOWN[skeleton][0]).roster
    letter = roster.of(str(expected(skeleton, "")[0][1]))
    assert letter is not None
    counts = roster.releases[letter].counts
    told = set()
    for kind, spans in roster.kinds.items():
        count = range(counts.get(kind.partition("*")[0], 0))
        for span in spans:
            if letter in span.releases:
                every = [count if blocks is None else blocks for blocks in span.blocks]
                told |= {filled(kind, numbers) for numbers in product(*every)}
    assert told == set(read(skeleton))


def test_a_name_is_its_kind_and_its_numbers() -> None:
    for skeleton in KNOWN:
        for name in read(skeleton):
            assert filled(*place(name)) == name
    for name in ("b.007.x", f"b.{'9' * 5000}.x", "b.٣.x", "7", "", "."):
        assert filled(*place(name)) == name


# Whole models -------------------------------------------------------------------------------------


@each_skeleton
def test_nothing_is_found_in_a_released_model_and_in_one_quantized(skeleton: str) -> None:
    rng = random.Random(skeleton)
    family = families.load(KNOWN[skeleton][0])
    for prefix in ("", rng.choice(families.PREFIXES), rng.choice(families.PREFIXES)):
        assert judged(under(prefix, read(skeleton))) == ([], [])
    for format_name in rng.sample(PACKED, 3):
        assert judged(quantized(read(skeleton), format_name, family)) == ([], []), format_name


@pytest.mark.parametrize("stranger", STRANGERS)
def test_nothing_is_found_in_what_is_no_known_model(stranger: str) -> None:
    assert judged(STRANGERS[stranger]) == ([], [])


def sparse(path: Path, specs: Specs) -> Path:
    """A file of zeros that takes no room."""
    header: dict[str, object] = {}
    end = 0
    for name, spec in specs.items():
        place_ = [end, end + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": place_}
        end += spec.nbytes
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


@pytest.mark.parametrize("skeleton", ["flux1-dev", "wan21-vace-14b", "z-image", "te-t5xxl"])
def test_nothing_is_found_in_what_quant_makes(skeleton: str, tmp_path: Path) -> None:
    source = cq.open(sparse(tmp_path / "m.safetensors", read(skeleton)))
    for format_name in PACKED:
        if catalog.load("formats", format_name).first_comfyui is None:
            continue
        made = quantize(source, format=format_name, optimizer="rtn")
        assert len(made.specs) > len(source.specs)
        assert judged(dict(made.specs)) == ([], []), format_name


def test_nothing_is_found_in_a_checkpoint_of_several_models() -> None:
    whole = {
        **under("model.diffusion_model.", read("sd15-unet")),
        **under("cond_stage_model.transformer.", read("te-clip-l")),
        **under("first_stage_model.", sd_vae()),
        "alphas_cumprod": TensorSpec("F32", (1000,)),
        "model_ema.decay": TensorSpec("F32", ()),
    }
    assert judged(whole) == ([], [])
    part = "model.diffusion_model.middle_block.1.proj_in"
    assert judged(without(whole, f"{part}."))[0] == [("layers.missing", part)]


def test_tensors_under_the_other_names_of_a_family_are_there() -> None:
    """HunyuanVideo's as ComfyUI saves it, and a norm of FLUX.1 as other tools call it."""
    specs = read("hunyuan-video-13b")
    dialect = families.load("hunyuan-video").dialect
    renamed = {}
    for name, spec in specs.items():
        others = [o for o, how, whole in dialect.others(name) if whole and "blocks" in name]
        renamed[next((o for o in others if o.startswith(("double_", "single_"))), name)] = spec
    assert len(set(renamed) - set(specs)) > 100
    assert judged(renamed) == ([], [])
    assert judged(without(renamed, "double_blocks.3.img_mlp.0."))[0] == [
        ("layers.missing", "double_blocks.3.img_mlp.fc1")
    ]
    flux = {name.replace("_norm.scale", "_norm.weight"): s for name, s in read("flux1-dev").items()}
    assert judged(flux) == ([], [])


def test_a_model_under_names_of_an_unknown_tool_is_not_judged_by_them() -> None:
    specs = {name.replace("self_attn.", "sa."): s for name, s in read("wan21-t2v-14b").items()}
    found, notes = judged(specs)
    assert found == []
    assert len(notes) == 1 and "another tool's names" in notes[0]


@pytest.mark.parametrize(
    ("skeleton", "part"),
    [
        ("te-qwen2.5-vl-7b", "visual."),
        ("te-qwen3-8b", "lm_head."),
        ("te-t5xxl", "encoder.embed_tokens."),
        ("ltx-2-19b", "video_embeddings_connector."),
        ("hunyuan-video-1.5", "vision_in."),
        ("hunyuan-video-13b", "guidance_in."),
    ],
)
def test_a_part_may_be_left_out_but_only_as_a_whole(skeleton: str, part: str) -> None:
    specs = read(skeleton)
    assert judged(without(specs, part)) == ([], [])
    own = [name for name in specs if name.startswith(part)]
    for name in own[:1] if len(own) > 1 else ():
        assert len(judged(without(specs, name))[0]) == 1


# Broken models ------------------------------------------------------------------------------------

THREE = pytest.mark.parametrize(
    ("skeleton", "layer", "other", "top"),
    [
        ("flux1-dev", "double_blocks.2.img_mlp.0", "double_blocks.2.img_attn.norm.key_norm.scale",
         "img_in"),
        ("wan21-t2v-14b", "blocks.2.self_attn.q", "blocks.2.modulation", "head.head"),
        ("qwen-image", "transformer_blocks.2.attn.to_q", "transformer_blocks.2.attn.norm_q.weight",
         "img_in"),
    ],
)  # fmt: skip


@THREE
def test_whatever_is_missing_is_found_by_name(
    skeleton: str, layer: str, other: str, top: str
) -> None:
    specs = coded(skeleton)
    group = layer.partition(".")[0]
    blocks = len({name.split(".")[1] for name in specs if name.startswith(f"{group}.")})
    assert judged(specs) == ([], [])
    for number in (0, 2, blocks - 1):
        own = layer.replace(".2.", f".{number}.")
        assert judged(without(specs, f"{own}."))[0] == [("layers.missing", own)]
    assert judged(without(specs, f"{group}.2."))[0] == [("layers.missing", f"{group}.2")]
    every = [layer.replace(".2.", f".{i}.") for i in range(blocks)]
    lost = [("layers.missing", own) for own in every]
    assert judged(without(specs, *(f"{own}." for own in every)))[0] == lost
    lost = [("bias.missing", own) for own in every]
    assert judged(without(specs, *(f"{own}.bias" for own in every)))[0] == lost
    name = other.removesuffix(".weight")
    assert judged(without(specs, other))[0] == [("tensors.missing", name)]
    assert judged(without(specs, f"{top}."))[0] == [("layers.missing", top)]
    assert judged(without(specs, f"{top}.weight"))[0] == [("weight.missing", top)]
    assert judged(without(specs, f"{top}.bias"))[0] == [("bias.missing", top)]
    bare = {name: spec for name, spec in specs.items() if not name.endswith(".bias")}
    assert {name for name, _ in judged(bare)[0]} == {"bias.missing"}


@THREE
def test_fewer_and_more_blocks_are_a_note_and_a_block_astray_is_none(
    skeleton: str, layer: str, other: str, top: str
) -> None:
    specs = coded(skeleton)
    group = layer.partition(".")[0]
    blocks = len({name.split(".")[1] for name in specs if name.startswith(f"{group}.")})
    last = f"{group}.{blocks - 1}."
    found, notes = judged(without(specs, last))
    assert found == [] and len(notes) == 1
    assert f"has {blocks - 1} blocks `{group}.*`" in notes[0] and "blocks are lost" in notes[0]
    block = {name: spec for name, spec in specs.items() if name.startswith(last)}
    more = {name.replace(last, f"{group}.{blocks}."): spec for name, spec in block.items()}
    found, notes = judged({**specs, **more})
    assert found == [] and len(notes) == 1 and f"has {blocks + 1} blocks" in notes[0]
    astray = {name.replace(last, f"{group}.99."): spec for name, spec in block.items()}
    found, notes = judged({**specs, **astray})
    assert found and {name for name, _ in found} == {"layers.surplus"}
    assert all(str(own).startswith(f"{group}.99.") for _, own in found)
    plain = {f"{group}.99.{other.split('.2.')[1]}": LINEAR}
    found, notes = judged({**specs, **plain})
    assert found == [] and len(notes) == 1 and f"`{group}.99." in notes[0]


def test_a_surplus_layer_is_a_finding_where_it_is_quantized_and_else_a_note() -> None:
    specs = coded("flux1-dev")
    plain = {**specs, "foo.bar.weight": LINEAR, "foo.bar.bias": LINEAR}
    found, notes = judged(plain)
    assert found == [] and len(notes) == 1
    assert "2 tensors are none that a release of FLUX.1 has, such as `foo.bar.bias`" in notes[0]
    marked = {**plain, "foo.bar.comfy_quant": TensorSpec("U8", (9,))}
    assert judged(marked) == ([("layers.surplus", "foo.bar")], [])


@each_skeleton
def test_no_tensor_of_a_release_can_be_lost_unseen(skeleton: str) -> None:
    """Those by which the model is told among them."""
    specs = read(skeleton)
    family = families.load(KNOWN[skeleton][0])
    signatures = (*family.signatures, *(v.signature for v in family.variants))
    named = {name for own in signatures for name in (*own.has, *(s.tensor for s in own.sizes))}
    # With and without these a model is a release; the last is all that tells of its release.
    either = {"__x0__", "time_text_embed.addition_t_embedding.weight"}
    either |= {"vision_tower.patch_conv.weight", "lm_head.weight", "text_projection.weight"}
    either |= {"encoder.embed_tokens.weight", "language_model.lm_head.weight", "rope.inv_freq"}
    rng = random.Random(skeleton)
    some = rng.sample([name for name in specs if name not in either], 6)
    for name in [*(name for name in specs if name in named - either), *some]:
        found = judged({own: spec for own, spec in specs.items() if own != name})[0]
        assert len(found) == 1, name
        assert name.startswith(str(found[0][1])), name


def test_of_an_unknown_release_only_what_nearly_all_blocks_have_is_missed() -> None:
    wide = {**read("flux1-dev"), "img_in.weight": TensorSpec("BF16", (3072, 128))}
    assert know(wide).matches[0].variant is None
    assert judged(wide) == ([], [])
    layer = "single_blocks.7.linear1"
    assert judged(without(wide, f"{layer}."))[0] == [("layers.missing", layer)]
    assert judged(without(wide, "single_blocks.7."))[0] == [("layers.missing", "single_blocks.7")]
    assert judged(without(wide, "vector_in.out_layer.weight"))[0] == [
        ("weight.missing", "vector_in.out_layer")
    ]
    # Another release may do without it.
    rest = {name: spec for name, spec in wide.items() if ".txt_attn.norm." not in name}
    assert judged(rest) == ([], [])


def test_of_an_unknown_family_a_lost_bias_is_a_note() -> None:
    specs: Specs = {}
    for i in range(5):
        specs[f"x.{i}.up.weight"] = specs[f"x.{i}.up.bias"] = LINEAR
        specs[f"x.{i}.up.comfy_quant"] = TensorSpec("U8", (9,))
    assert judged(specs) == ([], [])
    found, notes = judged(without(specs, "x.2.up.bias"))
    assert found == []
    assert len(notes) == 1 and "`x.2.up` has no bias, but 4 of 5" in notes[0]


def test_of_an_unknown_family_a_bias_is_not_alone_in_one_block() -> None:
    specs: Specs = {f"x.{i}.up.{own}": LINEAR for i in range(5) for own in ("weight", "bias")}
    assert judged(without(specs, "x.2.up.weight")) == ([("weight.missing", "x.2.up")], [])
    # Activations with biases, and weights of other tools, are no layers without a weight.
    lone: Specs = {f"x.{i}.act.bias": LINEAR for i in range(5)}
    assert judged({**specs, **lone}) == ([], [])
    codes = {"x.2.up.qweight": TensorSpec("I32", (8, 64))}
    assert judged({**without(specs, "x.2.up.weight"), **codes}) == ([], [])


def test_wild_block_numbers_are_no_blocks() -> None:
    specs = coded("flux1-dev")
    for number in ("999999999", "9" * 5000, "00"):
        found, notes = judged({**specs, f"double_blocks.{number}.img_mlp.0.bias": LINEAR})
        assert found == [] and len(notes) == 1
    wide = {**read("flux1-dev"), "img_in.weight": TensorSpec("BF16", (3072, 128))}
    assert judged({**wide, "double_blocks.999999999.img_mlp.0.bias": LINEAR})[0] == []


# VAEs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_quantized_vae_is_unloadable_but_for_minimax(prefix: str) -> None:
    known = know(under(prefix, sd_vae()))
    assert "VAE" in str(known.unloadable(f"{prefix}decoder.mid.attn_1.q"))
    if prefix:
        assert known.unloadable("decoder.mid.attn_1.q") is None
        minimax = know({f"{prefix}decoder.x_embedder.weight": LINEAR})
        assert minimax.unloadable(f"{prefix}decoder.blocks.0.attn.qkv") is None


def test_verify_finds_a_quantized_layer_of_a_vae() -> None:
    tensors = {"decoder.mid.attn_1.q.weight": make.weight(64, 64)}
    source = make.checkpoint(make.part(tensors))
    made = quantize(source, format="int8_tensorwise", optimizer="rtn", only=["*"])
    layers = made.read_many(made.specs)
    for prefix in ("vae.", ""):
        conv = {f"{prefix}decoder.conv_in.weight": make.weight(4, 4, 3, 3)}
        vae = {**{prefix + name: tensor for name, tensor in layers.items()}, **conv}
        report = verify(make.checkpoint(make.part(vae)))
        layer = f"{prefix}decoder.mid.attn_1.q"
        assert [(f.name, f.layer) for f in report.findings] == [("layer.unloadable", layer)]


# Editing ------------------------------------------------------------------------------------------


def test_an_edit_that_takes_what_the_model_needs_is_refused(tmp_path: Path) -> None:
    model = cq.open(sparse(tmp_path / "m.safetensors", read("flux1-dev")))
    for pattern, name in [
        ("img_in.weight", "weight.missing"),
        ("double_blocks.3.*", "layers.missing"),
        ("*.key_norm.scale", "tensors.missing"),
        ("double_blocks.*.img_mlp.2.bias", "bias.missing"),
    ]:
        with pytest.raises(PlanError) as caught:
            cq_edit.edit(model, remove_keys=[pattern])
        assert name in caught.value.message
        left = cq_edit.edit(model, remove_keys=[pattern], allow_broken=True)
        assert name in {found.name for found in verify(left, header_only=True).findings}
    prefixed = cq_edit.edit(model, rename=["re:^=model.diffusion_model."])
    assert verify(prefixed, header_only=True).findings == ()
    whole = cq_edit.edit(prefixed, keep_keys=["model.diffusion_model.*"])
    assert verify(whole, header_only=True).findings == ()
