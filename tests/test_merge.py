"""Merging against independent float64 formulas, on small seeded files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cq
import cq_merge
from cq.core import catalog, manifest
from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.dtypes import TensorSpec
from cq.core.engine import local
from cq.core.errors import CqError, InputError, PlanError, UsageError
from cq.core.names import Names
from cq.core.source import cuts
from cq_merge.adapters import CHECKPOINT, Additive, Apply, Reading
from cq_merge.adapters.lora import SPELLINGS
from cq_merge.contents import Contents
from cq_merge.conversions import contents
from cq_merge.inputs import parse_adapter
from cq_merge.stage import MergeStage

P = "model.diffusion_model."
SHAPES = {
    "blocks.0.attn.qkv": (192, 64),
    "blocks.0.mlp_up": (256, 128),
    "blocks.1.attn.qkv": (192, 64),
    "patch_embed.conv": (64, 16, 3, 3),
}
QKV = "blocks.0.attn.qkv"
CONV = "patch_embed.conv"
Tensors = dict[str, torch.Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def base_tensors(dtype: torch.dtype = torch.bfloat16, prefix: str = P) -> Tensors:
    g = generator(1)
    made = {
        f"{prefix}{layer}.weight": (torch.randn(shape, generator=g) * 0.1).to(dtype)
        for layer, shape in SHAPES.items()
    }
    made[f"{prefix}{QKV}.bias"] = torch.randn(192, generator=g).to(dtype)
    return made


def factors(
    shape: tuple[int, ...], rank: int, seed: int, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """An (up, down) pair for a weight of `shape`, in convolution form if that is 4-D."""
    g = generator(seed)
    tail = (1,) * (len(shape) - 2)
    up = torch.randn((shape[0], rank, *tail), generator=g) * 0.2
    down = torch.randn((rank, *shape[1:]), generator=g) * 0.2
    return up.to(dtype), down.to(dtype)


def lora(
    layers: Iterable[str],
    *,
    rank: int = 8,
    alpha: float | None = 4.0,
    seed: int = 7,
    name: Callable[[str], str] = lambda layer: "lora_unet_" + layer.replace(".", "_"),
    spelling: tuple[str, str] = SPELLINGS[0],
) -> Tensors:
    made: Tensors = {}
    for i, layer in enumerate(layers):
        up, down = factors(SHAPES[layer], rank, seed + i)
        made[name(layer) + spelling[0]], made[name(layer) + spelling[1]] = up, down
        if alpha is not None:
            made[name(layer) + ".alpha"] = torch.tensor(alpha)
    return made


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return str(path)


def delta64(up: torch.Tensor, down: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    return torch.einsum("or,rk->ok", up.double().flatten(1), down.double().flatten(1)).reshape(
        tuple(shape)
    )


def lora64(file: Mapping[str, torch.Tensor], layer: str, alpha: float | None) -> torch.Tensor:
    """`alpha / rank * up @ down` of a file in kohya's spelling."""
    key = "lora_unet_" + layer.replace(".", "_")
    up, down = file[key + ".lora_up.weight"], file[key + ".lora_down.weight"]
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return scale * delta64(up, down, SHAPES[layer])


def assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """`actual` is `exact` rounded once, but where `exact` is all but halfway between two levels.

    The sum is made in float32 with an error of some 1e-7 of its terms. Where that crosses the
    middle between two levels of the stored dtype, the neighbour is taken: measured for under 2 in
    10000 values, allowed for 1 in 1000; and nothing is further off.
    """
    assert (actual != exact.to(actual.dtype)).double().mean() <= 1e-3
    ulp = torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).abs()
    assert (error <= exact.abs() * ulp * 0.5 + 1e-6).all()


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    save(tmp_path / "base.safetensors", base_tensors())
    return cq.open(tmp_path / "base.safetensors")


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s[0])
def test_merge_reads_every_spelling(
    base: Checkpoint, tmp_path: Path, spelling: tuple[str, str]
) -> None:
    file = lora([QKV, CONV], spelling=spelling, name=lambda layer: "diffusion_model." + layer)
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])
    before = base_tensors()
    for i, layer in enumerate([QKV, CONV]):
        up, down = factors(SHAPES[layer], 8, 7 + i)
        exact = before[P + layer + ".weight"].double() + 0.5 * delta64(up, down, SHAPES[layer])
        assert_close(merged.read(P + layer + ".weight"), exact)
        assert not torch.equal(merged.read(P + layer + ".weight"), before[P + layer + ".weight"])


