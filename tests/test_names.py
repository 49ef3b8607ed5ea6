"""Names of layers: every name that diffusers, trainers and ComfyUI have for a layer finds the rows
it means, and no other.

The oracle for the names of diffusers is what diffusers' own converters do with every row of the
released models (`tests/golden/diffusers_names.py`).
"""

from __future__ import annotations

import re
from functools import cache

import pytest

from cq.core import dialects, families
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.names import Names, Target, parse_map
from tests.golden.diffusers_names import Sources, read
from tests.test_families import KNOWN, Specs, under
from tests.test_families import read as skeleton_specs

GOLDEN = read()
DIFFUSION = "model.diffusion_model."
each_golden = pytest.mark.parametrize("skeleton", GOLDEN)


@cache
def names(skeleton: str, prefix: str = "") -> Names:
    return Names(under(prefix, skeleton_specs(skeleton)))


def split(tensor: str) -> tuple[str, str]:
    """The key that an adapter has for a tensor, and the parameter."""
    found = re.fullmatch(r"(.+)\.(weight|bias)", tensor)
    return (found[1], found[2]) if found else (tensor, "weight")


def place(sources: Sources, prefix: str = "") -> tuple[Target, ...]:
    targets, first = [], 0
    for tensor, start, count in sources:
        targets.append(Target(prefix + tensor, start, count, first))
        first += count
    return tuple(targets)


def one(names: Names, key: str, parameter: str = "weight") -> tuple[Target, ...]:
    (found,) = names.find(key, parameter)  # type: ignore[arg-type]
    return found


def whole(tensor: str, rows: int) -> tuple[Target, ...]:
    return (Target(tensor, 0, rows, 0),)


# Names of diffusers -----------------------------------------------------------------------------


@each_golden
def test_every_diffusers_name_finds_the_rows_that_diffusers_takes_it_from(skeleton: str) -> None:
    for tensor, sources in GOLDEN[skeleton].items():
        key, parameter = split(tensor)
        if tensor.startswith("motion_encoder.") and not tensor.startswith("motion_encoder.enc."):
            continue  # convolutions of other shapes: not in the table
        if skeleton == "krea2" and len(sources) > 1:
            assert names(skeleton).find(key) == ()  # a matrix there, a vector here
            continue
        assert one(names(skeleton), f"transformer.{key}", parameter) == place(sources), tensor
        underscored = "lora_transformer_" + key.replace(".", "_")
        assert one(names(skeleton), underscored, parameter) == place(sources), tensor


@pytest.mark.parametrize("skeleton", ["flux1-dev", "sdxl-unet", "z-image", "wan21-i2v-14b"])
@pytest.mark.parametrize(
    "spelling",
    ["{}", "transformer.{}", "diffusion_model.{}", "base_model.model.{}", "lycoris_{_}",
     "unet.base_model.model.{}", "base_model.model.transformer.{}", "lora_unet_{_}"],
)  # fmt: skip
def test_every_spelling_finds_diffusers_and_native_names(skeleton: str, spelling: str) -> None:
    found = names(skeleton, DIFFUSION)
    for tensor, sources in [*GOLDEN[skeleton].items()][::23]:
        key, parameter = split(tensor)
        written = spelling.replace("{_}", key.replace(".", "_")).replace("{}", key)
        assert one(found, written, parameter) == place(sources, DIFFUSION)
    for tensor, spec in [*skeleton_specs(skeleton).items()][::23]:
        key, parameter = split(tensor.removesuffix(".scale"))
        written = spelling.replace("{_}", key.replace(".", "_")).replace("{}", key)
        assert one(found, written, parameter) == whole(DIFFUSION + tensor, spec.shape[0])


@pytest.mark.parametrize("skeleton", KNOWN)
def test_no_name_of_a_real_model_is_ambiguous(skeleton: str) -> None:
    for tensor in [*skeleton_specs(skeleton)][::5]:
        key, parameter = split(tensor.removesuffix(".scale"))
        assert len(names(skeleton).find(key, parameter)) == 1, tensor  # type: ignore[arg-type]


def test_kohya_and_processor_names_of_unets() -> None:
    found = names("sdxl-unet")
    layer = "input_blocks.4.1.transformer_blocks.0.attn1."
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1."
    for key in (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out",
        f"unet.{block}processor.to_out",
        f"unet.{block}to_out.0",
        f"{block}processor.to_out",
    ):
        assert one(found, key) == whole(f"{layer}to_out.0.weight", 640), key
    assert one(found, f"unet.{block}processor.to_q") == whole(f"{layer}to_q.weight", 640)


