"""Bad input on the command line: the documented exit code, one message, nothing left behind."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cq.cli.main import run
from cq.cli.output import Terminal
from tests.processes import BASE, STYLE

WEIGHT = "blocks.0.linear.weight"


@dataclass
class Ended:
    code: int
    out: str
    err: str


def cq(*argv: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    code = run([str(a) for a in argv], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return Ended(code, out.getvalue(), err.getvalue())


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def model(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({WEIGHT: torch.randn(128, 128).bfloat16(), **tensors}, path)
    return path


def entry(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


def truncated(path: Path) -> Path:
    path.write_bytes(model(path).read_bytes()[:-10])
    return path


def spoiled(value: float) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        weight = torch.randn(128, 128)
        weight[3, 5] = value
        save_file({WEIGHT: weight.bfloat16()}, path)
        return path

    return make


def quantized(path: Path) -> Path:
    assert cq("quant", BASE, "-o", path, "-q").code == 0
    return path


def unmarked(path: Path) -> Path:
    save_file({WEIGHT: torch.zeros(128, 128, dtype=torch.int8)}, path)
    return path


BAD = {
    "truncated": (truncated, 3, f"is truncated: 10 bytes are missing, from tensor `{WEIGHT}` on"),
    "empty": (lambda p: (p.write_bytes(b"") and p) or p, 3, "it has 0 bytes, less than a header"),
    "overlapping": (
        lambda p: raw_file(p, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        3,
        "tensor `b` overlaps the tensor before it",
    ),
    "gapped": (
        lambda p: raw_file(p, {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
        3,
        "tensor `b` leaves a gap before it",
    ),
    "oversized header": (
        lambda p: (p.write_bytes(struct.pack("<Q", 1 << 62) + b"{}") and p) or p,
        3,
        "over the format's limit of 100000000",
    ),
    "oversized tensor": (
        lambda p: raw_file(
            p, {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}
        ),
        3,
        "tensor `a` has a shape whose size overflows",
    ),
    "unknown dtype": (
        lambda p: raw_file(p, {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}),
        3,
        "tensor `a` has the unknown dtype `F99`",
    ),
    "not JSON": (lambda p: raw_file(p, b"{nonsense"), 3, "its header is not JSON"),
    "NaN": (spoiled(float("nan")), 3, f"tensor `{WEIGHT}` of `"),
    "infinity": (spoiled(float("inf")), 3, "holds 0 NaN and 1 infinite values"),
    "already quantized": (
        quantized,
        4,
        "is quantized already: 16 layers: 16 int8_tensorwise, such",
    ),
    "integers without a marker": (unmarked, 4, "(by its dtype)"),
    "nothing to quantize": (
        lambda p: save_file({"norm.scale": torch.ones(4)}, p) or p,
        4,
        "there is no layer to quantize",
    ),
    "missing": (lambda p: p, 3, "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoint_is_one_error_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    make, code, words = BAD[name]
    source = make(tmp_path / "bad.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    ended = cq("quant", source, "-o", tmp_path / "out.safetensors", "-q")
    assert (code, "") == (ended.code, ended.out)
    assert ended.err.startswith("error: ")
    assert ended.err.count("error: ") == 1
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert before == sorted(p.name for p in tmp_path.iterdir())


def lora(path: Path, prefix: str, rows: int = 128, **more: torch.Tensor) -> Path:
    save_file(
        {
            f"{prefix}.lora_up.weight": torch.ones(rows, 4),
            f"{prefix}.lora_down.weight": torch.ones(4, 128),
            **more,
        },
        path,
    )
    return path


WRONG_LORA = {
    "another model": (lambda p: lora(p, "lora_unet_other_7_attn"), 4, "names no layer of"),
    "another size": (lambda p: lora(p, "lora_unet_blocks_0_linear", rows=64), 4, "does not fit"),
    "half a pair": (
        lambda p: save_file({"lora_unet_blocks_0_linear.lora_up.weight": torch.ones(4, 4)}, p) or p,
        3,
        "without",
    ),
    "a kind that is not merged": (
        lambda p: lora(
            p,
            "lora_unet_blocks_0_linear",
            **{"lora_unet_blocks_0_linear.vera_lambda_b": torch.ones(128, 1)},
        ),
        4,
        "of a kind that this version does not merge",
    ),
    "NaN": (
        lambda p: lora(
            p,
            "lora_unet_blocks_0_linear",
            **{"lora_unet_blocks_0_linear.alpha": torch.tensor(float("nan"))},
        ),
        3,
        "holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", WRONG_LORA)
def test_wrong_lora_is_one_error_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    make, code, words = WRONG_LORA[name]
    base, adapter = model(tmp_path / "base.safetensors"), make(tmp_path / "lora.safetensors")
    ended = cq("merge", base, adapter, "-o", tmp_path / "out.safetensors", "-q")
    assert (code, "") == (ended.code, ended.out)
    assert ended.err.startswith("error: ")
    assert words in ended.err
    assert "lora.safetensors" in ended.err
    assert ["base.safetensors", "lora.safetensors"] == sorted(p.name for p in tmp_path.iterdir())


USAGE = {
    "misspelt command": (("qaunt",), "did you mean `quant`?"),
    "misspelt option": (("quant", BASE, "--optimiser", "rtn"), "did you mean `--optimizer`?"),
    "no adapter": (("merge", BASE), "`cq merge BASE ADAPTER:0.8`"),
    "strength": (("merge", BASE, f"{STYLE}:nan"), "it is a finite number"),
    "size": (("quant", BASE, "--memory-limit", "much"), "`much` is not a size"),
    "regular expression": (("quant", BASE, "--skip", "re:(", "--dry-run"), "`re:(`"),
    "quip without rotation": (
        ("quant", BASE, "--optimizer", "quip", "--rotate", "off"),
        "`--optimizer rtn`",
    ),
    "gate without a reference": (("verify", BASE, "--min-sqnr", "30"), "`--against"),
    "stdin twice": (("verify", "-", "--against", "-"), "both"),
    "shell": (("completions", "tcsh"), "`bash`, `zsh`, `fish`"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_error_is_2_with_a_hint(name: str) -> None:
    argv, words = USAGE[name]
    ended = cq(*argv)
    assert (2, "") == (ended.code, ended.out)
    assert ended.err.startswith("error: ")
    assert words in ended.err


PLANS = {
    "optimizer": (("quant", BASE, "--optimizer", "qip"), "did you mean `quip`?"),
    "format": (("quant", BASE, "--format", "int8_tensorwse"), "did you mean `int8_tensorwise`"),
    "scaling": (("quant", BASE, "--scaling", "block"), "it has `row` and `tensor`"),
    "pattern": (("quant", BASE, "--skip", "doubleblocks.*"), "matches no layer"),
    "output is the input": (("quant", BASE, "-o", BASE, "--force"), "is an input"),
}


@pytest.mark.parametrize("name", PLANS)
def test_impossible_plan_is_4_with_what_there_is(name: str) -> None:
    before = BASE.read_bytes()
    argv, words = PLANS[name]
    ended = cq(*argv)
    assert (4, "") == (ended.code, ended.out)
    assert words in ended.err
    assert before == BASE.read_bytes()


def test_memory_limit_that_no_layer_fits_is_5_before_any_work(tmp_path: Path) -> None:
    ended = cq("quant", BASE, "--memory-limit", "1MB", "-o", tmp_path / "out.safetensors")
    assert ended.code == 5
    assert "over the memory limit of 1.0 MB" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert cq("quant", BASE, "-o", out).code == 4
    assert out.read_bytes() == b"mine"
    assert cq("quant", BASE, "-o", out, "--force", "-q").code == 0
    assert out.read_bytes() != b"mine"


def test_a_bug_is_70_and_asks_to_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("what no test foresaw")

    monkeypatch.setattr("cq.core.manifest.open_checkpoint", broken)
    ended = cq("quant", BASE)
    assert ended.code == 70
    assert "this is a bug in cq" in ended.err
    assert "Traceback" not in ended.err
    assert "Traceback" in cq("quant", BASE, "--debug").err