@pytest.mark.parametrize("alpha", [None, 0.5, 16.0])
def test_merge_scales_by_alpha_over_rank_or_by_one(
    base: Checkpoint, tmp_path: Path, alpha: float | None
) -> None:
    file = lora([QKV], alpha=alpha)
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])
    before = base.read(P + QKV + ".weight").double()
    assert_close(merged.read(P + QKV + ".weight"), before + lora64(file, QKV, alpha))


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(3.0, dtype=torch.float16),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.tensor(3.0, dtype=torch.float64),
        torch.tensor([3.0]),
        torch.tensor(3),
        torch.tensor(3, dtype=torch.int32),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_merge_decodes_alpha_of_any_dtype(
    base: Checkpoint, tmp_path: Path, alpha: torch.Tensor
) -> None:
    file = lora([QKV], alpha=None)
    file["lora_unet_blocks_0_attn_qkv.alpha"] = alpha
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])
    assert merged.notes[0]["alphas"] == [3.0]


def test_merge_takes_linear_factors_for_a_1x1_convolution(tmp_path: Path) -> None:
    weight = torch.randn(64, 32, 1, 1, generator=generator(3)).to(torch.float16)
    save(tmp_path / "base.safetensors", {"mid.conv.weight": weight})
    up, down = factors((64, 32), 4, 5)
    path = save(
        tmp_path / "a.safetensors", {"mid.conv.lora_B.weight": up, "mid.conv.lora_A.weight": down}
    )
    merged = cq_merge.merge(cq.open(tmp_path / "base.safetensors"), [path])
    exact = weight.double() + delta64(up, down, weight.shape)
    assert_close(merged.read("mid.conv.weight"), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_keeps_wide_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path / "base.safetensors", base_tensors(dtype))
    base = cq.open(tmp_path / "base.safetensors")
    file = lora([QKV])
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])
    exact = base.read(P + QKV + ".weight").double() + lora64(file, QKV, 4.0)
    found = merged.read(P + QKV + ".weight")
    assert dtype == found.dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert (found.double() - exact).abs().max() < tolerance


def test_merge_cuts_a_tall_weight_without_seams(tmp_path: Path) -> None:
    """Rows of several segments, each with the rows of `up` that belong to it."""
    shape = (3000, 1024)
    weight = (torch.randn(shape, generator=generator(2)) * 0.1).to(torch.bfloat16)
    save(tmp_path / "base.safetensors", {"tall.weight": weight})
    up, down = factors(shape, 4, 9, torch.bfloat16)
    path = save(
        tmp_path / "a.safetensors", {"tall.lora_up.weight": up, "tall.lora_down.weight": down}
    )
    base = cq.open(tmp_path / "base.safetensors")
    merged = cq_merge.merge(base, [path])
    pieces = list(merged.pieces("tall.weight"))
    assert [start for start, _ in cuts(base.specs["tall.weight"])] == [p.start for p in pieces]
    assert len(pieces) > 1
    assert_close(merged.read("tall.weight"), weight.double() + delta64(up, down, shape))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 6),
    strength=st.floats(-3, 3),
    alpha=st.none() | st.floats(-8, 8, width=32),
)
def test_merge_agrees_with_float64_for_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    rank: int,
    strength: float,
    alpha: float | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    weight = torch.randn(rows, columns, generator=generator(rows))
    save(folder / "base.safetensors", {"x.weight": weight})
    up, down = factors((rows, columns), rank, columns)
    file = {"x.lora_up.weight": up, "x.lora_down.weight": down}
    if alpha is not None:
        file["x.alpha"] = torch.tensor(alpha)
    adapter = save(folder / "a.safetensors", file)
    merged = cq_merge.merge(cq.open(folder / "base.safetensors"), [(adapter, strength)])
    scale = strength * (1.0 if alpha is None else alpha / rank)
    exact = weight.double() + scale * delta64(up, down, weight.shape)
    error = (merged.read("x.weight").double() - exact).abs()
    assert (error <= 1e-6 * (exact.abs() + 1 + abs(scale))).all()