def test_a_unet_of_other_sizes_has_the_names_of_its_structure() -> None:
    """Stable Diffusion 2 is SD 1 with wider text, of which no release is known."""
    specs = {
        n: TensorSpec(s.dtype, (s.shape[0], 1024)) if ".attn2.to_k." in n else s
        for n, s in skeleton_specs("sd15-unet").items()
    }
    assert one(Names(specs), "lora_unet_mid_block_attentions_0_proj_in") == whole(
        "middle_block.1.proj_in.weight", 1280
    )
    assert Names(specs, family="none").find("lora_unet_mid_block_attentions_0_proj_in") == ()


def test_parameters_scales_and_tensors_of_no_layer() -> None:
    flux, z_image, sd3 = names("flux1-dev"), names("z-image"), names("sd3.5-medium")
    norm = "double_blocks.0.img_attn.norm.query_norm"
    assert one(flux, norm) == whole(f"{norm}.scale", 128)
    assert flux.find(norm, "bias") == ()
    assert one(flux, "transformer.transformer_blocks.0.attn.norm_q") == whole(f"{norm}.scale", 128)
    assert one(z_image, "diffusion_model.x_pad_token") == whole("x_pad_token", 1)
    assert one(sd3, "pos_embed") == whole("pos_embed", 1)
    assert one(Names({"scale": TensorSpec("F32", ())}), "scale") == whole("scale", 1)


def test_flux_names_of_other_tools() -> None:
    flux = names("flux1-dev")
    linear1 = "single_blocks.3.linear1.weight"
    assert one(flux, "diffusion_model.single_blocks.3.linear1_qkv") == whole(linear1, 9216)
    assert one(flux, "single_blocks.3.processor.qkv_lora") == whole(linear1, 9216)
    qkv = "double_blocks.3.txt_attn.qkv.weight"
    assert one(flux, "double_blocks.3.processor.qkv_lora2") == whole(qkv, 9216)


def test_hunyuan_video_is_found_by_both_of_its_spellings_in_files_of_both() -> None:
    tencent = skeleton_specs("hunyuan-video-13b")
    comfy = {_comfyui_hunyuan(name): spec for name, spec in tencent.items()}
    for specs in (tencent, comfy):
        found = Names(specs)
        for old, new in zip(tencent, comfy, strict=True):
            if not old.endswith(("weight", "bias")):
                continue
            in_file = old if specs is tencent else new
            want = whole(in_file, specs[in_file].shape[0])
            for tensor in (old, new.replace(".scale", ".weight")):
                key, parameter = split(tensor)
                assert one(found, f"diffusion_model.{key}", parameter) == want
        half = one(found, "transformer.transformer_blocks.1.attn.add_k_proj")
        assert [(t.start, t.count, t.first) for t in half] == [(3072, 3072, 0)]


def _comfyui_hunyuan(name: str) -> str:
    for old, new in {
        "_mod.linear.": "_mod.lin.",
        ".modulation.linear.": ".modulation.lin.",
        "_attn_qkv.": "_attn.qkv.",
        "_attn_proj.": "_attn.proj.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.2.",
        "_attn_q_norm.weight": "_attn.norm.query_norm.scale",
        "_attn_k_norm.weight": "_attn.norm.key_norm.scale",
        ".q_norm.weight": ".norm.query_norm.scale",
        ".k_norm.weight": ".norm.key_norm.scale",
    }.items():
        name = name.replace(old, new)
    return name


# Files with other names -------------------------------------------------------------------------


def as_diffusers(skeleton: str) -> Specs:
    """The specs that the diffusers file of the model has, without its reshaped tensors."""
    native = skeleton_specs(skeleton)
    return {
        tensor: TensorSpec(
            native[sources[0][0]].dtype,
            (sum(count for *_, count in sources), *native[sources[0][0]].shape[1:]),
        )
        for tensor, sources in GOLDEN[skeleton].items()
    }


