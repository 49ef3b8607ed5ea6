"""Every kind of adapter against independent float64 formulas, and against files that lie."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cq
from cq.core import catalog
from cq.core.dtypes import TensorSpec
from cq.core.errors import CqError, InputError, InternalError, PlanError
from cq.core.source import open_source
from cq_merge.adapters import Change, Reading, claim_all
from cq_merge.adapters.checkpoint import CheckpointChange
from cq_merge.adapters.dora import DoraChange
from cq_merge.changes import bounded
from cq_merge.contents import Contents
from cq_merge.conversions import contents
from tests import adapters64
from tests.adapters64 import Case

CASES = adapters64.cases()
ADAPTERS = [case for case in CASES if case.kind != "checkpoint"]
STRENGTHS = (1.0, 0.7, 0.0, -0.5)
RIGHT, COMFYUI = Reading(), Reading(as_comfyui=True)
KEY = "blocks.0.proj"

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
adapters = pytest.mark.parametrize("case", ADAPTERS, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("adapters")
    return (made / str(n) for n in itertools.count())


@pytest.fixture
def tmp_path(folders: Iterator[Path]) -> Path:
    """As pytest's own, which takes longer to make than most tests here take to run."""
    folder = next(folders)
    folder.mkdir()
    return folder


def seeded(case: Case) -> np.random.Generator:
    return np.random.default_rng(sum(case.name.encode()))


def weight64(case: Case) -> np.ndarray:
    """A weight that bfloat16 holds."""
    rng = np.random.default_rng(len(case.name))
    made = torch.from_numpy(rng.standard_normal(case.shape) * 0.3)
    return made.bfloat16().double().numpy()


