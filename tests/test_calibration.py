"""Calibration files and the recorder: what is in them is what the layers have seen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_architecture import check

import cq_analyze
from cq import layouts, open, write
from cq.calibration import HELD_EVERY, Recorder
from cq.core import calibration as files
from cq.core.calibration import Calibration, Statistics
from cq.core.errors import CqError, InputError, PlanError, UsageError
from cq.core.moment import Moment
from cq_quant import quantize
from tests.processes import cq


class Block(torch.nn.Module):
    """q, k and v of one input, as attention has them, and a layer behind."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        for name in "qkv":
            setattr(self, name, torch.nn.Linear(width, width))
        self.out = torch.nn.Linear(width, 8)
        self.conv = torch.nn.Conv1d(1, 1, 1)
        self.same: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(self.same(x))
        mixed: torch.Tensor = self.out(torch.tanh(q + k + v))
        return mixed


def inputs(*shape: int, seed: object = 0) -> torch.Tensor:
    """Correlated rows with a mean: a few directions and noise."""
    rng = make.generator("inputs", shape, seed)
    width = shape[-1]
    mix = torch.randn(6, width, generator=make.generator("mix", width))
    low = torch.randn(*shape[:-1], 6, generator=rng) @ mix
    return low + 0.3 * torch.randn(shape, generator=rng) + 0.5


def record(
    path: Path, model: torch.nn.Module, *calls: torch.Tensor, **settings: Any
) -> Calibration:
    with Recorder(model, **settings) as recorder, torch.no_grad():
        for value in calls:
            model(value)
    recorder.save(path, force=True)
    return Calibration.open(path)


def moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The explicit second moments of the rows that are recorded and held back."""
    flat = rows.reshape(-1, rows.shape[-1]).double()
    held = torch.arange(flat.shape[0]) % HELD_EVERY == HELD_EVERY - 1
    return tuple(part.T @ part / part.shape[0] for part in (flat[~held], flat[held]))  # type: ignore[return-value]


def matrix(found: Moment) -> torch.Tensor:
    return torch.diag(found.rest.double()) + found.sketch.double().T @ found.sketch.double()


# The recorder -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "width"), [(64, 32), (8, 16), (8, 48)])
def test_what_is_recorded_is_the_second_moment(rank: int, width: int, tmp_path: Path) -> None:
    """Exactly up to bfloat16 where the rank suffices; else the diagonal, and what matters most. In
    several calls of any leading shape, through the buffer and through the whole matrix."""
    calls = [inputs(3, 40, width, seed=1), inputs(200, width, seed=2), inputs(1, 1, 9, width)]
    found = record(tmp_path / "c", Block(width), *calls, rank=rank, held_rank=rank)
    whole = torch.cat([call.reshape(-1, width) for call in calls])
    explicit, held_explicit = moments(whole)
    own, held = found.moment("q"), found.held("q")
    assert held is not None
    assert torch.allclose(own.diagonal().double(), explicit.diagonal(), rtol=1e-2)
    distance = torch.linalg.matrix_norm(matrix(own) - explicit)
    assert float(distance / torch.linalg.matrix_norm(explicit)) < (0.006 if rank > width else 0.03)
    distance = torch.linalg.matrix_norm(matrix(held) - held_explicit)
    assert float(distance / torch.linalg.matrix_norm(held_explicit)) < 0.05
    statistics = found.statistics("q")
    assert torch.allclose(statistics.mean, whole.mean(0), atol=1e-4)
    assert torch.equal(statistics.absmax, whole.abs().amax(0))
    assert statistics.rows + statistics.held_rows == whole.shape[0]
    assert statistics.held_rows == whole.shape[0] // HELD_EVERY


def test_layers_that_share_an_input_are_recorded_once(tmp_path: Path) -> None:
    found = record(tmp_path / "c", Block(), inputs(64, 32), inputs(64, 32, seed=1))
    assert {n: r.stored_as for n, r in found.layers.items()} == {
        "q": "q", "k": "q", "v": "q", "out": "out",
    }  # fmt: skip
    assert "k.diag" not in make.load(tmp_path / "c")


def test_layers_that_part_later_are_recorded_apart(tmp_path: Path) -> None:
    """What they have seen together counts for both."""
    model, first, second = Block(), inputs(80, 32), inputs(80, 32, seed=1)
    with Recorder(model) as recorder, torch.no_grad():
        model(first)
        model.same = lambda x: 3 * x
        model(second)
    recorder.save(tmp_path / "c")
    found = Calibration.open(tmp_path / "c")
    assert found.layers["k"].stored_as == "q"
    assert found.layers["v"].stored_as == "v"
    together = moments(torch.cat((first, second)))[0].diagonal()
    assert torch.allclose(found.moment("q").diagonal().double(), together, rtol=1e-2)
    assert bool((found.moment("v").diagonal() > 2 * found.moment("q").diagonal()).all())


def test_a_tensor_changed_in_place_is_another_input(tmp_path: Path) -> None:
    model = Block()
    model.same = lambda x: x.mul_(2)
    found = record(tmp_path / "c", model, inputs(64, 32))
    assert found.layers["v"].stored_as == "v"
    assert torch.allclose(found.moment("v").diagonal(), 4 * found.moment("q").diagonal(), rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_is_recorded_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, value = Block().to(dtype), inputs(64, 32).to(dtype)
    found = record(tmp_path / "c", model, value)
    assert torch.allclose(
        found.moment("q").diagonal().double(), moments(value.float())[0].diagonal(), rtol=1e-2
    )


def test_inference_mode_keywords_and_quantized_layers_are_recorded(tmp_path: Path) -> None:
    weights = {f"{n}.weight": make.weight(256, 256) for n in ("a", "b")}
    make.save(tmp_path / "m.safetensors", weights)
    write(quantize(open(tmp_path / "m.safetensors"), only=["a"]), tmp_path / "q.safetensors")

    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Linear(256, 256, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(input=self.a(input=x))
            return y

    model = Pair()
    layouts.load(model, tmp_path / "q.safetensors")
    with Recorder(model) as recorder, torch.inference_mode():
        model(inputs(16, 256))
    assert dict(recorder.rows) == {"a": 16, "b": 16}


def test_the_cap_spreads_over_the_rows_of_a_call(tmp_path: Path) -> None:
    value = torch.cat((inputs(500, 32), 5 * inputs(500, 32)))
    found = record(tmp_path / "c", Block(), value, rows_per_call=100)
    assert found.layers["q"].rows + found.layers["q"].held_rows == 100
    whole = record(tmp_path / "d", Block(), value, rows_per_call=None)
    ratio = found.moment("q").diagonal().mean() / whole.moment("q").diagonal().mean()
    assert 0.7 < float(ratio) < 1.4


def test_rows_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    value = inputs(64, 32)
    value[3, 5], value[9, 1] = torch.nan, torch.inf
    found = record(tmp_path / "c", Block(), value)
    assert found.layers["q"].rows + found.layers["q"].held_rows == 62


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, calls = Block(), [inputs(300, 32, seed=i) for i in range(3)]
    record(tmp_path / "a", model, *calls, rank=8)
    record(tmp_path / "b", model, *calls, rank=8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_does_not_grow_with_the_rows() -> None:
    model = Block(64)
    with Recorder(model, rank=4, held_rank=4) as recorder, torch.no_grad():
        for seed in range(20):
            model(inputs(200, 64, seed=seed))
    sketch = recorder._layers["q"]._taken
    assert sketch._buffer.shape[0] <= 12
    assert recorder.rows["q"] == 4000


def test_hooks_go_with_the_block() -> None:
    model = Block()
    with Recorder(model) as recorder:
        model(inputs(8, 32))
    model(inputs(8, 32))
    assert recorder.rows["q"] == 8
    assert not model.q._forward_pre_hooks


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Recorder(torch.nn.Conv2d(1, 1, 1)), "no linear layers"),
        (lambda: Recorder(Block(), rank=0), "`rank` must be positive"),
        (lambda: Recorder(Block()).save("never"), "nothing was recorded"),
    ],
)
def test_what_cannot_be_recorded_is_said(act: Callable[[], Any], message: str) -> None:
    with pytest.raises((UsageError, PlanError), match=message):
        act()
    assert not Path("never").exists()


# Files --------------------------------------------------------------------------------------------


def statistics(columns: int = 16, rank: int = 4, rows: int = 100, seed: object = 0) -> Statistics:
    value = inputs(rows, columns, seed=seed)
    values, vectors = torch.linalg.eigh(value.T @ value / rows)
    sketch = (vectors * values.clamp(min=0).sqrt()).T.flip(0)[:rank].contiguous()
    diag = value.square().mean(0)
    return Statistics(
        diag=diag, sketch=sketch, mean=value.mean(0), absmax=value.abs().amax(0), rows=rows,
        held_diag=diag.clone(), held_sketch=sketch[:2], held_rows=rows // 4,
    )  # fmt: skip


def test_a_file_holds_what_was_saved(tmp_path: Path) -> None:
    given_, path = statistics(), tmp_path / "c"
    files.save(path, {"x.y": given_}, {"x.z": "x.y"})
    found = Calibration.open(path)
    assert set(found.layers) == {"x.y", "x.z"}
    back = found.statistics("x.z")
    assert torch.equal(back.sketch, given_.sketch.bfloat16().float())
    for name in ("diag", "mean", "absmax", "held_diag", "rows", "held_rows"):
        expected, value = getattr(given_, name), getattr(back, name)
        assert (
            torch.equal(expected, value) if isinstance(value, torch.Tensor) else expected == value
        )


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    files.save(tmp_path / "c", {"x": statistics()})
    code = (
        "import sys; from cq.core.calibration import Calibration;"
        f"assert Calibration.open({str(tmp_path / 'c')!r}).layers['x'].rank == 4;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(rows=st.tuples(st.integers(20, 300), st.integers(20, 300)))
def test_merging_weighs_by_rows(rows: tuple[int, int], tmp_path: Path) -> None:
    one, two = (statistics(rank=16, rows=n, seed=n) for n in rows)
    found = one.merged(two)
    share = rows[0] / sum(rows)
    expected = share * one.diag + (1 - share) * two.diag
    assert torch.allclose(found.diag, expected, rtol=1e-5)
    assert found.rows == sum(rows)
    explicit = share * one.sketch.T @ one.sketch + (1 - share) * two.sketch.T @ two.sketch
    assert torch.allclose(found.sketch.T @ found.sketch, explicit, atol=1e-3)
    assert torch.equal(found.absmax, torch.maximum(one.absmax, two.absmax))


def test_merged_files_hold_the_layers_of_both(tmp_path: Path) -> None:
    a, b, path = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    files.save(a, {"x": statistics(), "y": statistics(seed=1)}, {"z": "x"})
    files.save(b, {"x": statistics(seed=2), "w": statistics(seed=3)}, {"z": "w"})
    files.merge(Calibration.open(a), Calibration.open(b), path)
    found = Calibration.open(path)
    assert set(found.layers) == {"w", "x", "y", "z"}
    assert [found.layers[n].rows for n in "wxyz"] == [100, 200, 100, 200]
    assert torch.allclose(found.statistics("z").diag,
                          (statistics().diag + statistics(seed=3).diag) / 2)  # fmt: skip
    files.save(b, {"x": statistics(columns=8)}, force=True)
    with pytest.raises(PlanError, match="16 input features, the other 8"):
        files.merge(Calibration.open(a), Calibration.open(b), tmp_path / "d")


def said(**changes: Any) -> dict[str, str]:
    value = {"version": 1, "layers": {"x": {"rows": 9, "held_rows": 0}}, "same_as": {}} | changes
    return {files.KEY: json.dumps(value)}


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        ({}, {}, "is not a calibration"),
        ({files.KEY: "{"}, {}, "not JSON"),
        ({files.KEY: "[1]"}, {}, "version `\\[1\\]`"),
        (said(version=2), {}, "version `2`"),
        (said(layers=[]), {}, "does not say the rows"),
        (said(layers={"x": {"rows": -1, "held_rows": 0}}), {}, "does not say the rows"),
        (said(layers={"x": {"rows": True, "held_rows": 0}}), {}, "does not say the rows"),
        (said(same_as={"y": 1}), {}, "share inputs"),
        (said(same_as={"y": "none"}), {}, "shares inputs with no layer"),
        (said(same_as={"x": "x"}), {}, "shares inputs with no layer"),
        (said(), {"x.mean": None}, "`x.mean` is missing"),
        (said(layers={"x": {"rows": 9, "held_rows": 3}}), {}, "`x.held_diag` is missing"),
        (said(), {"x.sketch": torch.zeros(4, 9).bfloat16()}, "`x.sketch` is BF16"),
        (said(), {"x.sketch": torch.zeros(4, 8)}, "`x.sketch` is F32"),
        (said(), {"x.diag": torch.zeros(())}, "`x.diag` is F32"),
        (said(), {"x.absmax": torch.zeros(8, 1)}, "`x.absmax` is F32"),
        (said(), {"stray": torch.zeros(3)}, "`stray` of no layer"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    metadata: dict[str, str], changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    vectors = {f"x.{name}": torch.ones(8) for name in ("diag", "mean", "absmax")}
    tensors = vectors | {"x.sketch": torch.zeros(4, 8).bfloat16()} | changes
    make.save(tmp_path / "c", {n: t for n, t in tensors.items() if t is not None}, metadata)
    with pytest.raises(InputError, match=message) as caught:
        Calibration.open(tmp_path / "c")
    assert caught.value.code == "input.calibration"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"), [("diag", torch.nan), ("diag", -1.0), ("sketch", torch.inf)]
)
def test_impossible_values_are_refused_when_read(name: str, value: float, tmp_path: Path) -> None:
    tensors = {f"x.{own}": tensor for own, tensor in statistics().tensors().items()}
    tensors[f"x.{name}"].view(-1)[3] = value
    make.save(tmp_path / "c", tensors, said(layers={"x": {"rows": 9, "held_rows": 2}}))
    with pytest.raises(InputError, match=f"`x.{name}` holds impossible values"):
        Calibration.open(tmp_path / "c").moment("x")


@pytest.mark.parametrize(
    ("recorded", "layers", "expected"),
    [
        (["a.q", "a.k"], ["a.q", "a.k"], {"a.q": "a.q", "a.k": "a.k"}),
        (["a.q"], ["model.diffusion_model.a.q", "vae.q"], {"model.diffusion_model.a.q": "a.q"}),
        (["model.a.q", "model.a.k"], ["a.q", "b.k"], {"a.q": "model.a.q"}),
        (["q"], ["x.q", "q"], {"q": "q"}),  # as they are, before any prefix
        (["a.q"], ["aa.q"], {}),
        (["a.q", "b.q", "c.q"], ["m.a.q", "m.b.q", "n.c.q"], {"m.a.q": "a.q", "m.b.q": "b.q"}),
        ([], ["a"], {}),
    ],
)
def test_names_match_under_one_prefix(
    recorded: list[str], layers: list[str], expected: dict[str, str], tmp_path: Path
) -> None:
    assert files._matched(dict.fromkeys(recorded), layers) == expected


def test_analyze_tells_of_a_calibration(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    files.save(path, {"double_blocks.0.img_attn.qkv": statistics(rows=20)}, {})
    found = cq_analyze.analyze(open(path))
    assert found.what == "calibration"
    assert found.calibration is not None
    assert found.calibration.few == ("double_blocks.0.img_attn.qkv",)
    assert any("FLUX" in title for title in found.calibration.fits)
    done = cq("analyze", path)
    assert "1 layers with 1 different inputs" in done.out
    assert "few rows" in done.out
    check("analysis", json.loads(cq("analyze", path, "--json").out))
    with pytest.raises(CqError, match="holds no weights"):
        cq_analyze.analyze(open(path), format="nvfp4")