# --- strengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dampen", "expected"),
    [
        (None, [0.8 * 0.5, 1.0 * 0.5 * 0.9, -0.3 * 0.5 * 0.81]),
        (True, [0.8 * 0.5, 1.0 * 0.5 * 0.9, -0.3 * 0.5 * 0.81]),
        (False, [0.8 * 0.5, 1.0 * 0.5, -0.3 * 0.5]),
    ],
)
def test_merge_adds_adapters_dampened_once_each(
    base: Checkpoint, tmp_path: Path, dampen: bool | None, expected: list[float]
) -> None:
    files = [lora([QKV], seed=s, rank=r) for s, r in ((11, 4), (12, 8), (13, 2))]
    paths = [save(tmp_path / f"{i}.safetensors", f) for i, f in enumerate(files)]
    merged = cq_merge.merge(
        base, [paths[0] + ":0.8", Path(paths[1]), (paths[2], -0.3)], scale=0.5, dampen=dampen
    )
    exact = base.read(P + QKV + ".weight").double()
    for file, strength in zip(files, expected, strict=True):
        exact = exact + strength * lora64(file, QKV, 4.0)
    assert_close(merged.read(P + QKV + ".weight"), exact)
    assert expected == pytest.approx([note["effective_strength"] for note in merged.notes])
    assert [note["strength"] for note in merged.notes] == [0.8, 1.0, -0.3]


