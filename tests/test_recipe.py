"""Recipes: which layers are quantized, which are kept, and the reason for each."""

from __future__ import annotations

import json
from pathlib import Path

import make
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cq.core import catalog
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import InputError, PlanError
from cq.core.recipe import (
    Choice,
    How,
    Rule,
    choose,
    has_role,
    parse_only,
    without_prefix,
)
from cq.core.recipe_file import load_recipe

LARGE = TensorSpec("BF16", (128, 128))


DEFAULT = How(format="int8_tensorwise")


def anything(layer: str, weight: TensorSpec, how: How) -> str | None:
    return None


def decide(name: str, spec: TensorSpec = LARGE, *, only: bool = False) -> Choice:
    """The choice for one layer beside one that is always quantized."""
    specs = {"blocks.0.ordinary.weight": LARGE, f"{name}.weight": spec}
    patterns = [name, "blocks.0.ordinary"] if only else []
    return choose(specs, DEFAULT, only=patterns, refuse=anything)[1]


PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "transformer."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "layer",
    [
        "blocks.0.attn.qkv",
        "double_blocks.18.img_mlp.2",
        "single_blocks.37.linear1",
        "joint_blocks.3.x_block.attn.proj",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "layers.7.feed_forward.w1",
        "transformer_blocks.59.attn.add_q_proj",
    ],
)
def test_recipe_quantizes_linear_layers_of_blocks(layer: str, prefix: str) -> None:
    choice = decide(prefix + layer)
    assert (choice.quantize, choice.reason) == (True, "a linear layer of a block")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("img_in", "outside the model's repeated blocks"),
        ("proj_out", "outside the model's repeated blocks"),
        ("final_layer.linear", "input, output or conditioning"),
        ("time_in.in_layer", "input, output or conditioning"),
        ("time_embed.0", "input, output or conditioning"),
        ("x_embedder.proj.1", "input, output or conditioning"),
        ("label_emb.0.0", "input, output or conditioning"),
        ("blocks.0.norm1", "a norm"),
        ("blocks.0.attn.norm_q", "a norm"),
        ("blocks.0.attn.q_norm", "a norm"),
        ("blocks.0.layer_norm", "a norm"),
        ("token_embedding", "an embedding table"),
        ("blocks.0.embed_tokens", "an embedding table"),
    ],
)
def test_recipe_keeps(layer: str, words: str, prefix: str) -> None:
    choice = decide(prefix + layer)
    assert not choice.quantize
    assert words in choice.reason


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("first_stage_model.decoder.mid.0.attn.q", "VAE"),
        ("vae.decoder.blocks.0.linear", "VAE"),
        ("cond_stage_model.transformer.layers.0.mlp.fc1", "text encoder"),
        ("conditioner.embedders.0.layers.1.fc1", "text encoder"),
        ("text_encoders.t5xxl.blocks.0.k", "text encoder"),
    ],
)
def test_recipe_keeps_the_other_models_of_a_checkpoint(layer: str, words: str) -> None:
    choice = decide(layer)
    assert not choice.quantize
    assert words in choice.reason


@pytest.mark.parametrize("shape", [(), (128,), (128, 64, 3), (64, 64, 3, 3), (8, 4, 3, 3, 3)])
def test_recipe_keeps_what_is_not_two_dimensional(shape: tuple[int, ...]) -> None:
    choice = decide("blocks.0.conv", TensorSpec("F16", shape))
    assert not choice.quantize
    assert f"{len(shape)}-D" in choice.reason


@pytest.mark.parametrize("shape", [(63, 128), (128, 63), (1, 1)])
def test_recipe_keeps_tiny_layers(shape: tuple[int, int]) -> None:
    assert "under 64" in decide("blocks.0.gate", TensorSpec("F16", shape)).reason
    assert decide("blocks.0.gate", TensorSpec("F16", (64, 64))).quantize


@pytest.mark.parametrize("dtype", ["I64", "I32", "BOOL", "C64", "F8_E4M3", "U8"])
def test_recipe_keeps_what_is_not_floating_point(dtype: str) -> None:
    assert f"{dtype}, quantized already" in decide("blocks.0.x", TensorSpec(dtype, (99, 99))).reason


