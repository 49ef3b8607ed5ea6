"""Merging where it is odd: weights that grow under several adapters, several changes of one file to
the same rows, memory, words in the wrong place, and what the messages say of it."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cq
import cq_merge
from cq.cli.main import run
from cq.cli.output import Terminal
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import CqError, InputError, PlanError, UsageError
from cq.core.names import Names
from cq_merge import explaining
from tests.test_adapters import peak_of
from tests.test_architecture import check

Tensors = dict[str, torch.Tensor]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return str(path)


def base(folder: Path, rows: int = 8, columns: int = 4, dtype: Any = torch.float32) -> Checkpoint:
    tensors = {"a.weight": random(rows, columns, seed=1).to(dtype), "a.bias": torch.zeros(rows)}
    return cq.open(save(folder / "base.safetensors", tensors))


def pair(rows: int, columns: int, seed: int, key: str = "a", rank: int = 2) -> Tensors:
    return {
        f"{key}.lora_up.weight": random(rows, rank, seed=seed),
        f"{key}.lora_down.weight": random(rank, columns, seed=seed + 100),
    }


def made(file: Mapping[str, torch.Tensor], key: str = "a") -> torch.Tensor:
    up, down = file[f"{key}.lora_up.weight"], file[f"{key}.lora_down.weight"]
    return up.double() @ down.double()


def growing(rows: int, columns: int, seed: int) -> Tensors:
    shape = torch.tensor([rows, columns])
    return pair(rows, columns, seed) | {"a.reshape_weight": shape}


def into(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    grown = torch.zeros(rows, columns, dtype=torch.float64)
    grown[: weight.shape[0], : weight.shape[1]] = weight
    return grown


# --- weights that grow ----------------------------------------------------------------------------

FILES: dict[str, Tensors] = {
    "wider": growing(8, 6, 3),
    "widest": growing(8, 7, 4),
    "taller": growing(12, 6, 5),
    "plain": pair(8, 4, 6),
    "diff": {"a.diff": random(8, 4, seed=7)},
}


@pytest.mark.parametrize("as_comfyui", [False, True])
@pytest.mark.parametrize("names", [*FILES, *itertools.permutations(FILES, 2), (*FILES,)], ids=str)
def test_adapters_add_to_a_weight_that_others_make_grow(
    names: str | tuple[str, ...], as_comfyui: bool, tmp_path: Path
) -> None:
    names = (names,) if isinstance(names, str) else names
    source = base(tmp_path)
    changes = [FILES[n]["a.diff"] if n == "diff" else made(FILES[n]) for n in names]
    rows, columns = (max(8, *(c.shape[0] for c in changes)), max(4, *(c.shape[1] for c in changes)))
    exact = into(source.read("a.weight").double(), rows, columns)
    for change in changes:
        exact += into(change.double(), rows, columns)
    paths = [save(tmp_path / f"{n}.safetensors", FILES[n]) for n in names]
    merged = cq_merge.merge(source, paths, dampen=False, as_comfyui=as_comfyui)
    assert merged.specs["a.weight"] == TensorSpec("F32", (rows, columns))
    assert torch.allclose(merged.read("a.weight").double(), exact, rtol=1e-6, atol=1e-7)


def test_every_method_takes_weights_that_grow(tmp_path: Path) -> None:
    source = base(tmp_path)
    paths = [save(tmp_path / f"{n}.safetensors", FILES[n]) for n in ("wider", "plain")]
    exact = into(source.read("a.weight").double() + made(FILES["plain"]), 8, 6)
    exact += made(FILES["wider"])
    for method, density in (("ties", 1.0), ("dare", 1.0), ("orthogonal", None)):
        merged = cq_merge.merge(source, paths, dampen=False, method=method, density=density)
        found = merged.read("a.weight").double()
        assert found.shape == (8, 6)
        if method == "dare":
            assert torch.allclose(found, exact, rtol=1e-6, atol=1e-7)
    explained = cq_merge.explain(cq_merge.merge(source, paths, dampen=False), source)
    sizes = {own.adapter: own.change for own in explained.effects}
    assert sizes[0] == pytest.approx(float(made(FILES["wider"]).norm()), rel=1e-5)
    assert sizes[1] == pytest.approx(float(made(FILES["plain"]).norm()), rel=1e-5)


def test_rows_of_a_weight_cannot_make_it_grow(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", growing(4, 6, 3))
    with pytest.raises(PlanError, match="makes a weight grow of which it has rows alone") as caught:
        cq_merge.merge(base(tmp_path), [path], names={"a": "a[0:4]"})
    assert caught.value.code == "plan.adapter_shape"


# --- several changes of one file to the same rows -------------------------------------------------


def test_of_one_key_comfyui_applies_the_last_kind_alone(tmp_path: Path) -> None:
    source = base(tmp_path)
    file = pair(8, 4, 6) | {"a.diff": random(8, 4, seed=7)}
    path = save(tmp_path / "a.safetensors", file)
    before = source.read("a.weight").double()
    right, comfyui = (cq_merge.merge(source, [path], as_comfyui=own) for own in (False, True))
    both = before + made(file) + file["a.diff"].double()
    assert torch.allclose(right.read("a.weight").double(), both, atol=1e-7)
    assert torch.allclose(comfyui.read("a.weight").double(), before + file["a.diff"], atol=1e-7)
    for merged in (right, comfyui):
        (remark,) = merged.notes[0]["remarks"]
        assert remark.startswith("ComfyUI leaves out a `lora` where a file has a `diff`")
        assert merged.notes[0]["matched"] == 2


def test_biases_beside_factors_are_no_such_case(tmp_path: Path) -> None:
    file = pair(8, 4, 6) | {"a.diff_b": random(8, seed=7)}
    path = save(tmp_path / "a.safetensors", file)
    merged = cq_merge.merge(base(tmp_path), [path], as_comfyui=True)
    assert merged.notes[0]["remarks"] == []
    assert torch.equal(merged.read("a.bias"), file["a.diff_b"])


def test_several_keys_for_the_same_rows_are_added_and_told(tmp_path: Path) -> None:
    source = base(tmp_path)
    file = pair(8, 4, 6) | pair(8, 4, 8, key="lora_unet_a")
    path = save(tmp_path / "a.safetensors", file)
    exact = source.read("a.weight").double() + made(file) + made(file, "lora_unet_a")
    merged = cq_merge.merge(source, [path])
    assert torch.allclose(merged.read("a.weight").double(), exact, atol=1e-7)
    assert "one alone of several keys" in merged.notes[0]["remarks"][0]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sum", "ties", "dare", "orthogonal"])
def test_merging_explaining_and_extracting_hold_what_they_promise(
    method: str, tmp_path: Path
) -> None:
    side = 1536
    source = base(tmp_path, side, side, torch.bfloat16)
    paths = [
        save(tmp_path / f"{n}.safetensors", pair(side, side, n) | extra)
        for n, extra in enumerate(
            [
                {},
                {"a.dora_scale": torch.rand(1, side)},
                {"a.reshape_weight": torch.tensor([side] * 2)},
            ]
        )
    ]
    merged = cq_merge.merge(source, paths, method=method)
    plan = explaining._plan(merged, source)

    def drain() -> None:
        for part in merged.parts:
            for _ in part.produce():
                pass

    drain()  # imports and tables that stay
    promised = merged.part("a.weight").nbytes_peak
    peak = peak_of(drain)
    assert peak <= promised <= 2 * peak
    promised = explaining._part(plan, "a.weight").nbytes_peak
    assert peak_of(lambda: list(explaining._effects(plan.merged["a.weight"]))) <= promised
    if method == "sum":
        tuned = save(tmp_path / "tuned.safetensors", {"a.weight": random(side, side, seed=9)})
        lora = cq_merge.extract(cq.open(tuned), source.sources[0].path, rank=4)
        peak = peak_of(lambda: list(lora.parts[0].produce()))
        assert peak <= lora.parts[0].nbytes_peak <= 2 * peak


# --- words and files in the wrong place -----------------------------------------------------------


def refused(call: Any) -> CqError:
    with pytest.raises(CqError) as caught:
        call()
    return caught.value


def test_an_adapter_as_the_base_is_told_as_such(tmp_path: Path) -> None:
    model, lora = base(tmp_path), save(tmp_path / "lora.safetensors", pair(8, 4, 6))
    for adapter, hint in (
        (str(model.sources[0].path), f"`cq merge {model.sources[0].path} {lora}`"),
        (lora, "`cq merge MODEL ADAPTER ADAPTER`"),
    ):
        error = refused(lambda adapter=adapter: cq_merge.merge(cq.open(lora), [adapter]))
        assert error.code == "plan.adapter_base"
        assert f"`{lora}` is an adapter itself" in error.message
        assert hint in str(error.hint)


@pytest.mark.parametrize("word", ["0.8", ":0.8", "-1", "1,5"])
def test_a_strength_by_itself_is_told_as_such(word: str, tmp_path: Path) -> None:
    lora = save(tmp_path / "lora.safetensors", pair(8, 4, 6))
    error = refused(lambda: cq_merge.merge(base(tmp_path), [lora, word]))
    assert isinstance(error, UsageError)
    assert "behind the adapter's name" in str(error.hint)


def test_what_only_the_base_can_be_is_told_as_such(tmp_path: Path) -> None:
    model = base(tmp_path)
    (tmp_path / "m.json").write_text('{"cq":1,"kind":"checkpoint"}')
    error = refused(lambda: cq_merge.merge(model, [str(tmp_path / "m.json")]))
    assert (error.code, "cq run MANIFEST" in str(error.hint)) == ("input.header", True)
    error = refused(lambda: cq_merge.merge(model, ["-"]))
    assert isinstance(error, InputError)
    assert "BASE alone" in str(error.hint)


def test_an_origin_without_a_whole_model_is_refused(tmp_path: Path) -> None:
    model, lora = base(tmp_path), save(tmp_path / "lora.safetensors", pair(8, 4, 6))
    error = refused(lambda: cq_merge.merge(model, [lora], origin=model.sources[0].path))
    assert isinstance(error, UsageError)
    assert "--from" in str(error.hint)


def test_a_missing_component_is_only_claimed_where_it_is_missing(tmp_path: Path) -> None:
    model = base(tmp_path)
    clip = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    text = save(tmp_path / "te.safetensors", pair(8, 4, 6, key=clip))
    hint = str(refused(lambda: cq_merge.merge(model, [text])).hint)
    where = f"`{model.sources[0].path}`"
    assert hint == f"all its keys are for a text encoder, and {where} holds none that cq knows"
    both = save(tmp_path / "both.safetensors", pair(8, 4, 6, key=clip) | pair(8, 4, 6))
    hint = str(refused(lambda: cq_merge.merge(model, [both])).hint)
    assert hint.startswith("its other keys are for a text encoder")
    assert hint.endswith("add `--allow-unmatched` to leave such keys out")
    other = save(tmp_path / "other.safetensors", pair(8, 4, 6, key="diffusion_model.b"))
    hint = str(refused(lambda: cq_merge.merge(model, [other])).hint)
    assert "holds none" not in hint
    assert "trained for another model" in hint


def test_oft_of_sd_scripts_has_a_prefix_of_its_own() -> None:
    names = Names({"model.diffusion_model.x.q.weight": TensorSpec("F16", (8, 8))})
    (place,) = names.find("oft_unet_x_q")
    assert place[0].tensor == "model.diffusion_model.x.q.weight"


# --- the command line -----------------------------------------------------------------------------


def command(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = run([str(a) for a in argv], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ["--scale", "2"],
        ["--method", "ties"],
        ["--alpha", "4"],
        ["--as-comfyui"],
        ["--keep-format"],
        ["--explain"],
        ["--no-dampen"],
    ],
    ids=str,
)
def test_extract_refuses_options_of_merging(words: list[str], tmp_path: Path) -> None:
    path = base(tmp_path).sources[0].path
    code, _, err = command("merge", "--extract", path, "--from", path, *words)
    assert code == 2
    assert f"`{words[0].replace('--no-', '--')}` has no meaning" in err


def test_a_plan_with_its_effects_keeps_the_schema(tmp_path: Path) -> None:
    lora = save(tmp_path / "lora.safetensors", pair(8, 4, 6) | {"a.diff": torch.ones(8, 4)})
    path = base(tmp_path).sources[0].path
    for strength in (0, 1):
        code, out, err = command(
            "merge", path, f"{lora}:{strength}", "--explain", "--dry-run", "--json"
        )
        assert code == 0, err
        document = json.loads(out)
        check("plan", document)
        assert document["decisions"][0]["remarks"]
        del document["decisions"][0]["effect"]["saturated"]
        with pytest.raises(AssertionError):
            check("plan", document)