def test_merge_leaves_a_single_adapter_undampened(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    for dampen in (None, True, False):
        merged = cq_merge.merge(base, [path], dampen=dampen)
        assert merged.notes[0]["effective_strength"] == 1.0


def test_merge_of_strength_zero_touches_nothing(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    merged = cq_merge.merge(base, [path + ":0"])
    assert base.parts == merged.parts
    assert merged.notes[0]["layers"] == [P + QKV]


def test_merge_and_its_negative_cancel(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    merged = cq_merge.merge(base, [(path, 0.7), (path, -0.7)], dampen=False)
    name = P + QKV + ".weight"
    assert_close(merged.read(name), base.read(name).double())


def test_merge_sums_two_keys_of_one_layer(base: Checkpoint, tmp_path: Path) -> None:
    kohya = lora([QKV], seed=21)
    dotted = lora([QKV], seed=22, name=lambda layer: "diffusion_model." + layer)
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", kohya | dotted)])
    same = {
        k.replace("diffusion_model." + QKV, "lora_unet_" + QKV.replace(".", "_")): v
        for k, v in dotted.items()
    }
    name = P + QKV + ".weight"
    exact = base.read(name).double() + lora64(kohya, QKV, 4.0) + lora64(same, QKV, 4.0)
    assert_close(merged.read(name), exact)
    assert merged.notes[0]["matched"] == 2


def test_parse_adapter_takes_the_number_after_the_last_colon(tmp_path: Path) -> None:
    assert parse_adapter("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert parse_adapter("a.safetensors:-1e-3") == ("a.safetensors", -1e-3)
    assert parse_adapter("a:b:2") == ("a:b", 2.0)
    assert parse_adapter(r"C:\a.safetensors") == (r"C:\a.safetensors", 1.0)
    colon = tmp_path / "style:0.5"
    colon.write_bytes(b"")
    assert (str(colon), 1.0) == parse_adapter(str(colon))


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "0,8", "strong", ""])
def test_merge_refuses_a_strength_that_is_no_finite_number(
    base: Checkpoint, tmp_path: Path, word: str
) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    with pytest.raises(UsageError, match="strength"):
        cq_merge.merge(base, [f"{path}:{word}"])


def test_merge_refuses_unusable_calls(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    with pytest.raises(UsageError, match="no adapter"):
        cq_merge.merge(base, [])
    with pytest.raises(UsageError, match="not an adapter"):
        cq_merge.merge(base, (path, 0.8))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the strength of"):
        cq_merge.merge(base, [(path, math.nan)])
    with pytest.raises(UsageError, match="the scale"):
        cq_merge.merge(base, [path], scale=math.inf)
    with pytest.raises(InputError, match="does not exist"):
        cq_merge.merge(base, [str(tmp_path / "none.safetensors")])


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", P, "diffusion_model.", "net.", "model."])
@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_blocks_0_attn_qkv",
        "lycoris_blocks_0_attn_qkv",
        "lora_transformer_blocks_0_attn_qkv",
        "diffusion_model.blocks.0.attn.qkv",
        "model.diffusion_model.blocks.0.attn.qkv",
        "transformer.blocks.0.attn.qkv",
        "unet.blocks.0.attn.qkv",
        "base_model.model.blocks.0.attn.qkv",
        "base_model.model.transformer.blocks.0.attn.qkv",
        "blocks.0.attn.qkv",
    ],
)
def test_merge_finds_a_layer_under_every_prefix(tmp_path: Path, prefix: str, key: str) -> None:
    save(tmp_path / "base.safetensors", base_tensors(prefix=prefix))
    file = lora([QKV], name=lambda _: key)
    path = save(tmp_path / "a.safetensors", file)
    merged = cq_merge.merge(cq.open(tmp_path / "base.safetensors"), [path])
    assert merged.notes[0]["layers"] == [f"{prefix}{QKV}"]


@pytest.mark.parametrize("key", ["lora_te_text_model", "lora_unet_blocks_0", "blocks_0_attn_qkv"])
def test_names_never_guess(base: Checkpoint, key: str) -> None:
    assert Names(base.specs).find(key) == ()


def test_merge_refuses_a_key_of_two_layers(tmp_path: Path) -> None:
    weight = torch.zeros(8, 8)
    save(tmp_path / "base.safetensors", {"a.b_c.weight": weight, "a_b.c.weight": weight.clone()})
    up, down = factors((8, 8), 2, 1)
    file = {"lora_unet_a_b_c.lora_up.weight": up, "lora_unet_a_b_c.lora_down.weight": down}
    path = save(tmp_path / "a.safetensors", file)
    with pytest.raises(PlanError, match=r"several layers .*`a\.b_c` and `a_b\.c`"):
        cq_merge.merge(cq.open(tmp_path / "base.safetensors"), [path], allow_unmatched=True)


def test_merge_names_an_unmatched_key_and_what_is_near(base: Checkpoint, tmp_path: Path) -> None:
    file = lora([QKV, "blocks.1.attn.qkv"])
    file |= lora([CONV], name=lambda _: "lora_unet_blocks_0_attn_qvk")
    path = save(tmp_path / "style.safetensors", file)
    with pytest.raises(PlanError) as caught:
        cq_merge.merge(base, [path])
    assert caught.value.exit_code == 4
    assert (
        f"the key `lora_unet_blocks_0_attn_qvk` of `{path}` names no layer of"
        f" `{tmp_path}/base.safetensors`; 2 of 3 keys do"
    ) == caught.value.message
    assert caught.value.hint is not None
    assert "`lora_unet_blocks_0_attn_qkv`" in caught.value.hint
    assert "--allow-unmatched" in caught.value.hint

    merged = cq_merge.merge(base, [path], allow_unmatched=True)
    assert merged.notes[0]["unmatched"] == ["lora_unet_blocks_0_attn_qvk"]
    assert merged.notes[0]["layers"] == [P + QKV, P + "blocks.1.attn.qkv"]
    assert base.part(P + CONV + ".weight") is merged.part(P + CONV + ".weight")


def test_merge_offers_near_names_in_the_adapters_spelling(base: Checkpoint, tmp_path: Path) -> None:
    file = lora([QKV], name=lambda _: "base_model.model.blocks.0.attn.qkw")
    path = save(tmp_path / "a.safetensors", file)
    with pytest.raises(PlanError) as caught:
        cq_merge.merge(base, [path])
    assert "`base_model.model.blocks.0.attn.qkv`" in (caught.value.hint or "")


def test_merge_refuses_an_adapter_that_matches_nothing(base: Checkpoint, tmp_path: Path) -> None:
    file = lora([QKV], name=lambda _: "lora_te_text_model_encoder_layers_0_mlp_fc1")
    path = save(tmp_path / "a.safetensors", file)
    for allow in (False, True):
        with pytest.raises(PlanError, match="0 of 1 keys") as caught:
            cq_merge.merge(base, [path], allow_unmatched=allow)
        assert "text encoder" in (caught.value.hint or "")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".vera_lambda_b", ".lora_X.weight", ".on_input", ".hada_t3"])