def stored(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The layer's tensors by name; alphas in float32."""
    return {
        KEY + ending: torch.from_numpy(np.asarray(value)).to(
            torch.float32 if ending == ".alpha" else dtype
        )
        for ending, value in case.make(seeded(case)).items()
    }


def exact(tensors: Mapping[str, torch.Tensor]) -> adapters64.Tensors:
    return {name.removeprefix(KEY): tensor.double().numpy() for name, tensor in tensors.items()}


def save(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Contents:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return contents(open_source(path), {})


def only(held: Contents, reading: Reading = RIGHT) -> tuple[str, Change]:
    (found,) = claim_all(held, reading)
    return found


def flat(weight: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(weight).to(dtype).reshape(weight.shape[0], -1).contiguous()


def spec(case: Case) -> TensorSpec:
    return TensorSpec("F32", case.shape)


def delta(change: Change, base: torch.Tensor, strength: float) -> torch.Tensor:
    """What the change adds to zeros."""
    rows = torch.zeros_like(base)
    change.load(base.dtype)(base, rows, 0, strength)
    return rows


def relative(actual: torch.Tensor, expected: np.ndarray) -> float:
    difference = np.linalg.norm(actual.double().numpy().ravel() - expected.ravel())
    size = np.linalg.norm(expected)
    return float(difference / size) if size else float(difference)


def cuts(rows: int) -> Iterator[tuple[int, int]]:
    return itertools.pairwise([0, 1, 5, 6, 17, rows])


# --- formulas -------------------------------------------------------------------------------------


def test_every_kind_in_the_catalogue_has_a_formula() -> None:
    assert {case.kind for case in CASES} == set(catalog.names("adapters"))


@cases
def test_kind_agrees_with_float64(tmp_path: Path, case: Case) -> None:
    weight = weight64(case)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        file = stored(case, dtype)
        kind, change = only(save(tmp_path / f"{dtype}.safetensors", file))
        assert (kind, change.refuse(spec(case))) == (case.kind, None)
        for strength in STRENGTHS:
            expected = case.right(weight, exact(file), strength) - weight
            assert relative(delta(change, flat(weight), strength), expected) <= 2e-6, dtype
        assert np.abs(case.right(weight, exact(file), 1.0) - weight).max() > 1e-6


@cases
def test_kind_agrees_with_what_comfyui_does(tmp_path: Path, case: Case) -> None:
    file = stored(case, torch.float32)
    _, change = only(save(tmp_path / "a.safetensors", file), COMFYUI)
    assert set(file) == set(change.tensors)
    weight = weight64(case)
    for strength in STRENGTHS:
        expected = case.as_comfyui(weight, exact(file), strength) - weight
        assert relative(delta(change, flat(weight), strength), expected) <= 2e-6


@cases
def test_kind_remarks_where_comfyui_differs(tmp_path: Path, case: Case) -> None:
    file = stored(case, torch.float32)
    held = save(tmp_path / "a.safetensors", file)
    _, change = only(held)
    weight = weight64(case)
    right, comfy = (own(weight, exact(file), 0.7) - weight for own in (case.right, case.as_comfyui))
    differs = np.linalg.norm(right - comfy) > 1e-6 * np.linalg.norm(right)
    if case.kind != "set_weight":  # which says that the strength does not count, in ComfyUI as well
        assert bool(change.remarks) == differs
    assert all("ComfyUI" in r or "strength" in r for r in change.remarks)
    assert only(held, COMFYUI)[1].remarks == change.remarks
    assert not any(remark.endswith(".") for remark in change.remarks)


@cases
def test_rows_in_pieces_are_rows_at_once(tmp_path: Path, case: Case) -> None:
    held = save(tmp_path / "a.safetensors", stored(case, torch.float32))
    for reading in (RIGHT, COMFYUI):
        _, change = only(held, reading)
        base = flat(weight64(case))
        whole = base.clone()
        change.load(base.dtype)(base, whole, 0, 0.7)
        same = base.clone()
        change.load(base.dtype)(same, same, 0, 0.7)  # base and rows may be one tensor
        assert torch.equal(whole, same), reading
        if change.whole:
            continue
        pieces = base.clone()
        apply = change.load(base.dtype)
        for start, stop in cuts(len(base)):
            apply(base[start:stop], pieces[start:stop], start, 0.7)
        assert torch.allclose(whole, pieces, rtol=1e-6, atol=1e-6), reading


@cases
def test_change_says_whether_it_reads_the_weight(tmp_path: Path, case: Case) -> None:
    _, change = only(save(tmp_path / "a.safetensors", stored(case, torch.float32)))
    base = flat(weight64(case))
    differs = not torch.equal(delta(change, base, 0.7), delta(change, base * 1.5, 0.7))
    assert change.reads_base == differs


@cases
def test_change_mixes_rows_only_if_it_says_so(tmp_path: Path, case: Case) -> None:
    _, change = only(save(tmp_path / "a.safetensors", stored(case, torch.float32)))
    base = flat(weight64(case))
    other = base.clone()
    other[-1] += 1
    before, after = delta(change, base, 0.7)[0], delta(change, other, 0.7)[0]
    if not change.whole:
        assert torch.allclose(before, after, rtol=1e-6, atol=1e-7)
    elif isinstance(change, DoraChange) and change.axis == "columns":
        assert not torch.allclose(before, after, rtol=1e-4, atol=1e-7)


@cases
def test_merged_bfloat16_is_the_exact_result_rounded_once(tmp_path: Path, case: Case) -> None:
    file = stored(case, torch.bfloat16)
    _, change = only(save(tmp_path / "a.safetensors", file))
    weight = weight64(case)
    for strength in STRENGTHS:
        rows = flat(weight)
        change.load(rows.dtype)(rows, rows, 0, strength)
        found = rows.bfloat16().double().numpy().reshape(weight.shape)
        expected = case.right(weight, exact(file), strength)
        rounded = torch.from_numpy(expected).bfloat16().double().numpy()
        # Another number only where the exact one is all but halfway between the two.
        wrong = found != rounded
        off = np.abs(expected - (found + rounded) / 2)[wrong]
        assert (off <= 1e-6 * (np.abs(expected)[wrong] + 1)).all()
        assert wrong.mean() <= 0.02


@cases
def test_kind_computes_in_float64_for_such_weights(tmp_path: Path, case: Case) -> None:
    file = stored(case, torch.float64)
    _, change = only(save(tmp_path / "a.safetensors", file))
    weight = weight64(case)
    expected = case.right(weight, exact(file), 0.7) - weight
    assert relative(delta(change, flat(weight, torch.float64), 0.7), expected) < 1e-11


GOLDEN = json.loads((Path(__file__).parent / "golden" / "adapters" / "lycoris.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_kind_makes_what_lycoris_trains(tmp_path: Path, name: str) -> None:
    told = GOLDEN[name]
    file = {f"{KEY}.{ending}": torch.tensor(value) for ending, value in told["tensors"].items()}
    kind, change = only(save(tmp_path / "a.safetensors", file))
    assert kind in name or name.endswith(kind)
    weight, merged = (np.asarray(told[key]) for key in ("weight", "merged"))
    assert change.refuse(TensorSpec("F32", weight.shape)) is None
    off = delta(change, flat(weight), 1.0).numpy().reshape(weight.shape) - (merged - weight)
    # LyCORIS adds in float32, to weights beside which some changes are small.
    allowed = 2e-6 * np.linalg.norm(merged - weight) + 1e-7 * np.linalg.norm(weight)
    assert np.linalg.norm(off) <= allowed


# --- memory ---------------------------------------------------------------------------------------

LARGE = {(24, 16): (768, 512), (24, 8, 3, 3): (768, 64, 3, 3), (16, 16): (512, 512), (24,): (4096,)}


def grown(shape: tuple[int, ...], case: Case) -> tuple[int, ...]:
    """A tensor's shape in a layer of a size at which memory counts: ranks and blocks grow less."""
    by = {24: 768, 16: 512, 72: 576, 8: 64, 36: 288} if len(case.shape) > 1 else {24: 4096}
    if "kr" in case.name:
        if len(case.shape) == 2:
            by = {4: 16, 2: 16, 6: 48, 8: 32, 3: 8}
        else:
            by = {24: 768, 8: 64, 4: 16, 2: 4, 6: 48, 36: 144}
    if "oft" in case.name:
        by = by | {6: 192}
    return tuple(by.get(n, n) for n in shape)


def peak_of(work: object) -> int:
    """Bytes of tensors that `work` held at most, beside those that were there."""
    # What `torch.profiler` wraps, which would import a compiler.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()  # type: ignore[operator]
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@cases
def test_change_holds_no_more_than_it_says(tmp_path: Path, case: Case) -> None:
    rng = seeded(case)
    small = case.make(rng)
    if "lokr" in case.name:
        shape = (768, 512) if len(case.shape) == 2 else (768, 64, 3, 3)
    else:
        shape = LARGE[case.shape]
    file = {
        KEY + ending: torch.from_numpy(rng.standard_normal(grown(value.shape, case)) * 0.1).half()
        for ending, value in small.items()
        if ending != ".alpha"
    }
    _, change = only(save(tmp_path / "a.safetensors", file))
    assert change.refuse(TensorSpec("F32", shape)) is None
    base = torch.rand(shape).view(shape[0], -1)
    rows = torch.zeros_like(base)
    step = shape[0] if change.whole else max(128, shape[0] // 3)
    change.load(torch.float32)  # imports and tables that stay

    def work() -> None:
        apply = change.load(torch.float32)
        for start in range(0, shape[0], step):
            own = slice(start, start + step)
            apply(base[own], rows[own], start, 0.7)

    promised = change.nbytes_peak(step, base.shape[1], 4)
    peak = peak_of(work)
    assert peak <= promised + 4096
    assert promised <= 4 * peak + (6 << 20)  # nor is it a number that no machine has


def test_blocks_as_large_as_the_weight_are_counted(tmp_path: Path) -> None:
    blocks = torch.randn(1, 640, 640, generator=torch.Generator().manual_seed(1)) / 100
    _, change = only(save(tmp_path / "a.safetensors", {KEY + ".oft_blocks": blocks}))
    rows = torch.rand(640, 4)
    peak = peak_of(lambda: change.load(torch.float32)(rows, rows, 0, 0.7))
    assert peak <= change.nbytes_peak(640, 4, 4) <= 2 * peak


# --- alphas, biases, shapes that grow -------------------------------------------------------------


def pair(rows: int = 24, columns: int = 16, rank: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return {
        KEY + ".lora_B.weight": torch.randn(rows, rank, generator=g),
        KEY + ".lora_A.weight": torch.randn(rank, columns, generator=g),
    }


@pytest.mark.parametrize(
    ("reading", "tensor", "scale"),
    [
        (RIGHT, None, 8.0),  # 32 of the header by the rank
        (Reading(alpha="tensors"), None, 1.0),
        (Reading(alpha=2.0), None, 0.5),
        (COMFYUI, None, 1.0),
        (Reading(alpha=2.0, as_comfyui=True), None, 1.0),
        (RIGHT, 6.0, 1.5),
        (Reading(alpha=2.0), 6.0, 1.5),
        (COMFYUI, 6.0, 1.5),
    ],
)
def test_alpha_comes_from_its_tensor_or_from_where_it_is_asked_for(
    tmp_path: Path, reading: Reading, tensor: float | None, scale: float
) -> None:
    file = pair() | ({} if tensor is None else {KEY + ".alpha": torch.tensor(tensor)})
    held = save(
        tmp_path / "a.safetensors",
        file,
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 32})},
    )
    _, change = only(held, reading)
    expected = scale * (
        file[KEY + ".lora_B.weight"].double() @ file[KEY + ".lora_A.weight"].double()
    )
    assert relative(delta(change, torch.zeros(24, 16), 1.0), expected.numpy()) < 1e-6
    if tensor is not None or reading.alpha == "tensors":
        assert change.remarks == ()
    elif reading.alpha is None:
        assert change.remarks == (
            "ComfyUI ignores the alpha 32 in the header and applies the factors at scale 1",
        )
    else:
        assert "the alpha 2 given here" in change.remarks[0]


@pytest.mark.parametrize("name", ["lora", "loha-no-alpha", "lokr-no-alpha", "glora-no-alpha"])
def test_alpha_of_the_configuration_counts_for_every_kind_with_a_rank(
    tmp_path: Path, name: str
) -> None:
    case = next(case for case in CASES if case.name == name)
    file = stored(case, torch.float32)
    file.pop(KEY + ".alpha", None)
    save(tmp_path / "a.safetensors", file)
    held = contents(open_source(tmp_path / "a.safetensors"), {"lora_alpha": 12})
    _, change = only(held)
    weight = weight64(case)
    expected = case.right(weight, exact(file) | {".alpha": np.array(12.0)}, 1.0) - weight
    assert relative(delta(change, flat(weight), 1.0), expected) < 2e-6
    assert "`adapter_config.json`" in change.remarks[0]


def test_alpha_does_not_count_for_whole_factors_of_lokr(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "lokr-whole")
    _, change = only(save(tmp_path / "a.safetensors", stored(case, torch.float32)))
    assert (change.rank, change.alpha) == (None, None)
    assert KEY + ".alpha" in change.tensors


def test_bias_of_peft_factors_has_their_scale(tmp_path: Path) -> None:
    file = pair() | {KEY + ".lora_B.bias": torch.arange(24.0), KEY + ".alpha": torch.tensor(2.0)}
    held = save(tmp_path / "a.safetensors", file)
    weight, bias = sorted(
        (change for _, change in claim_all(held, RIGHT)), key=lambda x: -len(x.tensors)
    )
    assert [weight.parameter, bias.parameter] == ["weight", "bias"]
    assert (weight.key, bias.key) == (KEY, KEY)
    found = delta(bias, torch.zeros(24, 1), 0.7)
    assert torch.allclose(found, 0.7 * 0.5 * torch.arange(24.0).view(24, 1))
    assert bias.remarks == ("ComfyUI leaves out the biases of PEFT's factors",)
    _, alone = only(held, COMFYUI)
    assert (alone.parameter, set(alone.tensors)) == ("weight", set(file))
    assert alone.remarks == bias.remarks


def test_bias_difference_and_norms_change_the_bias(tmp_path: Path) -> None:
    file = {KEY + ".diff_b": torch.ones(24), "n.w_norm": torch.ones(8), "n.b_norm": torch.ones(8)}
    held = save(tmp_path / "a.safetensors", file)
    found = {(kind, c.key, c.parameter) for kind, c in claim_all(held, COMFYUI)}
    assert found == {("diff", KEY, "bias"), ("norm", "n", "weight"), ("norm", "n", "bias")}
    for _, change in (*claim_all(held, RIGHT), *claim_all(held, COMFYUI)):
        assert change.remarks == ()
        assert torch.equal(delta(change, torch.zeros(8, 1), -0.5), torch.full((8, 1), -0.5))


def test_norm_without_a_gain_is_left_out_as_in_comfyui(tmp_path: Path) -> None:
    held = save(tmp_path / "a.safetensors", {"n.b_norm": torch.ones(8)})
    for reading, expected in ((RIGHT, 0.7), (COMFYUI, 0.0)):
        _, change = only(held, reading)
        assert change.parameter == "bias"
        assert "without a `.w_norm`" in change.remarks[0]
        assert torch.equal(delta(change, torch.zeros(8, 1), 0.7), torch.full((8, 1), expected))


def test_reshape_makes_the_weight_grow(tmp_path: Path) -> None:
    file = pair(24, 32) | {KEY + ".reshape_weight": torch.tensor([24, 32])}
    _, change = only(save(tmp_path / "a.safetensors", file))
    assert change.shape((24, 16)) == (24, 32)
    assert change.refuse(TensorSpec("BF16", (24, 16))) is None
    for wrong in ((25, 16), (24, 33), (24, 16, 1)):
        refusal = change.refuse(TensorSpec("BF16", wrong))
        assert refusal is not None
        assert "grows to [24, 32]" in refusal
    expected = file[KEY + ".lora_B.weight"].double() @ file[KEY + ".lora_A.weight"].double()
    assert relative(delta(change, torch.zeros(24, 32), 1.0), expected.numpy()) < 1e-6


@pytest.mark.parametrize("shape", [[24, -32], [24, 32.5], [0, 32]])
def test_reshape_to_no_shape_is_refused(tmp_path: Path, shape: list[float]) -> None:
    file = pair(24, 32) | {KEY + ".reshape_weight": torch.tensor(shape)}
    with pytest.raises(InputError, match="which is no shape"):
        only(save(tmp_path / "a.safetensors", file))


def test_rows_of_zeros_stay_zeros_under_dora(tmp_path: Path) -> None:
    file = {KEY + ".lora_up.weight": torch.zeros(8, 2), KEY + ".lora_down.weight": torch.ones(2, 4)}
    file[KEY + ".dora_scale"] = torch.ones(8, 1)
    _, change = only(save(tmp_path / "a.safetensors", file))
    assert torch.equal(delta(change, torch.zeros(8, 4), 1.0), torch.zeros(8, 4))


def test_set_weight_and_second_model_are_taken_to_the_bit(tmp_path: Path) -> None:
    base = torch.tensor([[100.0], [-3e4], [0.0], [1e-8]])
    value = torch.tensor([1e-6, 7.1, -0.3, 3e38])
    for n, ending in enumerate((".set_weight", ".weight")):
        _, change = only(save(tmp_path / f"{n}.safetensors", {KEY + ending: value}))
        rows = base.clone()
        change.load(torch.float32)(rows, rows, 0, 1.0)
        assert torch.equal(rows.flatten(), value)


def test_set_weight_heeds_no_strength_but_zero(tmp_path: Path) -> None:
    _, change = only(save(tmp_path / "a.safetensors", {KEY + ".set_weight": torch.ones(4)}))
    base = torch.zeros(4, 1)
    for strength, expected in ((1.0, 1.0), (0.2, 1.0), (-3.0, 1.0), (0.0, 0.0)):
        assert torch.equal(delta(change, base, strength), torch.full((4, 1), expected))


def test_square_factors_of_glora_are_the_older_layout(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    file = {f"{KEY}.{n}.weight": torch.randn(6, 6, generator=g) for n in ("a1", "a2", "b1", "b2")}
    _, change = only(save(tmp_path / "a.safetensors", file))
    weight = np.random.default_rng(1).standard_normal((6, 6))
    expected = adapters64.glora_old(weight, exact(file)) - weight
    assert relative(delta(change, flat(weight), 1.0), expected) < 2e-6
    assert any("older" in remark for remark in change.remarks)


@cases
def test_strength_beyond_float32_gives_no_finite_weight(tmp_path: Path, case: Case) -> None:
    if case.kind == "set_weight":
        return
    _, change = only(save(tmp_path / "a.safetensors", stored(case, torch.float32)))
    for strength in (1e300, -1e300):
        assert not delta(change, flat(weight64(case)), strength).isfinite().all()


def test_multiplier_is_bounded_for_float32_alone() -> None:
    assert bounded(-1e300, torch.zeros(1)) == -math.inf
    assert bounded(1e300, torch.zeros(1, dtype=torch.float64)) == 1e300
    assert bounded(0.5, torch.zeros(1)) == 0.5


# --- whole models ---------------------------------------------------------------------------------


def test_second_model_gives_every_floating_tensor(tmp_path: Path) -> None:
    file = {
        "a.weight": torch.ones(2, 2),
        "a.bias": torch.ones(2),
        "n.scale": torch.ones(2),
        "pos_embed": torch.ones(1, 2),
        "position_ids": torch.arange(3),
    }
    held = save(tmp_path / "m.safetensors", file)
    claims = claim_all(held, RIGHT)
    assert {kind for kind, _ in claims} == {"checkpoint"}
    found = {change.tensors[0]: (change.key, change.parameter) for _, change in claims}
    assert found == {
        "a.weight": ("a", "weight"),
        "a.bias": ("a", "bias"),
        "n.scale": ("n.scale", "weight"),
        "pos_embed": ("pos_embed", "weight"),
    }


def with_origin(tmp_path: Path, origin: torch.Tensor) -> CheckpointChange:
    second = torch.full((24, 16), 3.0)
    _, change = only(save(tmp_path / "second.safetensors", {"a.weight": second}))
    save_file({"a.weight": origin}, tmp_path / "origin.safetensors")
    assert isinstance(change, CheckpointChange)
    return replace(change, origin=cq.open(tmp_path / "origin.safetensors"))


def test_second_model_differs_from_an_origin(tmp_path: Path) -> None:
    origin = torch.randn(24, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    change = with_origin(tmp_path, origin)
    assert not change.reads_base
    assert change.refuse(TensorSpec("F32", (24, 16))) is None
    rows = torch.zeros(24, 16)
    apply = change.load(torch.float32)
    for start, stop in ((2, 5), (5, 6), (9, 24)):  # some may be left out
        apply(rows[start:stop], rows[start:stop], start, 0.5)
    expected = 0.5 * (3.0 - origin.float())
    expected[:2], expected[6:9] = 0, 0
    assert torch.equal(rows, expected)
    with pytest.raises(InternalError, match="out of order"):
        apply(rows[:1], rows[:1], 0, 1.0)


def test_second_model_needs_an_origin_of_its_shape(tmp_path: Path) -> None:
    change = with_origin(tmp_path, torch.ones(24, 15))
    assert "origin.safetensors` is F32[24,15]" in str(change.refuse(TensorSpec("F32", (24, 16))))
    save_file({"b.weight": torch.ones(1)}, tmp_path / "origin.safetensors")
    other = replace(change, origin=cq.open(tmp_path / "origin.safetensors"))
    assert "holds no `a.weight`" in str(other.refuse(TensorSpec("F32", (24, 16))))


def test_origin_that_is_not_finite_is_named(tmp_path: Path) -> None:
    change = with_origin(tmp_path, torch.full((24, 16), math.nan))
    rows = torch.zeros(24, 16)
    with pytest.raises(InputError, match=r"`a\.weight` of .*origin\.safetensors` holds NaN"):
        change.load(torch.float32)(rows, rows, 0, 1.0)


# --- files that lie -------------------------------------------------------------------------------


@adapters
def test_file_without_one_of_its_tensors_is_whole_or_an_error(tmp_path: Path, case: Case) -> None:
    file = stored(case, torch.float32)
    for n, gone in enumerate(file):
        rest = {name: tensor for name, tensor in file.items() if name != gone}
        held = save(tmp_path / f"{n}.safetensors", rest)
        for reading in (RIGHT, COMFYUI):
            try:
                claims = claim_all(held, reading)
            except CqError as error:
                assert error.code in {
                    "input.adapter_half",
                    "input.adapter_shape",
                    "plan.adapter_kind",
                    "plan.adapter_empty",
                }
                assert not rest or any(name in error.message for name in rest)
                continue
            assert sorted(name for _, c in claims for name in c.tensors) == sorted(rest)


@adapters
def test_tensor_that_is_not_finite_is_named(tmp_path: Path, case: Case) -> None:
    for n, (name, tensor) in enumerate(stored(case, torch.float32).items()):
        bad = tensor.clone()
        bad.view(-1)[-1] = math.nan if n % 2 else math.inf
        held = save(tmp_path / f"{n}.safetensors", stored(case, torch.float32) | {name: bad})
        if name.endswith(".alpha") and {".lokr_w1", ".lokr_w2"} <= case.make(seeded(case)).keys():
            continue  # it does not count
        with pytest.raises(InputError) as caught:
            delta(only(held)[1], flat(weight64(case)), 1.0)
        assert f"tensor `{name}` of `{held.shown}` holds NaN or infinite" in caught.value.message


@adapters
def test_tensor_of_integers_is_refused(tmp_path: Path, case: Case) -> None:
    for n, name in enumerate(stored(case, torch.float32)):
        if name.endswith(".alpha"):
            continue
        file = stored(case, torch.float32)
        file[name] = file[name].to(torch.int32)
        with pytest.raises(PlanError) as caught:
            only(save(tmp_path / f"{n}.safetensors", file))
        assert f"`{name}`" in caught.value.message
        assert caught.value.code == "plan.adapter_dtype"


@adapters
def test_weight_of_another_shape_is_refused_with_the_tensors(tmp_path: Path, case: Case) -> None:
    _, change = only(save(tmp_path / "a.safetensors", stored(case, torch.float32)))
    wrong: list[tuple[int, ...]] = [(case.shape[0] + 1, *case.shape[1:]), (), (1,)]
    if "oft" not in case.name:  # whose blocks fit any columns
        wrong += [(*case.shape, 2), (*case.shape[:-1], case.shape[-1] + 1)]
    for shape in wrong:
        refusal = change.refuse(TensorSpec("F32", shape))
        assert refusal is not None, shape
        assert any(f"`{name}`" in refusal for name in change.tensors)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"hada_w1_a": (8, 2), "hada_w1_b": (3, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
            "share no rank",
        ),
        (
            {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 9)},
            "two shapes",
        ),
        (
            {"hada_w1_a": (8, 0), "hada_w1_b": (0, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
            "share no rank",
        ),
        ({"lokr_w1": (2,), "lokr_w2": (2, 2)}, "share no rank"),
        ({"lokr_w1_a": (2, 3), "lokr_w1_b": (2, 2), "lokr_w2": (2, 2)}, "share no rank"),
        ({"lokr_w1": (2, 2), "lokr_w2": ()}, "share no rank"),
        (
            {"a1.weight": (8, 2), "a2.weight": (3, 8), "b1.weight": (8, 2), "b2.weight": (2, 8)},
            "share no rank",
        ),
        (
            {"a1.weight": (8, 2), "a2.weight": (2, 7), "b1.weight": (9, 2), "b2.weight": (2, 8)},
            "share no rank",
        ),
        ({"oft_blocks": (2, 3, 4)}, "no square blocks"),
        ({"oft_blocks": (0, 3, 3)}, "no square blocks"),
        ({"oft_blocks": (2, 2, 3, 3)}, "no butterfly"),
        ({"oft_blocks": (3, 2, 2, 2)}, "no butterfly"),
        ({"oft_blocks": (2, 3, 3), "rescale": (5, 1)}, "the same rows"),
        ({"oft_blocks": (2, 3, 3), "rescale": (6, 2)}, "the same rows"),
        (
            {"lora_up.weight": (8, 2), "lora_down.weight": (2, 4), "dora_scale": (2, 4)},
            "neither rows nor columns",
        ),
        (
            {"lora_up.weight": (8, 2), "lora_down.weight": (2, 4), "dora_scale": (0,)},
            "neither rows nor columns",
        ),
        (
            {"lora_up.weight": (8, 2), "lora_down.weight": (2, 4), "lora_mid.weight": (3, 2, 1, 1)},
            "share no rank",
        ),
        (
            {
                "lora_up.weight": (8, 2),
                "lora_down.weight": (2, 4, 3, 3),
                "lora_mid.weight": (2, 2, 3, 3),
            },
            "share no rank",
        ),
        ({"lora_B.weight": (8, 2), "lora_A.weight": (2, 4), "lora_B.bias": (7,)}, "one layer"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    file = {f"{KEY}.{name}": torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(InputError, match=message) as caught:
        only(save(tmp_path / "a.safetensors", file))
    assert caught.value.code == "input.adapter_shape"
    assert any(name in caught.value.message for name in file)


@pytest.mark.parametrize(
    ("ending", "missing"),
    [
        (".hada_w2_a", ".hada_w2_b"),
        (".hada_t1", ".hada_t2"),
        (".lokr_w1", ".lokr_w2"),
        (".lokr_w2_b", ".lokr_w2_a"),
        (".lokr_t2", ".lokr_w2_a"),
        (".b1.weight", ".b2.weight"),
        (".rescale", ".oft_blocks"),
        (".dora_scale", ".lora_up.weight"),
        (".lora_magnitude_vector", ".lora_B.weight"),
        (".lora_mid.weight", ".lora_up.weight"),
        (".reshape_weight", ".lora_up.weight"),
        (".lora_B.bias", ".lora_B.weight"),
    ],
)
def test_half_a_layer_is_refused_by_what_it_lacks(
    tmp_path: Path, ending: str, missing: str
) -> None:
    file = {KEY + ending: torch.ones(4, 4), "x.diff": torch.ones(2)}
    with pytest.raises(InputError) as caught:
        claim_all(save(tmp_path / "a.safetensors", file), RIGHT)
    assert f"holds `{KEY + ending}` without `{KEY + missing}`" in caught.value.message


@pytest.mark.parametrize("ending", [".oft_R.weight", ".oft_diag", ".lora_E", ".bm.weight"])
def test_kind_without_a_plug_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    file = pair() | {"other" + ending: torch.ones(4, 4)}
    with pytest.raises(PlanError, match="does not merge") as caught:
        claim_all(save(tmp_path / "a.safetensors", file), RIGHT)
    assert f"`other{ending}`" in caught.value.message


def test_claiming_imports_no_torch(tmp_path: Path) -> None:
    paths = []
    for case in CASES:
        save(tmp_path / f"{case.name}.safetensors", stored(case, torch.float32))
        paths.append(str(tmp_path / f"{case.name}.safetensors"))
    code = (
        "import sys\n"
        "from cq.core.source import open_source\n"
        "from cq.core.dtypes import TensorSpec\n"
        "from cq_merge.conversions import contents\n"
        "from cq_merge.adapters import Reading, claim_all\n"
        "for path in sys.argv[1:]:\n"
        "    for _, c in claim_all(contents(open_source(path), {}), Reading()):\n"
        "        c.refuse(TensorSpec('F32', (24, 16))), c.shape((24, 16)), c.remarks, c.whole\n"
        "        c.nbytes_peak(24, 16, 4)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], check=False, cwd=Path.cwd())
    assert done.returncode == 0


# --- whole-file layouts ---------------------------------------------------------------------------


def test_bfl_control_grows_the_first_layer_and_brings_norms(tmp_path: Path) -> None:
    file = {
        "img_in.lora_A.weight": torch.ones(2, 32),
        "img_in.lora_B.weight": torch.ones(24, 2),
        "img_in.lora_B.bias": torch.ones(24),
        "single_blocks.0.norm.key_norm.scale": torch.full((8,), 5.0),
    }
    held = save(tmp_path / "a.safetensors", file)
    for reading in (RIGHT, COMFYUI):
        found = {(c.key, c.parameter): (k, c) for k, c in claim_all(held, reading)}
        grows = found["diffusion_model.img_in", "weight"][1]
        assert grows.shape((24, 16)) == (24, 32)
        assert grows.refuse(TensorSpec("BF16", (24, 16))) is None
        assert found["diffusion_model.img_in", "bias"][0] == "diff"
        kind, norm = found["diffusion_model.single_blocks.0.norm.key_norm", "weight"]
        assert kind == "set_weight"
        assert torch.equal(delta(norm, torch.ones(8, 1), 1.0), torch.full((8, 1), 4.0))
        assert len(found) == 3


def test_wan_fun_loses_an_underscore(tmp_path: Path) -> None:
    key = "lora_unet__blocks_0_cross_attn_k"
    file = {key + ".lora_down.weight": torch.ones(2, 4), key + ".lora_up.weight": torch.ones(4, 2)}
    _, change = only(save(tmp_path / "a.safetensors", file))
    assert change.key == "lora_unet_blocks_0_cross_attn_k"


def test_uso_has_the_names_of_its_layers(tmp_path: Path) -> None:
    file = {}
    for key in (
        "single_blocks.37.processor.qkv_lora",
        "single_blocks.37.processor.proj_lora",
        "double_blocks.18.processor.qkv_lora1",
        "double_blocks.18.processor.qkv_lora2",
        "double_blocks.18.processor.proj_lora1",
        "double_blocks.18.processor.proj_lora2",
    ):
        file[key + ".up.weight"], file[key + ".down.weight"] = torch.ones(4, 2), torch.ones(2, 4)
    found = {c.key for _, c in claim_all(save(tmp_path / "a.safetensors", file), RIGHT)}
    assert found == {
        "diffusion_model.single_blocks.37.linear1_qkv",
        "diffusion_model.single_blocks.37.linear2",
        "diffusion_model.double_blocks.18.img_attn.qkv",
        "diffusion_model.double_blocks.18.txt_attn.qkv",
        "diffusion_model.double_blocks.18.img_attn.proj",
        "diffusion_model.double_blocks.18.txt_attn.proj",
    }


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    key = "blocks_0_cross_attn_k.lora_down.weight"
    file = {"lora_unet__" + key: torch.ones(2, 4), "lora_unet_" + key: torch.ones(2, 4)}
    with pytest.raises(InputError, match="both stand for"):
        save(tmp_path / "a.safetensors", file)