@pytest.mark.parametrize("skeleton", ["flux1-dev", "sd3.5-medium", "lumina2", "sdxl-unet"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_native_names_find_the_parts_of_fused_weights_in_diffusers_files(
    skeleton: str, prefix: str
) -> None:
    found = Names(under(prefix, as_diffusers(skeleton)))
    rows: dict[tuple[str, int], tuple[str, int]] = {}  # of a native tensor: where they are now
    for tensor, sources in GOLDEN[skeleton].items():
        for target in place(sources):
            for i in (0, target.count - 1):
                rows[target.tensor, target.start + i] = (prefix + tensor, target.first + i)
    for (native, row), there in rows.items():
        key, parameter = split(native.removesuffix(".scale"))
        targets = one(found, f"diffusion_model.{key}", parameter)
        (target,) = (t for t in targets if t.first <= row < t.first + t.count)
        assert (target.tensor, target.start + row - target.first) == there


@pytest.mark.parametrize("gone", ["to_k", "proj_mlp"])
def test_a_fused_weight_of_which_a_part_is_missing_is_not_found(gone: str) -> None:
    specs = as_diffusers("flux1-dev")
    del specs[f"single_transformer_blocks.5.{'attn.' if gone == 'to_k' else ''}{gone}.weight"]
    assert Names(specs).find("lora_unet_single_blocks_5_linear1") == ()
    assert Names(specs).find("lora_unet_single_blocks_4_linear1")


# Text encoders ----------------------------------------------------------------------------------


def openclip(prefix: str) -> Specs:
    """CLIP-G as SDXL checkpoints hold it."""
    found: Specs = {}
    renamed = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
               "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
               "self_attn.q_proj.weight": "attn.in_proj_weight",
               "self_attn.q_proj.bias": "attn.in_proj_bias"}  # fmt: skip
    for name, spec in skeleton_specs("te-clip-g").items():
        inner = name.removeprefix("text_model.encoder.layers.")
        if inner == name or "k_proj" in name or "v_proj" in name:
            continue
        fused = "q_proj" in name
        for old, new in renamed.items():
            inner = inner.replace(old, new)
        shape = (3 * spec.shape[0], *spec.shape[1:]) if fused else spec.shape
        found[f"{prefix}transformer.resblocks.{inner}"] = TensorSpec(spec.dtype, shape)
    return found | {
        f"{prefix}token_embedding.weight": TensorSpec("F16", (49408, 1280)),
        f"{prefix}positional_embedding": TensorSpec("F16", (77, 1280)),
        f"{prefix}ln_final.weight": TensorSpec("F16", (1280,)),
        f"{prefix}ln_final.bias": TensorSpec("F16", (1280,)),
        f"{prefix}text_projection": TensorSpec("F16", (1280, 1280)),
    }


CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@cache
def sdxl() -> Names:
    return Names(
        under(DIFFUSION, skeleton_specs("sdxl-unet"))
        | under(CLIP_L, skeleton_specs("te-clip-l"))
        | openclip(CLIP_G)
        | {"first_stage_model.decoder.conv_in.weight": TensorSpec("F16", (512, 4, 3, 3))}
    )


@pytest.mark.parametrize(
    "key",
    ["lora_te1_text_model_encoder_layers_3_mlp_fc1", "lora_te_text_model_encoder_layers_3_mlp_fc1",
     "text_encoder.text_model.encoder.layers.3.mlp.fc1",
     "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1"],
)  # fmt: skip
def test_first_text_encoder(key: str) -> None:
    want = whole(f"{CLIP_L}text_model.encoder.layers.3.mlp.fc1.weight", 3072)
    assert one(sdxl(), key) == want


@pytest.mark.parametrize(
    "key",
    ["lora_te2_text_model_encoder_layers_3_{}", "text_encoder_2.text_model.encoder.layers.3.{}",
     "text_encoders.clip_g.transformer.text_model.encoder.layers.3.{}"],
)  # fmt: skip
def test_second_text_encoder_in_the_names_of_openclip(key: str) -> None:
    block = f"{CLIP_G}transformer.resblocks.3."
    assert one(sdxl(), key.format("mlp.fc1" if "." in key else "mlp_fc1")) == whole(
        f"{block}mlp.c_fc.weight", 5120
    )
    for i, letter in enumerate("qkv"):
        part = f"self_attn.{letter}_proj" if "." in key else f"self_attn_{letter}_proj"
        for parameter in ("weight", "bias"):
            want = (Target(f"{block}attn.in_proj_{parameter}", i * 1280, 1280, 0),)
            assert one(sdxl(), key.format(part), parameter) == want


def test_text_encoders_are_not_mistaken_for_each_other() -> None:
    assert len(sdxl().find("text_model.encoder.layers.3.mlp.fc1")) == 2  # nothing decides
    assert sdxl().find("lora_te2_text_projection") == ()  # transposed in the file
    assert sdxl().find("lora_te3_encoder_block_0_layer_0_SelfAttention_q") == ()
    alone = names("te-clip-g")
    key = "text_model_encoder_layers_20_mlp_fc1"
    want = whole("text_model.encoder.layers.20.mlp.fc1.weight", 5120)
    assert one(alone, f"lora_te2_{key}") == one(alone, f"lora_prior_te_{key}") == want
    assert names("te-clip-l").find("lora_te2_text_model_encoder_layers_0_mlp_fc1") == ()


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_t5_by_position_and_language_models(prefix: str) -> None:
    t5 = names("te-t5xxl", prefix)
    layer = "encoder.block.3.layer.0.SelfAttention.q"
    for key in ("lora_te2_", "lora_te3_"):
        assert one(t5, key + layer.replace(".", "_")) == whole(f"{prefix}{layer}.weight", 4096)
    assert one(t5, f"text_encoder_2.{layer}") == whole(f"{prefix}{layer}.weight", 4096)
    qwen = names("te-qwen3-4b", prefix.replace("t5xxl", "qwen3_4b"))
    want = whole(prefix.replace("t5xxl", "qwen3_4b") + "model.layers.0.mlp.up_proj.weight", 9728)
    for key in ("lora_te_layers_0_mlp_up_proj", "text_encoder.model.layers.0.mlp.up_proj",
                "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj",
                "text_encoders.transformer.model.layers.0.mlp.up_proj"):  # fmt: skip
        assert one(qwen, key) == want


def test_component_of_tells_what_a_key_is_for_whether_it_is_there_or_not() -> None:
    flux = names("flux1-dev")
    for key in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.x", "text_model.x",
                "text_encoders.clip_l.transformer.x"):  # fmt: skip
        assert flux.component_of(key) == "text encoder"
        assert flux.find(key) == ()
    for key in ("lora_unet_x", "transformer.x", "base_model.model.diffusion_model.x", "lycoris_x"):
        assert flux.component_of(key) == "diffusion model"
    assert flux.component_of("base_model.model.x") is None