def test_merge_refuses_what_no_kind_knows(base: Checkpoint, tmp_path: Path, suffix: str) -> None:
    """What would change the result is an error even beside a pair that could be merged."""
    file = lora([QKV]) | {"lora_unet_blocks_0_attn_qkv" + suffix: torch.ones(4)}
    path = save(tmp_path / "a.safetensors", file)
    for allow in (False, True):
        with pytest.raises(PlanError) as caught:
            cq_merge.merge(base, [path], allow_unmatched=allow)
        assert f"`lora_unet_blocks_0_attn_qkv{suffix}`" in caught.value.message
        assert path in caught.value.message
        assert "does not merge" in caught.value.message


@pytest.mark.parametrize("gone", [".lora_up.weight", ".lora_down.weight"])
def test_merge_refuses_half_a_pair(base: Checkpoint, tmp_path: Path, gone: str) -> None:
    file = lora([QKV, CONV])
    del file["lora_unet_patch_embed_conv" + gone]
    path = save(tmp_path / "a.safetensors", file)
    with pytest.raises(InputError) as caught:
        cq_merge.merge(base, [path])
    assert f"without `lora_unet_patch_embed_conv{gone}`" in caught.value.message


def test_merge_refuses_two_pairs_of_one_key(base: Checkpoint, tmp_path: Path) -> None:
    file = lora([QKV]) | lora([QKV], spelling=SPELLINGS[2])
    with pytest.raises(InputError, match="two pairs"):
        cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])


def test_merge_refuses_a_file_without_tensors(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no adapter"):
        cq_merge.merge(base, [save(tmp_path / "a.safetensors", {})])


def test_merge_refuses_a_shape_that_does_not_fit(base: Checkpoint, tmp_path: Path) -> None:
    file = lora(["blocks.0.mlp_up"], name=lambda _: "lora_unet_blocks_0_attn_qkv")
    path = save(tmp_path / "a.safetensors", file)
    with pytest.raises(PlanError) as caught:
        cq_merge.merge(base, [path])
    assert "`lora_unet_blocks_0_attn_qkv.lora_up.weight` F16[256,8]" in caught.value.message
    assert "`lora_unet_blocks_0_attn_qkv.lora_down.weight` F16[8,128]" in caught.value.message
    assert f"`{P}{QKV}.weight`" in caught.value.message
    assert "BF16[192,64]" in caught.value.message


@pytest.mark.parametrize(
    ("up", "down"),
    [((192, 8), (4, 64)), ((192,), (8, 64)), ((192, 0), (0, 64)), ((), (8, 64))],
)
def test_merge_refuses_factors_that_share_no_rank(
    base: Checkpoint, tmp_path: Path, up: tuple[int, ...], down: tuple[int, ...]
) -> None:
    key = "lora_unet_blocks_0_attn_qkv"
    file = {key + ".lora_up.weight": torch.ones(up), key + ".lora_down.weight": torch.ones(down)}
    with pytest.raises(InputError, match="share no rank"):
        cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])


def test_merge_refuses_factors_of_integers(base: Checkpoint, tmp_path: Path) -> None:
    file = {name: tensor.to(torch.int32) for name, tensor in lora([QKV], alpha=None).items()}
    with pytest.raises(PlanError, match="not floating point"):
        cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])


def test_stage_refuses_a_quantized_layer_and_takes_the_others(tmp_path: Path) -> None:
    """`merge` dequantizes first; a manifest that does not say so is refused."""
    tensors = base_tensors()
    marker = list(orjson.dumps({"format": "int8_tensorwise"}))
    tensors[P + QKV + ".comfy_quant"] = torch.tensor(marker, dtype=torch.uint8)
    save(tmp_path / "quantized.safetensors", tensors)
    save(tmp_path / "base.safetensors", base_tensors())
    quantized, plain = (cq.open(tmp_path / f"{n}.safetensors") for n in ("quantized", "base"))
    stage = cq_merge.merge(plain, [save(tmp_path / "a.safetensors", lora([QKV]))]).stages[-1]
    with pytest.raises(PlanError) as caught:
        stage.apply(quantized)
    assert f"`{P}{QKV}.weight`" in caught.value.message
    assert "unquantized" in (caught.value.hint or "")
    other = cq_merge.merge(plain, [save(tmp_path / "b.safetensors", lora([CONV]))]).stages[-1]
    other.apply(quantized)