@pytest.mark.parametrize(
    "layer", ["img_in", "final_layer.linear", "time_in.in_layer", "token_embedding"]
)
def test_only_overrides_advice(layer: str) -> None:
    choice = decide(layer, TensorSpec("F16", (16, 16)), only=True)
    assert choice.quantize
    assert choice.reason.startswith(f"`--only {layer}`, in spite of: ")


@pytest.mark.parametrize(
    "layer", ["first_stage_model.blocks.0.q", "blocks.0.norm1", "blocks.0.attn.norm_q"]
)
def test_only_does_not_override_what_comfyui_cannot_load(layer: str) -> None:
    assert not decide(layer, only=True).quantize


def test_only_does_not_override_dimensions() -> None:
    assert not decide("blocks.0.conv", TensorSpec("F16", (9, 9, 3, 3)), only=True).quantize


def test_only_keeps_everything_else() -> None:
    specs = {f"blocks.{i}.{n}.weight": LARGE for i in range(3) for n in ("a", "b")}
    choices = choose(specs, DEFAULT, only=["blocks.1.*"], refuse=anything)
    assert [c.layer for c in choices if c.quantize] == ["blocks.1.a", "blocks.1.b"]
    assert {c.reason for c in choices if not c.quantize} == {"not named by `--only`"}


def test_skip_keeps_layers_and_names_its_pattern() -> None:
    specs = {f"blocks.{i}.{n}.weight": LARGE for i in range(2) for n in ("a", "b")}
    choices = choose(specs, DEFAULT, skip=["*.b"], refuse=anything)
    assert [c.layer for c in choices if c.quantize] == ["blocks.0.a", "blocks.1.a"]
    assert {c.reason for c in choices if not c.quantize} == {"`--skip *.b`"}


def test_skip_wins_over_only() -> None:
    specs = {f"blocks.{i}.a.weight": LARGE for i in range(3)}
    choices = choose(specs, DEFAULT, only=["blocks.*"], skip=["blocks.1.*"], refuse=anything)
    assert [c.quantize for c in choices] == [True, False, True]


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_a_pattern_that_matches_no_layer_is_refused(argument: str) -> None:
    specs = {"blocks.0.attn.qkv.weight": LARGE, "blocks.0.attn.qkv.bias": LARGE}
    with pytest.raises(PlanError, match="matches no layer") as caught:
        choose(specs, DEFAULT, **{argument: ["blocks.0.atn.qkv"]}, refuse=anything)  # type: ignore[arg-type]
    assert "`blocks.0.attn.qkv`" in (caught.value.hint or "")


def test_a_refusal_of_the_format_is_the_reason() -> None:
    def odd(layer: str, weight: TensorSpec, how: How) -> str | None:
        return "K=100 is odd" if weight.shape[1] == 100 else None

    specs = {"blocks.0.a.weight": LARGE, "blocks.0.b.weight": TensorSpec("F16", (100, 100))}
    choices = choose(specs, DEFAULT, refuse=odd)
    assert [(c.quantize, c.reason) for c in choices] == [
        (True, "a linear layer of a block"),
        (False, "the format refuses it: K=100 is odd"),
    ]


@pytest.mark.parametrize(
    ("specs", "hint"),
    [
        ({}, "no tensor that ends in `.weight`"),
        ({"blocks.0.a.bias": LARGE}, "no tensor that ends in `.weight`"),
        ({"img_in.weight": LARGE}, "--only"),
    ],
)
def test_nothing_to_quantize_is_an_error(specs: dict[str, TensorSpec], hint: str) -> None:
    with pytest.raises(PlanError, match="no layer to quantize") as caught:
        choose(specs, DEFAULT, refuse=anything)
    assert (caught.value.exit_code, caught.value.code) == (4, "plan.nothing")
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_recipe_of_a_small_model(prefix: str) -> None:
    specs = {name: spec_of(tensor) for name, tensor in make.model(prefix=prefix).items()}
    choices = choose(specs, DEFAULT, refuse=anything)
    assert make.quantized_names(prefix) == [c.layer for c in choices if c.quantize]
    assert all(choice.reason for choice in choices)
    assert [f"{c.layer}.weight" for c in choices] == [n for n in specs if n.endswith(".weight")]


