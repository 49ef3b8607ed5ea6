"""The golden files: what every storage format means, byte for byte, for all time.

They are made from comfy-kitchen's own quantizers (`python -m tests.golden.make`). cq must read them
as kitchen does, and write the same bytes from the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make
import pytest
import torch

import cq
import cq_quant
from cq.core import catalog, comfy
from cq.core.dequantize import Dequantize
from cq.core.dtypes import spec_of
from cq.core.formats import Format, decode
from tests.golden import kitchen, text
from tests.golden.make import CASES, FOLDER

FORMATS = tuple(n for n in catalog.names("formats") if not catalog.load("formats", n).casts)
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
EVERY = pytest.mark.parametrize("golden", NAMES, indirect=True)
LAYER = "blocks.0.mlp"


class Golden:
    """A golden file, parsed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        self.plug: Format = catalog.load("formats", self.document["format"])
        self.marker: dict[str, Any] = self.document["marker"]
        self.shape: tuple[int, int] = tuple(self.document["shape"])
        self.weight = text.matrix(self.document["weight"], self.shape[1])
        told = self.document["decoded"]
        self.decoded = self.weight if told == "weight" else text.matrix(told, self.shape[1])
        self.tensors = {k: text.tensor(v) for k, v in self.document["tensors"].items()}

    def save(self, directory: Path) -> Path:
        """A file that holds the layer as it is stored."""
        named = {f"{LAYER}.{local}": tensor for local, tensor in self.tensors.items()}
        raw = torch.frombuffer(bytearray(comfy.marker_bytes(self.marker)), dtype=torch.uint8)
        return make.save(directory / "golden.safetensors", {**named, f"{LAYER}.comfy_quant": raw})

    def written_by_cq(self, directory: Path) -> dict[str, torch.Tensor]:
        """The tensors, by local name, of a file in which cq quantized the weight."""
        source = make.save(directory / "in.safetensors", {f"{LAYER}.weight": self.weight})
        quantized = cq_quant.quantize(
            cq.open(source),
            format=self.document["format"],
            only=[LAYER],
            scale_search=False,
            allow_custom_loader=True,
            **self.document["quantize"],
        )
        path = directory / "out.safetensors"
        cq.write(quantized, path)
        return {name.removeprefix(f"{LAYER}."): t for name, t in make.load(path).items()}


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_golden_file(name: str) -> None:
    found = [n for n in NAMES if n.split("-")[0] == name]
    assert found, (
        f"the format `{name}` has no golden file: add a case to tests/golden/make.py and run"
        " `python -m tests.golden.make`"
    )


def test_every_golden_file_is_of_a_format() -> None:
    assert {Golden(name).document["format"] for name in NAMES} == set(FORMATS)


def test_every_golden_file_has_a_case_that_makes_it() -> None:
    assert sorted(case.name for case in CASES) == list(NAMES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_file_is_what_kitchen_makes_today(case: Any) -> None:
    """By any release of kitchen: one that rounds in another way would change what files mean."""
    expected = json.loads((FOLDER / f"{case.name}.json").read_text())
    found = json.loads(text.dump(case.document()))
    expected["made_by"] = found["made_by"]
    assert expected == found


@EVERY
def test_golden_tensors_decode_exactly(golden: Golden) -> None:
    assert make.same(golden.decoded, decode(golden.plug, golden.tensors, golden.marker))


@EVERY
def test_golden_file_is_dequantized_exactly(golden: Golden, tmp_path: Path) -> None:
    """As a file, through the stage that undoes a quantization."""
    plain = Dequantize(dtype="F32").apply(cq.open(golden.save(tmp_path)))
    assert list(plain.specs) == [f"{LAYER}.weight"]
    assert make.same(golden.decoded, plain.read(f"{LAYER}.weight"))


@EVERY
def test_golden_layer_has_no_faults(golden: Golden) -> None:
    stored = {name: spec_of(tensor) for name, tensor in golden.tensors.items()}
    assert golden.plug.check(stored, golden.marker) == []


@EVERY
def test_cq_writes_the_golden_bytes(golden: Golden, tmp_path: Path) -> None:
    """Marker included, and no tensor more."""
    found = golden.written_by_cq(tmp_path)
    assert comfy.marker_bytes(golden.marker) == bytes(found.pop("comfy_quant").tolist())
    assert sorted(golden.tensors) == sorted(found)
    for local, expected in golden.tensors.items():
        assert text.stored(expected) == text.stored(found[local]), local


@pytest.mark.parametrize(
    "golden",
    [name for name in NAMES if name.split("-")[0] in kitchen.LAYOUTS],
    indirect=True,
)
def test_kitchen_decodes_what_cq_writes(golden: Golden, tmp_path: Path) -> None:
    found = golden.written_by_cq(tmp_path)
    marker = json.loads(bytes(found.pop("comfy_quant").tolist()))
    value = kitchen.dequantize(golden.document["format"], found, marker, golden.shape)
    assert make.same(golden.decoded, value)


def test_text_of_tensors_is_read_back_exactly() -> None:
    """All bits, also of -0, NaN, runs of zeros and shapes without rows."""
    for dtype in ("F32", "BF16", "I8", "F8_E4M3", "F8_E8M0", "U8"):
        for shape in ((), (3,), (40, 4), (2, 40), (3, 5)):
            noise = make.noise(dtype, shape, seed="golden")
            if noise.ndim == 2:
                noise.view(torch.uint8)[1:, :9] = 0
            told = json.loads(json.dumps(text.stored(noise)))
            assert make.same(noise, text.tensor(told)), (dtype, shape)


def test_text_of_numbers_is_read_back_exactly() -> None:
    values = make.weight(20, 30, seed="golden")
    values[2:12] = 0
    values[0, 3:20] = 0
    values[1, 4] = -0.0
    values[13, :] = -0.0
    told = json.loads(text.dump({"rows": text.numbers(values)}))["rows"]
    assert {"zeros": 10} in told
    assert make.same(values, text.matrix(told, 30))