# --- numbers that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [".lora_up.weight", ".lora_down.weight"])
def test_merge_refuses_a_nonfinite_factor(
    base: Checkpoint, tmp_path: Path, which: str, bad: float
) -> None:
    file = lora([QKV])
    file["lora_unet_blocks_0_attn_qkv" + which][3, 5] = bad
    path = save(tmp_path / "a.safetensors", file)
    merged = cq_merge.merge(base, [path])
    with pytest.raises(InputError) as caught:
        merged.read(P + QKV + ".weight")
    assert f"`lora_unet_blocks_0_attn_qkv{which}` of `{path}`" in caught.value.message


@pytest.mark.parametrize(
    "alpha", [torch.tensor(math.nan), torch.tensor(math.inf).bfloat16(), torch.ones(2)]
)
def test_merge_refuses_an_alpha_that_is_no_number(
    base: Checkpoint, tmp_path: Path, alpha: torch.Tensor
) -> None:
    file = lora([QKV]) | {"lora_unet_blocks_0_attn_qkv.alpha": alpha}
    path = save(tmp_path / "a.safetensors", file)
    with pytest.raises(InputError, match=r"`lora_unet_blocks_0_attn_qkv\.alpha` of"):
        cq_merge.merge(base, [path])


def test_merge_reports_overflow_of_float16(tmp_path: Path) -> None:
    tensors = base_tensors(torch.float16)
    tensors[P + QKV + ".weight"][0, 0] = 65504.0
    save(tmp_path / "base.safetensors", tensors)
    base = cq.open(tmp_path / "base.safetensors")
    key = "lora_unet_blocks_0_attn_qkv"
    up, down = torch.zeros(192, 1), torch.zeros(1, 64)
    up[0, 0], down[0, 0] = 1.0, 15.0  # stays under the middle between 65504 and 65536
    file = {key + ".lora_up.weight": up, key + ".lora_down.weight": down}
    path = save(tmp_path / "a.safetensors", file)
    assert cq_merge.merge(base, [path]).read(P + QKV + ".weight")[0, 0] == 65504.0
    with pytest.raises(InputError, match=r"qkv\.weight` of .* overflows F16") as caught:
        cq_merge.merge(base, [path + ":2"]).read(P + QKV + ".weight")
    assert "strength" in (caught.value.hint or "")


def test_merge_says_if_the_base_was_not_finite(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors[P + QKV + ".weight"][7, 7] = math.nan
    save(tmp_path / "base.safetensors", tensors)
    base = cq.open(tmp_path / "base.safetensors")
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", lora([QKV]))])
    with pytest.raises(InputError, match="before anything is added"):
        merged.read(P + QKV + ".weight")


@pytest.mark.parametrize("strength", [1e300, -1e300])
def test_merge_reports_a_strength_beyond_float32(
    base: Checkpoint, tmp_path: Path, strength: float
) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    with pytest.raises(InputError, match="overflows BF16"):
        cq_merge.merge(base, [(path, strength)]).read(P + QKV + ".weight")


# --- the stage ------------------------------------------------------------------------------------


def test_merge_copies_what_it_does_not_touch(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    merged = cq_merge.merge(base, [path])
    touched = P + QKV + ".weight"
    assert merged.part(touched).extent is None
    for name in base.specs:
        if name != touched:
            assert merged.part(name) is base.part(name)
            assert merged.part(name).extent is not None
    assert base.specs == merged.specs
    assert [*base.inputs] == [*merged.inputs[:-1]]
    assert path == str(merged.inputs[-1].path)


def test_merge_keeps_the_promise_of_its_specs(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora(SHAPES))
    for part in cq_merge.merge(base, [path]).parts:
        assert part.nbytes == sum(piece.tensor.nbytes for piece in local.checked(part))


def test_merge_leaves_the_tensors_of_the_stage_before_alone(tmp_path: Path) -> None:
    """A stage may hand out what it keeps, and several tensors as one part."""
    kept = {"x.weight": torch.zeros(8, 8), "x.extra": torch.ones(3)}
    save(tmp_path / "base.safetensors", kept)
    opened = cq.open(tmp_path / "base.safetensors")
    part = Part(
        tensors=opened.specs,
        nbytes_peak=0,
        produce=lambda: (Piece(name, 0, tensor) for name, tensor in kept.items()),
    )
    base = Checkpoint(parts=(part,), metadata={}, sources=opened.sources)
    up, down = factors((8, 8), 2, 1)
    file = {"x.lora_up.weight": up, "x.lora_down.weight": down}
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])
    assert (merged.read("x.weight").double() - delta64(up, down, (8, 8))).abs().max() < 1e-6
    assert not kept["x.weight"].any()
    assert torch.equal(kept["x.extra"], merged.read("x.extra"))
    assert set(opened.specs) == set(merged.specs)


