"""Checkpoints: known before a weight is read, and torch left alone until then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import make
import pytest
import torch

import cq
import cq_quant
from cq.core.checkpoint import Checkpoint, constant_part
from cq.core.dtypes import TensorSpec
from cq.core.errors import InternalError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.save(tmp_path / "base.safetensors", make.model(), {"format": "pt"})


def test_checkpoint_knows_specs_without_reading(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reads(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("cq.core.source.SourceFile.read_into", no_reads)
    checkpoint = cq_quant.quantize(cq.open(base))
    assert checkpoint.specs["blocks.0.mlp.0.weight"] == TensorSpec("I8", (256, 64))
    assert checkpoint.nbytes == sum(spec.nbytes for spec in checkpoint.specs.values())
    assert len(checkpoint.notes) > 0


PROGRAMS = {
    "open": "cq.open(sys.argv[1]).specs",
    "manifest": "cq.open(sys.argv[1]).manifest()",
    "quantize": "cq_quant.quantize(cq.open(sys.argv[1])).manifest()",
    "error": "open('x.safetensors', 'wb').close(); cq.open('x.safetensors')",
    "copy": "cq.write(cq.open(sys.argv[1]), 'copy.safetensors')",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_planning_imports_no_torch(program: str, base: Path, tmp_path: Path) -> None:
    """Nor numpy: a plan of a 24 GB model takes a fraction of a second. Copies need neither."""
    code = (
        "import contextlib, sys, cq, cq_quant\n"
        f"with contextlib.suppress(cq.CqError): {PROGRAMS[program]}\n"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_read_many_produces_each_part_once(tmp_path: Path) -> None:
    runs: list[int] = []
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    checkpoint = make.checkpoint(make.part(tensors, hook=lambda: runs.append(1)))
    found = checkpoint.read_many(["b", "a"])
    assert runs == [1]
    assert list(found) == ["b", "a"]
    assert torch.equal(tensors["b"], found["b"])


def test_checkpoint_refuses_two_parts_of_one_tensor() -> None:
    part = make.part({"a": torch.ones(3)})
    with pytest.raises(InternalError, match="same tensor"):
        assert make.checkpoint(part, part).specs


def test_constant_part_holds_its_bytes() -> None:
    checkpoint = make.checkpoint(constant_part("layer.comfy_quant", b'{"a": 1}'))
    assert checkpoint.specs["layer.comfy_quant"] == TensorSpec("U8", (8,))
    assert bytes(checkpoint.read("layer.comfy_quant").tolist()) == b'{"a": 1}'


def test_after_keeps_what_it_does_not_change(base: Path) -> None:
    before = cq.open(base)
    after = before.after(make.NothingStage())
    assert before.parts == after.parts
    assert before.metadata == after.metadata
    assert [stage.name for stage in after.stages] == ["nothing"]
    assert before.stages == ()


def test_parts_yield_the_same_values_every_time(base: Path) -> None:
    checkpoint: Checkpoint = cq_quant.quantize(cq.open(base))
    for part in checkpoint.parts:
        first, second = list(part.produce()), list(part.produce())
        assert [p[:2] for p in first] == [p[:2] for p in second]
        assert all(make.same(a.tensor, b.tensor) for a, b in zip(first, second, strict=True))


def test_parts_promise_their_peak_of_memory(base: Path) -> None:
    """What a part yields at once is never more than what it said it would hold."""
    for checkpoint in (cq.open(base), cq_quant.quantize(cq.open(base))):
        for part in checkpoint.parts:
            for piece in part.produce():
                assert piece.tensor.nbytes <= part.nbytes_peak
