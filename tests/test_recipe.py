"""Recipes: which layers are quantized, which are kept, and the reason for each."""

from __future__ import annotations

import make
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cq.core import catalog
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import PlanError
from cq.core.recipe import Choice, choose, without_prefix

LARGE = TensorSpec("BF16", (128, 128))


def anything(_: TensorSpec) -> str | None:
    return None


def decide(name: str, spec: TensorSpec = LARGE, *, only: bool = False) -> Choice:
    """The choice for one layer beside one that is always quantized."""
    specs = {"blocks.0.ordinary.weight": LARGE, f"{name}.weight": spec}
    patterns = [name, "blocks.0.ordinary"] if only else []
    return choose(specs, only=patterns, refuse=anything)[1]


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
    assert (
        f"{dtype}, not floating point" in decide("blocks.0.x", TensorSpec(dtype, (99, 99))).reason
    )


@pytest.mark.parametrize("layer", ["img_in", "final_layer.linear", "time_in.in_layer"])
def test_only_overrides_advice(layer: str) -> None:
    choice = decide(layer, TensorSpec("F16", (16, 16)), only=True)
    assert (choice.quantize, choice.reason) == (True, f"`--only {layer}`")


@pytest.mark.parametrize(
    "layer", ["first_stage_model.blocks.0.q", "blocks.0.norm1", "token_embedding"]
)
def test_only_does_not_override_what_comfyui_cannot_load(layer: str) -> None:
    assert not decide(layer, only=True).quantize


def test_only_does_not_override_dimensions() -> None:
    assert not decide("blocks.0.conv", TensorSpec("F16", (9, 9, 3, 3)), only=True).quantize


def test_only_keeps_everything_else() -> None:
    specs = {f"blocks.{i}.{n}.weight": LARGE for i in range(3) for n in ("a", "b")}
    choices = choose(specs, only=["blocks.1.*"], refuse=anything)
    assert [c.layer for c in choices if c.quantize] == ["blocks.1.a", "blocks.1.b"]
    assert {c.reason for c in choices if not c.quantize} == {"not named by `--only`"}


def test_skip_keeps_layers_and_names_its_pattern() -> None:
    specs = {f"blocks.{i}.{n}.weight": LARGE for i in range(2) for n in ("a", "b")}
    choices = choose(specs, skip=["*.b"], refuse=anything)
    assert [c.layer for c in choices if c.quantize] == ["blocks.0.a", "blocks.1.a"]
    assert {c.reason for c in choices if not c.quantize} == {"`--skip *.b`"}


def test_skip_wins_over_only() -> None:
    specs = {f"blocks.{i}.a.weight": LARGE for i in range(3)}
    choices = choose(specs, only=["blocks.*"], skip=["blocks.1.*"], refuse=anything)
    assert [c.quantize for c in choices] == [True, False, True]


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_a_pattern_that_matches_no_layer_is_refused(argument: str) -> None:
    specs = {"blocks.0.attn.qkv.weight": LARGE, "blocks.0.attn.qkv.bias": LARGE}
    with pytest.raises(PlanError, match="matches no layer") as caught:
        choose(specs, **{argument: ["blocks.0.atn.qkv"]}, refuse=anything)  # type: ignore[arg-type]
    assert "`blocks.0.attn.qkv`" in (caught.value.hint or "")


def test_a_refusal_of_the_format_is_the_reason() -> None:
    specs = {"blocks.0.a.weight": LARGE, "blocks.0.b.weight": TensorSpec("F16", (100, 100))}
    choices = choose(specs, refuse=lambda spec: "K=100 is odd" if spec.shape[1] == 100 else None)
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
        choose(specs, refuse=anything)
    assert (caught.value.exit_code, caught.value.code) == (4, "plan.nothing")
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_recipe_of_a_small_model(prefix: str) -> None:
    specs = {name: spec_of(tensor) for name, tensor in make.model(prefix=prefix).items()}
    choices = choose(specs, refuse=anything)
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
    choices = choose(specs, refuse=anything)
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