def test_merge_writes_equal_files_for_any_workers(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora(SHAPES))
    merged = cq_merge.merge(base, [path + ":0.8", path])
    for workers in (1, 2):
        cq.write(merged, tmp_path / f"{workers}.safetensors", workers=workers)
    one, two = ((tmp_path / f"{w}.safetensors").read_bytes() for w in (1, 2))
    assert one == two
    written = load_file(tmp_path / "1.safetensors")
    for name in base.specs:
        assert torch.equal(merged.read(name), written[name])


def test_merge_fused_equals_merge_staged(base: Checkpoint, tmp_path: Path) -> None:
    first = save(tmp_path / "a.safetensors", lora([QKV, CONV], seed=31))
    second = save(tmp_path / "b.safetensors", lora([QKV], seed=32))
    one = cq_merge.merge(base, [first])
    cq.write(cq_merge.merge(one, [second]), tmp_path / "fused.safetensors")
    cq.write(one, tmp_path / "middle.safetensors")
    middle = cq.open(tmp_path / "middle.safetensors")
    cq.write(cq_merge.merge(middle, [second]), tmp_path / "staged.safetensors")
    fused, staged = (tmp_path / f"{n}.safetensors" for n in ("fused", "staged"))
    assert fused.read_bytes() == staged.read_bytes()


def test_merge_works_through_a_manifest(base: Checkpoint, tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{s}.safetensors", lora(SHAPES, seed=s)) for s in (1, 2)]
    merged = cq_merge.merge(base, [paths[0] + ":0.8", paths[1]], scale=0.5)
    again = manifest.load(orjson.dumps(merged.manifest()), where="-")
    assert merged.manifest() == again.manifest()
    assert merged.notes == again.notes
    assert manifest.work_digest(merged) == manifest.work_digest(again)
    assert torch.equal(merged.read(P + QKV + ".weight"), again.read(P + QKV + ".weight"))


def test_stage_is_equal_after_its_arguments(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    stage = cq_merge.merge(base, [path], scale=0.3, allow_unmatched=True).stages[-1]
    assert isinstance(stage, MergeStage)
    arguments: dict[str, Any] = orjson.loads(orjson.dumps(stage.arguments()))
    assert {"path", "strength", "nbytes", "header", "sample"} == set(arguments["adapters"][0])
    assert stage == MergeStage.from_arguments(arguments)


def test_stage_takes_adapters_without_fingerprints(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    stage = MergeStage.from_arguments({"adapters": [{"path": path, "strength": 1.0}]})
    assert cq_merge.merge(base, [path]).stages[-1] == stage


def test_stage_refuses_an_adapter_that_changed(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV], seed=1))
    arguments = cq_merge.merge(base, [path]).stages[-1].arguments()
    save(tmp_path / "a.safetensors", lora([QKV], seed=2))
    with pytest.raises(PlanError, match="has changed"):
        MergeStage.from_arguments(arguments)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"dampenn": True}, "no argument `dampenn`", "`dampen`"),
        ({"dampen": 1}, "`dampen` cannot be", None),
        ({"scale": "1"}, "`scale` cannot be", None),
        ({"scale": True}, "`scale` cannot be", None),
        ({"allow_unmatched": None}, "`allow_unmatched` cannot be", None),
        ({"adapters": []}, "`adapters` cannot be", None),
        ({"adapters": ["a.safetensors"]}, "`adapters` cannot be", None),
        ({"adapters": [{"path": "a", "strenght": 1}]}, "no argument `strenght`", "`strength`"),
        ({"adapters": [{"path": "a", "strength": "1"}]}, "`strength` cannot be", None),
    ],
)
def test_stage_refuses_arguments_that_it_does_not_know(
    tmp_path: Path, changes: dict[str, Any], message: str, hint: str | None
) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV]))
    arguments = {"adapters": [{"path": path, "strength": 1.0}], **changes}
    with pytest.raises(InputError, match=message) as caught:
        MergeStage.from_arguments(arguments)
    assert hint is None or hint in (caught.value.hint or "")