@given(
    st.dictionaries(
        st.text(alphabet="blocks.0norm_1in", max_size=14).map(lambda name: name + ".weight"),
        st.tuples(
            st.sampled_from(["F32", "I8", "BF16"]),
            st.lists(st.integers(0, 200), max_size=4).map(tuple),
        ),
        max_size=5,
    )
)
def test_recipe_decides_for_every_weight_with_a_reason(
    found: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    specs = {name: TensorSpec(*spec) for name, spec in found.items()}
    specs["blocks.0.ordinary.weight"] = LARGE
    choices = choose(specs, DEFAULT, refuse=anything)
    assert list(specs) == [f"{choice.layer}.weight" for choice in choices]
    for choice in choices:
        assert choice.reason
        if choice.quantize:
            assert len(choice.weight.shape) == 2
            assert choice.weight.is_float
            assert min(choice.weight.shape) >= 64


@pytest.mark.parametrize("prefix", PREFIXES)
def test_without_prefix_strips_one_prefix(prefix: str) -> None:
    assert without_prefix(prefix + "img_in") == "img_in"
    assert without_prefix("unmodel." + prefix) == "unmodel." + prefix


def test_generic_rules_say_why() -> None:
    for rule in catalog.load("models", "generic")["keep"]:
        assert rule["reason"]
        assert rule["patterns"]


# Rules ------------------------------------------------------------------------------------------

BLOCKS = {f"blocks.{i}.{n}.weight": LARGE for i in range(2) for n in ("a", "b")}


def rule(layers: str, **settings: object) -> Rule:
    return Rule.from_dict({"layers": layers, **settings}, where="the rule")


def formats(choices: list[Choice]) -> dict[str, str | None]:
    return {c.layer: None if c.how is None else c.how.format for c in choices}


def test_rules_give_layers_their_own_format_and_the_first_that_matches_wins() -> None:
    rules = [rule("*.b", format="bf16", reason="b is delicate"), rule("blocks.*", format="fp16")]
    choices = choose(BLOCKS, DEFAULT, rules=rules, refuse=anything)
    assert formats(choices) == {
        "blocks.0.a": "fp16",
        "blocks.0.b": "bf16",
        "blocks.1.a": "fp16",
        "blocks.1.b": "bf16",
    }
    assert choices[1].reason == "b is delicate"
    assert "`blocks.*`" in choices[0].reason


def test_layers_without_a_rule_take_the_default() -> None:
    choices = choose(BLOCKS, DEFAULT, rules=[rule("*.b", skip=True)], refuse=anything)
    assert [c.how for c in choices] == [DEFAULT, None, DEFAULT, None]


def test_a_rule_overrides_advice_as_only_does() -> None:
    specs = {**BLOCKS, "img_in.weight": LARGE}
    assert formats(choose(specs, DEFAULT, refuse=anything))["img_in"] is None
    choices = choose(specs, DEFAULT, rules=[rule("img_in", format="fp16")], refuse=anything)
    assert formats(choices)["img_in"] == "fp16"


def test_a_rule_changes_single_settings_of_its_own_format_only() -> None:
    """The default's scaling or optimizer is not meant for another format."""
    default = How(format="int8_tensorwise", scaling="tensor", optimizer="rtn", rotate="off")
    rules = [rule("*.a", scaling="row"), rule("*.b", format="fp16")]
    choices = choose(BLOCKS, default, rules=rules, refuse=anything)
    assert choices[0].how == How(
        format="int8_tensorwise", scaling="row", optimizer="rtn", rotate="off"
    )
    assert choices[1].how == How(format="fp16")


def test_only_names_a_format_after_an_equals_sign() -> None:
    choices = choose(BLOCKS, DEFAULT, only=["*.b=fp16", "blocks.0.*"], refuse=anything)
    assert formats(choices) == {
        "blocks.0.a": "int8_tensorwise",
        "blocks.0.b": "fp16",
        "blocks.1.a": None,
        "blocks.1.b": "fp16",
    }
    assert choices[1].reason == "`--only *.b=fp16`"


def test_only_restricts_a_recipe() -> None:
    rules = [rule("*.b", format="fp16")]
    choices = choose(BLOCKS, DEFAULT, rules=rules, only=["blocks.1.*"], refuse=anything)
    assert formats(choices) == {
        "blocks.0.a": None,
        "blocks.0.b": None,
        "blocks.1.a": "int8_tensorwise",
        "blocks.1.b": "fp16",
    }


def test_parse_only_takes_what_follows_the_last_equals_sign_for_a_format() -> None:
    assert parse_only("blocks.*") == ("blocks.*", None)
    assert parse_only("blocks.*=fp16") == ("blocks.*", "fp16")
    assert parse_only("re:a(?=b)") == ("re:a(?=b)", None)
    with pytest.raises(PlanError, match="no format `nvfp5`") as caught:
        parse_only("blocks.*=nvfp5")
    assert "nvfp4" in (caught.value.hint or "")


def test_a_plain_dtype_applies_to_every_float_tensor() -> None:
    specs = {
        "pos_embed": TensorSpec("F32", (1, 8, 64)),
        "img_in.weight": LARGE,
        "blocks.0.norm.weight": TensorSpec("F32", (64,)),
        "blocks.0.a.bias": TensorSpec("F32", (64,)),
        "step": TensorSpec("I64", ()),
    }
    choices = choose(specs, How(format="bf16"), skip=["blocks.0.a"], refuse=anything)
    assert {c.name: c.quantize for c in choices} == {
        "pos_embed": True,
        "img_in.weight": True,
        "blocks.0.norm.weight": True,
        "blocks.0.a.bias": False,
    }


def test_stacked_experts_are_layers_and_other_three_dimensional_weights_are_not() -> None:
    stacked = TensorSpec("BF16", (4, 128, 64))
    assert decide("blocks.0.mlp.experts.gate_up_proj", stacked).quantize
    assert decide("blocks.0.mlp.experts_down_proj", stacked).quantize
    assert "3-D" in decide("blocks.0.conv", stacked).reason


def test_roles_are_found_under_any_prefix() -> None:
    for prefix in PREFIXES:
        assert has_role(prefix + "img_in", "detection")
        assert has_role(prefix + "blocks.0.attn2.to_k", "detection")
        assert not has_role(prefix + "blocks.0.attn1.to_k", "detection")
        assert has_role(prefix + "embed_tokens", "embedding")


# Recipe files -----------------------------------------------------------------------------------


def test_a_recipe_file_reads_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    rules = [
        {"layers": "*.b", "format": "fp16", "reason": "why", "_shape": [128, 128]},
        {"layers": "re:a$", "skip": True},
        {"layers": "*", "scaling": "tensor", "optimizer": "rtn", "rotate": "off"},
    ]
    path.write_text(json.dumps({"cq": 1, "kind": "recipe", "rules": rules}))
    del rules[0]["_shape"]
    assert [found.to_dict() for found in load_recipe(path)] == rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ("[]", "is not a recipe"),
        ("{}", "is not a recipe"),
        ('{"cq": 2, "kind": "recipe", "rules": []}', "version 2"),
        ('{"cq": 1, "kind": "recipe"}', "no list of `rules`"),
        ('{"cq": 1, "kind": "recipe", "rules": [1]}', "rule 1 of .* not a JSON object"),
        ('{"cq": 1, "kind": "recipe", "rules": [{}]}', "names no `layers`"),
        ('{"cq": 1, "kind": "recipe", "rules": [{"layer": "*"}]}', "a key `layer`"),
        ('{"cq": 1, "kind": "recipe", "rules": [{"layers": 7}]}', "`layers` that is not text"),
        (
            '{"cq": 1, "kind": "recipe", "rules": [{"layers": "*", "skip": "yes"}]}',
            "`skip` that is not true",
        ),
        (
            '{"cq": 1, "kind": "recipe", "rules": [{"layers": "*", "skip": true, "format": "x"}]}',
            "`format` means nothing",
        ),
    ],
)
def test_a_recipe_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "layers.json" in caught.value.message


def test_a_missing_recipe_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.json")