def test_a_prefix_of_one_component_never_finds_the_other() -> None:
    specs = under(DIFFUSION, {"x.weight": TensorSpec("F16", (8, 8))})
    specs |= under("text_encoders.clip_l.transformer.", skeleton_specs("te-clip-l"))
    found = Names(specs)
    assert one(found, "lora_unet_x") == whole(f"{DIFFUSION}x.weight", 8)
    assert found.find("lora_te_x") == ()
    assert found.find("lora_unet_text_model_encoder_layers_0_mlp_fc1") == ()


# Hints and maps ---------------------------------------------------------------------------------


def test_near_names_are_spelled_as_the_adapter_does() -> None:
    flux = names("flux1-dev")
    assert "`lora_unet_double_blocks_0_img_attn_qkv`" in str(
        flux.near("lora_unet_double_blocks_0_img_atn_qkv")
    )
    assert "`transformer.transformer_blocks.0.attn.to_q`" in str(
        flux.near("transformer.transformer_blocks.0.attn.to_qq")
    )


def test_a_map_finds_what_no_table_does() -> None:
    specs = skeleton_specs("flux1-dev")
    extra = parse_map(
        b'{"my.q": "double_blocks.0.img_attn.qkv[0:3072]", "n": "transformer_blocks.1.attn.to_k",'
        b' "out": "norm_out.linear[3000:3100]"}',
        "map.json",
    )
    found = Names(specs, extra=extra)
    qkv = "double_blocks.{}.img_attn.qkv.{}"
    assert one(found, "my.q") == (Target(qkv.format(0, "weight"), 0, 3072, 0),)
    assert one(found, "my.q", "bias") == (Target(qkv.format(0, "bias"), 0, 3072, 0),)
    assert one(found, "n") == (Target(qkv.format(1, "weight"), 3072, 3072, 0),)
    final = "final_layer.adaLN_modulation.1.weight"
    assert one(found, "out") == (Target(final, 6072, 72, 0), Target(final, 0, 28, 72))