def test_notes_say_what_each_adapter_does(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora([QKV, CONV], rank=8, alpha=4.0))
    merged = cq_merge.merge(base, [path + ":0.8"])
    expected = {
        "path": path,
        "strength": 0.8,
        "effective_strength": 0.8,
        "kind": "lora",
        "ranks": [8],
        "alphas": [4.0],
        "matched": 2,
        "unmatched": [],
        "layers": [P + QKV, P + CONV],
        "remarks": [],
    }
    assert (expected,) == merged.notes
    assert orjson.dumps(merged.notes)


def test_history_shortens_adapter_paths(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "style.safetensors", lora([QKV]))
    history = manifest.history(cq_merge.merge(base, [path]))
    assert str(tmp_path) not in history
    assert "style.safetensors" in history


def test_planning_imports_no_torch(base: Checkpoint, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", lora(SHAPES))
    code = (
        "import sys, cq, cq_merge\n"
        "merged = cq_merge.merge(cq.open(sys.argv[1]), [sys.argv[2] + ':0.8'])\n"
        "merged.manifest(), merged.notes, merged.nbytes\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "base.safetensors"), path]
    assert subprocess.run(command, check=False, env=os.environ).returncode == 0


def test_every_adapter_plug_keeps_its_protocol(base: Checkpoint) -> None:
    """A file of another kind is claimed by no plug, and asking changes nothing."""
    assert "lora" in catalog.names("adapters")
    for name in catalog.names("adapters"):
        plug = catalog.load("adapters", name)
        assert name == plug.kind
        assert plug.partner("x.weight") is None
        if name != CHECKPOINT:
            assert list(plug.claim(contents(base.sources[0], {}), Reading())) == []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_parse_adapter_takes_any_text(text: str) -> None:
    if "\0" in text:  # no path at all, in any system
        return
    try:
        path, strength = parse_adapter(text)
    except CqError:
        return
    assert math.isfinite(strength)
    assert text.startswith(path)


class _Doubled(Additive):
    """A kind that extends LoRA by one tensor and gives the weight twice over."""

    kind = "doubled"
    key = "lora_unet_blocks_0_attn_qkv"
    tensors = (f"{key}.lora_up.weight", f"{key}.lora_down.weight", f"{key}.doubling")

    def claim(self, source: Contents, reading: Reading) -> list[_Doubled]:
        return [self] if source.names.keys() >= set(self.tensors) else []

    def partner(self, name: str) -> str | None:
        return None

    def refuse(self, weight: TensorSpec) -> str | None:
        return None

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        return 0

    def load(self, dtype: torch.dtype) -> Apply:
        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            rows.mul_(1 + strength)

        return apply


@pytest.mark.parametrize("names", [("doubled", "lora"), ("lora", "doubled")])
def test_a_new_kind_claims_what_it_extends(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """In whatever order plugs are asked, the kind that explains more of a key has its tensors."""
    load, all_names = catalog.load, catalog.names
    monkeypatch.setattr(
        catalog, "names", lambda kind: names if kind == "adapters" else all_names(kind)
    )
    monkeypatch.setattr(
        catalog, "load", lambda kind, name: _Doubled() if name == "doubled" else load(kind, name)
    )
    file = lora([QKV, CONV], alpha=None) | {_Doubled.tensors[2]: torch.ones(192)}
    merged = cq_merge.merge(base, [save(tmp_path / "a.safetensors", file)])
    name = P + QKV + ".weight"
    assert merged.notes[0]["kind"] == "doubled+lora"
    assert torch.equal(merged.read(name), base.read(name) * 2)
    exact = base.read(P + CONV + ".weight").double() + lora64(file, CONV, None)
    assert_close(merged.read(P + CONV + ".weight"), exact)
