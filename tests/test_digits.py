"""The embedded model: what it is, and that merging and quantizing it show in its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import cq
import cq_merge
import cq_quant
from examples.digits.contact_sheet import psnr
from examples.digits.model import DigitsFlux, load
from examples.digits.sample import sample
from tests.processes import BASE, STYLE

CLASSES = list(range(10))
STEPS = 10


def images(model: DigitsFlux) -> torch.Tensor:
    return sample(model, CLASSES, seed=1, steps=STEPS)


@pytest.fixture(scope="module")
def base_images() -> torch.Tensor:
    return images(load(BASE))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "merged.safetensors"
    cq.write(cq_merge.merge(cq.open(BASE), [STYLE]), path)
    return path


@pytest.fixture(scope="module")
def merged_images(merged: Path) -> torch.Tensor:
    return images(load(merged))


def test_digits_is_what_comfyui_detects_as_flux_schnell() -> None:
    """The names and shapes by which ComfyUI detects Flux, and the sizes that it reads there."""
    with safe_open(BASE, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "double_blocks.0.img_mod.lin.weight",
        "vector_in.in_layer.weight",
        "img_in.weight",
    ):
        assert name in shapes
    assert not [name for name in shapes if name.startswith(("guidance_in", "distilled"))]
    hidden, packed = shapes["img_in.weight"]
    assert (hidden, packed // 4) == (256, 16)
    assert hidden // 128 == 2, "two heads of 128"
    assert [hidden, shapes["txt_in.weight"][1]] == shapes["txt_in.weight"]
    assert [16 * 4, hidden] == shapes["final_layer.linear.weight"]


def test_digits_and_its_lora_stay_small() -> None:
    assert BASE.stat().st_size + STYLE.stat().st_size < 12_000_000


def test_style_shows_after_merge(base_images: torch.Tensor, merged_images: torch.Tensor) -> None:
    """The style is dark digits on bright paper, so the mean of the image changes its sign."""
    assert float(base_images.mean()) < -0.3
    assert float(merged_images.mean()) > 0.3


@pytest.mark.parametrize("optimizer", ["rtn", "quip"])
def test_style_and_digits_survive_merge_and_quantization(
    optimizer: str, merged_images: torch.Tensor, tmp_path: Path
) -> None:
    model = cq_merge.merge(cq.open(BASE), [STYLE])
    out = tmp_path / "out.safetensors"
    cq.write(cq_quant.quantize(model, optimizer=optimizer), out)
    quantized = images(load(out))
    assert float(quantized.mean()) > 0.3
    assert psnr(quantized, merged_images) > 35


def test_strength_zero_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    cq.write(cq_merge.merge(cq.open(BASE), [(STYLE, 0.0)]), out)
    with safe_open(BASE, "pt") as before, safe_open(out, "pt") as after:
        for name in sorted(before.keys()):
            assert before.get_tensor(name).equal(after.get_tensor(name))


def test_provenance_says_how_the_file_was_made(merged: Path) -> None:
    with safe_open(merged, "pt") as file:
        history: dict[str, Any] = json.loads(file.metadata()["cq.history"])
    assert [source["name"] for source in history["sources"]] == ["digits.safetensors"]
    assert [(stage["op"], stage["adapters"][0]["name"]) for stage in history["stages"]] == [
        ("merge", "style.safetensors")
    ]
