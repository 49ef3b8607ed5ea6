"""What a trial of `verify` and `edit` with broken files has found: values, shapes, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make
import pytest
import torch
from PIL import Image

import cq
import cq_merge
import cq_quant
from cq.core.errors import InputError
from cq_analyze.agreement import version
from cq_analyze.images import compare_images
from cq_analyze.verification import verify
from cq_edit.stage import edit

LAYER = "blocks.0.mlp.0"


def stored(tmp_path: Path, format: str, name: str = "q") -> dict[str, torch.Tensor]:
    """A quantized model of four layers with biases, as tensors."""
    tensors = {}
    for i in range(4):
        tensors[f"blocks.{i}.mlp.0.weight"] = make.weight(64, 256, dtype="BF16", seed=i)
        tensors[f"blocks.{i}.mlp.0.bias"] = make.weight(64, dtype="BF16", seed=f"bias {i}")
    base = make.save(tmp_path / f"{name}.base.safetensors", tensors)
    out = tmp_path / f"{name}.safetensors"
    cq.write(cq_quant.quantize(cq.open(base), format=format, only=["*"], optimizer="rtn"), out)
    return make.load(out)


def found(tmp_path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> list[str]:
    model = cq.open(make.save(tmp_path / "broken.safetensors", tensors))
    return [f.name for f in verify(model, **options).findings]


@pytest.mark.parametrize("format", ["float8_e4m3fn", "nvfp4"])
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (torch.tensor(0.5), []),
        (torch.tensor([0.5]), []),
        (torch.full((256,), 0.5), ["scale.shape"]),
        (torch.tensor(0.5, dtype=torch.float16), ["scale.dtype"]),
        (torch.tensor(0.0), ["scale.value"]),
    ],
)
def test_input_scales_are_one_number(
    format: str, scale: torch.Tensor, expected: list[str], tmp_path: Path
) -> None:
    tensors = stored(tmp_path, format)
    assert found(tmp_path, {**tensors, f"{LAYER}.input_scale": scale}) == expected


@pytest.mark.parametrize("format", ["int8_tensorwise", "nvfp4", "mxfp8", "convrot_w4a4"])
@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (torch.zeros(64), []),
        (torch.zeros(7), ["bias.shape"]),
        (torch.zeros(65), ["bias.shape"]),
        (torch.zeros(64, 1), ["bias.shape"]),
        (torch.zeros(64, dtype=torch.int8), ["bias.shape"]),
    ],
)
def test_biases_are_one_number_for_each_output(
    format: str, bias: torch.Tensor, expected: list[str], tmp_path: Path
) -> None:
    tensors = {**stored(tmp_path, format), f"{LAYER}.bias": bias}
    assert found(tmp_path, tensors, header_only=True) == expected


@pytest.mark.skipif(version() is None, reason="comfy-kitchen is not installed")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_both_decode_alike_are_no_disagreement(value: float, tmp_path: Path) -> None:
    tensors = stored(tmp_path, "float8_e4m3fn")
    codes = tensors[f"{LAYER}.weight"].view(torch.uint8)
    codes[3, 5] = 0x7F  # NaN
    if value == float("inf"):
        codes[3, 5] = 0x7E
        tensors[f"{LAYER}.weight_scale"] = torch.tensor(3e38)
    assert found(tmp_path, tensors) == ["values.range"]


@pytest.mark.parametrize(
    ("name", "tensor", "word"),
    [
        ("img_in.weight", torch.tensor([[1.0, float("nan")]]), "NaN"),
        ("img_in.weight", torch.tensor([[1.0, float("inf")]]).bfloat16(), "NaN"),
        (f"{LAYER}.weight_scale_2", torch.tensor(float("nan")), "NaN"),
        (f"{LAYER}.weight_scale_2", torch.tensor(0.0), "zero or negative"),
        (f"{LAYER}.weight_scale_2", torch.tensor(-1.0), "zero or negative"),
    ],
)
def test_no_value_that_is_none_is_added(
    name: str, tensor: torch.Tensor, word: str, tmp_path: Path
) -> None:
    tensors = stored(tmp_path, "nvfp4")
    whole = {k: v for k, v in tensors.items() if k.startswith(LAYER) and not k.endswith(".bias")}
    added = make.save(tmp_path / "added.safetensors", {**whole, name: tensor})
    base, out = cq.open(tmp_path / "q.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(InputError, match=f"`added.safetensors` holds .*{word}|holds .*{word}"):
        cq.write(edit(base, add_keys=[str(added)], replace=True), out)
    assert not list(tmp_path.glob("out*"))
    cq.write(edit(base, add_keys=[str(added)], replace=True, allow_broken=True), out)
    assert verify(cq.open(out)).findings
    sound = make.save(tmp_path / "sound.safetensors", whole)
    cq.write(edit(base, add_keys=[str(sound)], replace=True), out, force=True)
    assert not verify(cq.open(out)).findings


def pictures(tmp_path: Path, left: Image.Image, right: Image.Image) -> Any:
    for name, image in (("a", left), ("b", right)):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "1.png")
    return compare_images(tmp_path / "a", tmp_path / "b")


def test_pictures_of_16_bits_are_compared_in_all_of_their_range(tmp_path: Path) -> None:
    import numpy as np

    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    left, right = (Image.fromarray((ramp * f).astype(np.uint16)) for f in (1, 0.5))
    done = pictures(tmp_path, left, right)
    assert done.pictures[0].psnr == pytest.approx(10.8, abs=0.2)


def test_transparency_is_a_difference(tmp_path: Path) -> None:
    left = Image.new("RGBA", (32, 32), (200, 10, 10, 255))
    right = Image.new("RGBA", (32, 32), (200, 10, 10, 128))
    (tmp_path / "a" / "more").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    left.save(tmp_path / "a" / "1.png")
    right.save(tmp_path / "b" / "1.png")
    done = compare_images(tmp_path / "a", tmp_path / "b")
    assert done.pictures[0].psnr < 20
    assert any("folders inside" in note for note in done.notes)


def test_a_reference_without_the_merge_is_told_of(tmp_path: Path) -> None:
    base = make.save(tmp_path / "base.safetensors", {f"{LAYER}.weight": make.weight(64, 256)})
    low, high = make.weight(2, 256, seed="low"), make.weight(64, 2, seed="high")
    lora = make.save(
        tmp_path / "style.safetensors",
        {f"{LAYER}.lora_A.weight": low, f"{LAYER}.lora_B.weight": high},
    )
    merged = cq_merge.merge(cq.open(base), [f"{lora}:0.5"])
    out = tmp_path / "out.safetensors"
    cq.write(cq_quant.quantize(merged, only=["*"], optimizer="rtn"), out)
    (note,) = [n for n in verify(cq.open(out), against=cq.open(base)).notes if "merge" in n]
    assert "style.safetensors:0.5" in note
    assert not [n for n in verify(cq.open(out), against=merged).notes if "merge" in n]
