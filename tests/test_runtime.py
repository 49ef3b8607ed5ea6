"""The bench's runtime in floats: what it computes is what the layouts' kernels compute."""

from __future__ import annotations

from pathlib import Path

import make
import pytest
import torch

import cq
import cq_quant
from bench.runtime import Inputs, rounded_inputs, running
from cq import layouts
from cq.layouts import QuantizedTensor

LAYER = "blocks.0.mlp"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("int8_tensorwise", {"rotate": "off"}),
        ("int8_tensorwise", {"rotate": "64"}),
        ("convrot_w4a4", {}),
    ],
)
def test_rounded_floats_give_what_the_kernels_give(
    name: str, settings: dict[str, str], tmp_path: Path
) -> None:
    tensors = {f"{LAYER}.weight": make.weight(96, 64), f"{LAYER}.bias": make.weight(96)}
    make.save(tmp_path / "m", tensors)
    cq.write(cq_quant.quantize(cq.open(tmp_path / "m"), format=name, **settings), tmp_path / "q")  # type: ignore[arg-type]
    x = torch.randn(5, 7, 64, generator=make.generator("x"))

    def model() -> torch.nn.Module:
        inner = torch.nn.ModuleDict({"mlp": torch.nn.Linear(64, 96)})
        return torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({"0": inner})})

    kernel, floats = model(), model()
    layouts.load(kernel, tmp_path / "q")
    found = running(cq.open(tmp_path / "q"))
    floats.load_state_dict(found.state)
    with torch.no_grad(), rounded_inputs(floats, found.inputs):
        own, other = (m.get_submodule(LAYER)(x) for m in (floats, kernel))
        plain = x @ tensors[f"{LAYER}.weight"].T + tensors[f"{LAYER}.bias"]
    assert float((own - other).norm() / other.norm()) < 1e-5
    assert float((own - plain).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_block_formats_round_inputs_as_they_round_weights(name: str) -> None:
    x = torch.randn(32, 64, generator=make.generator("x")) * 3
    layout = QuantizedTensor.from_float(x, name, search=False)
    assert torch.equal(Inputs(format=name, group=None)(x), layout.dequantize())


def test_float8_inputs_are_clipped_at_their_scale() -> None:
    x = torch.tensor([[-3.0, 0.3, 1000.0]])
    plain = Inputs(format="float8_e4m3fn", group=None)(x)
    assert plain.tolist() == [[-3.0, 0.3125, 448.0]]
    scaled = Inputs(format="float8_e4m3fn", group=None, scale=1000 / 448)(x)
    assert float(scaled[0, 2]) == pytest.approx(1000)