@pytest.mark.parametrize(
    ("value", "message"),
    [("double_blocks.0.img_atn.qkv", "no layer"), ("img_in[0:4000]", "has 3072"),
     ("img_in[5:5]", "has 3072"), ("img_in[a:b]", "no layer")],
)  # fmt: skip
def test_a_map_of_names_that_are_not_there_is_refused(value: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Names(skeleton_specs("flux1-dev"), extra={"my.q": value})
    assert "`my.q`" in caught.value.message
    assert caught.value.code == "plan.map"


@pytest.mark.parametrize("text", [b"", b"[]", b'{"a": 1}', b'{"a": ""}', b"\xff", b'{"a": "b"'])
def test_a_map_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(InputError, match=r"`map\.json`"):
        parse_map(text, "map.json")


# The language of other names ---------------------------------------------------------------------


@pytest.mark.parametrize("family", families.names())
def test_every_line_of_a_family_is_for_tensors_that_a_model_has(family: str) -> None:
    """A misspelt native name would never be looked up, and nobody would know."""
    own = families.load(family).other_names
    known = [s for s, (name, *_) in KNOWN.items() if name == family]
    have = {tensor: None for s in known for tensor in skeleton_specs(s)}
    if family == "clip":
        have |= dict.fromkeys(openclip(""))
    first, _, rest = own.strip().partition("\n")
    lines = dialects.parse(rest if first.startswith("as ") else own)
    text = "\n".join(have)

    def reached(native: str) -> bool:
        pattern = re.escape(native).replace(r"\*", "[0-9]+")
        return re.search(rf"^{pattern}(\.weight|\.bias)?$", text, re.MULTILINE) is not None

    # A line for blocks of several kinds is also for those that lack the tensor.
    allowed = ("skip_connection", "_img", "context_refiner.*.adaLN_modulation.1", "gate_up")
    assert [
        n.native for n in lines if not reached(n.native) and not n.native.endswith(allowed)
    ] == []


@pytest.mark.parametrize(
    "line",
    ["a", "a = ", "= b", "a = b[", "a = b[0:K] +", "a = b[x:K]", "a = b[0:K/0]", "a = b[K]",
     "a.* = b", "a = b.*", "a = b[swapped if]", "a = b[swapped if N=x]", "a = b c"],
)  # fmt: skip
def test_a_line_that_means_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="`"):
        dialects.parse(line)


@pytest.mark.parametrize(
    ("rows", "size", "spans"),
    [("0:K", (9, 3), ((0, 3),)), ("K:(N+K)/2", (10, 4), ((4, 7),)), ("N/2:N", (8, 4), ((4, 8),)),
     ("N/2:N", (9, 4), None), ("0:3K", (8, 4), None), ("0:K", (9, None), None),
     ("swapped", (8, 1), ((4, 8), (0, 4))), ("swapped", (9, 1), None),
     ("swapped if N=2K", (8, 4), ((4, 8), (0, 4))), ("swapped if N=2K", (8, 2), ((0, 8),)),
     ("2N/3:N", (9, 1), ((6, 9),)), ("flat", (9, 1), None)],
)  # fmt: skip
def test_rows_by_hand(
    rows: str, size: tuple[int, int | None], spans: tuple[tuple[int, int], ...] | None
) -> None:
    assert dialects.Name("x", rows).spans(dialects.Size(*size)) == spans


@pytest.mark.parametrize("line", ["a = b[0:K] + c[0:K]", "a = b[0:N]", "a = b[0:K] + d[K:2K]"])
def test_names_that_do_not_make_up_the_tensor_are_not_read_as_it(line: str) -> None:
    square = TensorSpec("F32", (4, 4))
    specs = {"b.weight": square, "c.weight": square}
    assert dialects.Dialect(dialects.parse(line)).layout("a.weight", specs, "") is None


def test_own_lines_replace_inherited_ones_that_give_the_same_name() -> None:
    base = dialects.parse("a = x\nb = y, z")
    assert [line.native for line in dialects.parse("c = x", base)] == ["b", "c"]


def test_a_family_with_lines_that_mean_nothing_says_so() -> None:
    from dataclasses import replace

    broken = replace(families.load("flux1"), other_names="img_in: x_embedder")
    with pytest.raises(PlanError, match="`flux1` cannot be used: in its other names"):
        _ = broken.dialect
