"""What stands around adding one LoRA: methods, whole models, quantized bases, names of other
tools, measuring, and extracting. Formulas of the kinds are in test_adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cq
import cq_merge
import cq_quant
from cq.core import catalog, manifest
from cq.core.errors import InputError, PlanError, UsageError

Tensors = dict[str, torch.Tensor]
METHODS = catalog.names("methods")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int, scale: float = 0.1) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)) * scale


def save(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> str:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata or None)
    return str(path)


def base_file(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    tensors = {f"blocks.{i}.q.weight": random(256, 256, seed=i).to(dtype) for i in range(3)}
    tensors["blocks.0.q.bias"] = random(256, seed=9).to(dtype)
    tensors["norm.weight"] = torch.ones(256, dtype=dtype)
    return save(folder / "base.safetensors", tensors)


def lora_file(folder: Path, name: str, seed: int, layers: tuple[int, ...] = (0, 1)) -> str:
    tensors: Tensors = {}
    for i in layers:
        tensors[f"blocks.{i}.q.lora_up.weight"] = random(256, 4, seed=seed + i, scale=0.2)
        tensors[f"blocks.{i}.q.lora_down.weight"] = random(4, 256, seed=seed + 50 + i, scale=0.2)
    return save(folder / f"{name}.safetensors", tensors)


def delta(path: str, layer: int) -> torch.Tensor:
    file = load_file(path)
    up, down = file[f"blocks.{layer}.q.lora_up.weight"], file[f"blocks.{layer}.q.lora_down.weight"]
    return up.double() @ down.double()


def nearly(found: torch.Tensor, exact: torch.Tensor, digits: float = 1e-5) -> None:
    assert (found.double() - exact).norm() <= digits * exact.norm()


# --- methods --------------------------------------------------------------------------------------


def combined(name: str, deltas: list[torch.Tensor], density: float | None) -> torch.Tensor:
    plug = catalog.load("methods", name)
    copies = [d.clone() for d in deltas]
    found: torch.Tensor = plug.combine(copies, density, generator(3))
    return found


def test_ties_trims_elects_and_adds_what_agrees() -> None:
    first = torch.tensor([[4.0, 1.0, -3.0, 0.5]])
    second = torch.tensor([[-5.0, 0.5, -2.0, 3.0]])
    # Half of each stays: [4, 0, -3, 0] and [-5, 0, 0, 3]; the signs elected: -, 0, -, +.
    assert combined("ties", [first, second], 0.5).tolist() == [[-5.0, 0.0, -3.0, 3.0]]
    assert combined("ties", [first, second], 1.0).tolist() == [[-5.0, 1.5, -5.0, 3.5]]


def test_ties_of_a_single_adapter_only_trims() -> None:
    one = random(40, 40, seed=1)
    found = combined("ties", [one], 0.2)
    kept = found != 0
    assert int(kept.sum()) == 320
    assert torch.equal(found[kept], one[kept])
    assert one[kept].abs().min() >= one[~kept].abs().max()


def test_dare_drops_a_share_and_keeps_the_mean() -> None:
    ones = torch.ones(400, 400)
    found = combined("dare", [ones], 0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(combined("dare", [ones], 1.0), ones)


def test_orthogonal_adds_nothing_twice() -> None:
    first = random(30, 20, seed=1)
    same = combined("orthogonal", [first, 0.5 * first], None)
    nearly(same, first.double())
    second = random(30, 20, seed=2)
    both = combined("orthogonal", [first, second], None)
    apart = both - first
    assert abs(float((apart * first).sum())) < 1e-4 * float(apart.norm() * first.norm())
    left = second - apart  # what was taken out lies along the first
    nearly(left, (left * first).sum().double() / first.square().sum() * first.double(), 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_one_adapter_at_full_density_is_the_sum(name: str) -> None:
    one = random(16, 16, seed=4)
    assert torch.equal(combined(name, [one], 1.0), one)
    assert name == catalog.load("methods", name).name


@pytest.mark.parametrize("name", METHODS)
def test_merge_by_every_method_is_deterministic_and_works_through_a_manifest(
    name: str, tmp_path: Path
) -> None:
    base = cq.open(base_file(tmp_path))
    paths = [lora_file(tmp_path, "a", 10), lora_file(tmp_path, "b", 20, (1, 2))]
    merged = cq_merge.merge(base, paths, method=name, seed=5, dampen=False)
    again = manifest.load(json.dumps(merged.manifest()).encode(), where="-")
    for workers in (1, 2):
        cq.write(merged, tmp_path / f"{workers}.st", workers=workers)
    cq.write(again, tmp_path / "3.st")
    assert len({(tmp_path / f"{n}.st").read_bytes() for n in (1, 2, 3)}) == 1
    weight = base.read("blocks.1.q.weight")
    deltas = [delta(path, 1).float() for path in paths]
    if name != "dare":
        plug = catalog.load("methods", name)
        exact = weight.double() + combined(name, deltas, plug.density).double()
        assert (merged.read("blocks.1.q.weight") != exact.bfloat16()).double().mean() < 2e-3


def test_dare_depends_on_the_seed(tmp_path: Path) -> None:
    base, path = cq.open(base_file(tmp_path)), lora_file(tmp_path, "a", 10)
    found = [
        cq_merge.merge(base, [path], method="dare", seed=seed).read("blocks.0.q.weight")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "tise"}, "tise"),
        ({"method": "sum", "density": 0.5}, "no density"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.5}, "density"),
        ({"seed": -1}, "seed"),
        ({"dtype": "int8"}, "no dtype"),
        ({"as_comfyui": True, "method": "ties"}, "ComfyUI"),
        ({"as_comfyui": True, "alpha": 4.0}, "ComfyUI"),
        ({"alpha": math.inf}, "alpha"),
    ],
)
def test_merge_refuses_words_that_mean_nothing(
    words: dict[str, object], message: str, tmp_path: Path
) -> None:
    base, path = cq.open(base_file(tmp_path)), lora_file(tmp_path, "a", 10)
    with pytest.raises((UsageError, PlanError), match=message):
        cq_merge.merge(base, [path], **words)  # type: ignore[arg-type]


# --- whole models ---------------------------------------------------------------------------------


def second_model(folder: Path, name: str, seed: int) -> str:
    tensors = load_file(base_file(folder))
    mixed = {n: (t.float() + random(*t.shape, seed=seed)).to(t.dtype) for n, t in tensors.items()}
    return save(folder / f"{name}.safetensors", mixed)


@settings(max_examples=10, deadline=None)
@given(strength=st.floats(-1, 2, width=16))
def test_merge_of_a_whole_model_is_the_weighted_sum(
    tmp_path_factory: pytest.TempPathFactory, strength: float
) -> None:
    folder = tmp_path_factory.mktemp("model")
    other = second_model(folder, "other", 3)
    base = cq.open(folder / "base.safetensors")
    merged = cq_merge.merge(base, [(other, strength)])
    b, o = load_file(folder / "base.safetensors"), load_file(other)
    for name in b:
        exact = b[name].double() + strength * (o[name].double() - b[name].double())
        wrong = merged.read(name) != exact.bfloat16()
        assert wrong.double().mean() < 2e-2  # rounding ties of a float32 sum
        assert (merged.read(name).double() - exact).abs().max() < 0.02
    assert merged.notes[0]["kind"] == "checkpoint"


def test_merge_of_a_whole_model_at_strength_one_is_that_model(tmp_path: Path) -> None:
    other = second_model(tmp_path, "other", 3)
    merged = cq_merge.merge(cq.open(tmp_path / "base.safetensors"), [other])
    for name, tensor in load_file(other).items():
        assert (merged.read(name) != tensor).double().mean() < 1e-2


def test_merge_adds_a_difference_from_an_origin(tmp_path: Path) -> None:
    origin = second_model(tmp_path, "origin", 3)
    tuned = second_model(tmp_path, "tuned", 4)
    base = cq.open(tmp_path / "base.safetensors")
    merged = cq_merge.merge(base, [(tuned, 0.5)], origin=origin, dtype="fp32")
    b, o, t = (load_file(p) for p in (tmp_path / "base.safetensors", origin, tuned))
    for name in b:
        exact = b[name].double() + 0.5 * (t[name].double() - o[name].double())
        nearly(merged.read(name), exact, 1e-6)
    again = manifest.load(json.dumps(merged.manifest()).encode(), where="-")
    assert torch.equal(merged.read("blocks.0.q.weight"), again.read("blocks.0.q.weight"))
    assert again.manifest() == merged.manifest()


def test_merge_refuses_an_origin_without_the_models_tensors(tmp_path: Path) -> None:
    tuned = second_model(tmp_path, "tuned", 4)
    origin = save(tmp_path / "origin.safetensors", {"x.weight": torch.zeros(4, 4)})
    with pytest.raises(PlanError, match=r"origin\.safetensors"):
        cq_merge.merge(cq.open(tmp_path / "base.safetensors"), [tuned], origin=origin)


def test_merge_refuses_a_quantized_second_model(tmp_path: Path) -> None:
    other = second_model(tmp_path, "other", 3)
    cq.write(cq_quant.quantize(cq.open(other)), tmp_path / "int8.safetensors")
    with pytest.raises(PlanError, match="is quantized") as caught:
        cq_merge.merge(cq.open(tmp_path / "base.safetensors"), [str(tmp_path / "int8.safetensors")])
    assert "--format bf16" in (caught.value.hint or "")


# --- dtypes and quantized bases -------------------------------------------------------------------


def test_merge_keeps_or_changes_the_dtype_of_what_it_touches(tmp_path: Path) -> None:
    base, path = cq.open(base_file(tmp_path)), lora_file(tmp_path, "a", 10, (0,))
    exact = base.read("blocks.0.q.weight").double() + delta(path, 0)
    assert cq_merge.merge(base, [path]).specs["blocks.0.q.weight"].dtype == "BF16"
    wide = cq_merge.merge(base, [path], dtype="fp32")
    nearly(wide.read("blocks.0.q.weight"), exact, 1e-6)
    assert wide.part("blocks.1.q.weight") is base.part("blocks.1.q.weight")


FORMATS = [
    ("int8_tensorwise", {}),
    ("int8_tensorwise", {"scaling": "tensor", "rotate": "off"}),
    ("int8_tensorwise", {"rotate": "64"}),
    ("float8_e4m3fn", {}),
    ("float8_e5m2", {}),
    ("mxfp8", {}),
    ("nvfp4", {}),
    ("convrot_w4a4", {}),
    ("asym_w4a8_int8", {}),
    ("awq_w4a16", {}),
]


@pytest.mark.parametrize(("name", "words"), FORMATS)
def test_merge_into_a_quantized_base_dequantizes_only_what_changes(
    name: str, words: dict[str, str], tmp_path: Path
) -> None:
    plain = cq.open(base_file(tmp_path))
    cq.write(cq_quant.quantize(plain, format=name, family="none", **words), tmp_path / "q.st")  # type: ignore[arg-type]
    base, path = cq.open(tmp_path / "q.st"), lora_file(tmp_path, "a", 10, (1,))
    merged = cq_merge.merge(base, [path], dtype="fp32")
    decoded = cq_quant.quantize(base, format="fp32", only=["blocks.1.q"])
    exact = decoded.read("blocks.1.q.weight").bfloat16().double() + delta(path, 1)
    nearly(merged.read("blocks.1.q.weight"), exact, 1e-6)
    for tensor in base.specs:
        if not tensor.startswith("blocks.1.q"):
            assert merged.part(tensor) is base.part(tensor)
    assert "blocks.1.q.comfy_quant" not in merged.specs


@pytest.mark.parametrize(("name", "words"), FORMATS)
def test_merge_with_keep_format_stores_changed_layers_as_they_were(
    name: str, words: dict[str, str], tmp_path: Path
) -> None:
    plain = cq.open(base_file(tmp_path))
    cq.write(cq_quant.quantize(plain, format=name, family="none", **words), tmp_path / "q.st")  # type: ignore[arg-type]
    base, path = cq.open(tmp_path / "q.st"), lora_file(tmp_path, "a", 10, (1,))
    merged = cq_merge.merge(base, [path], keep_format=True)
    assert merged.specs == base.specs
    own = "blocks.1.q.comfy_quant"
    assert merged.read_bytes(own) == base.read_bytes(own)
    for tensor in base.specs:
        if not tensor.startswith("blocks.1.q"):
            assert merged.part(tensor) is base.part(tensor)
    exact = (
        cq_quant.quantize(base, format="fp32", only=["blocks.1.q"]).read("blocks.1.q.weight")
        + delta(path, 1).float()
    )
    found = cq_quant.quantize(merged, format="fp32", only=["blocks.1.q"]).read("blocks.1.q.weight")
    assert (found - exact).norm() < 0.2 * exact.norm()
    assert (found - exact).norm() < 0.5 * delta(path, 1).norm()
    again = manifest.load(json.dumps(merged.manifest()).encode(), where="-")
    for tensor in ("blocks.1.q.weight", own):
        assert torch.equal(merged.read(tensor), again.read(tensor))


def test_keep_format_of_a_plain_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not quantized"):
        cq_merge.merge(
            cq.open(base_file(tmp_path)), [lora_file(tmp_path, "a", 1)], keep_format=True
        )


# --- names of other tools -------------------------------------------------------------------------


def test_merge_reads_a_map_for_unusual_names(tmp_path: Path) -> None:
    base, path = cq.open(base_file(tmp_path)), lora_file(tmp_path, "a", 10, (0,))
    strange = {k.replace("blocks.0.q", "layer_zero"): v for k, v in load_file(path).items()}
    odd = save(tmp_path / "odd.safetensors", strange)
    with pytest.raises(PlanError, match="`layer_zero`") as caught:
        cq_merge.merge(base, [odd])
    assert "--map" in (caught.value.hint or "")
    (tmp_path / "map.json").write_text(json.dumps({"layer_zero": "blocks.0.q"}))
    merged = cq_merge.merge(base, [odd], names=tmp_path / "map.json")
    plain = cq_merge.merge(base, [path])
    assert torch.equal(merged.read("blocks.0.q.weight"), plain.read("blocks.0.q.weight"))
    again = manifest.load(json.dumps(merged.manifest()).encode(), where="-")
    assert torch.equal(again.read("blocks.0.q.weight"), plain.read("blocks.0.q.weight"))


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": "no.such.layer"}', "\xff"])
def test_merge_names_what_is_wrong_with_a_map(text: str, tmp_path: Path) -> None:
    base, path = cq.open(base_file(tmp_path)), lora_file(tmp_path, "a", 10)
    (tmp_path / "map.json").write_bytes(text.encode("latin-1"))
    with pytest.raises((InputError, PlanError), match=r"map|no\.such"):
        cq_merge.merge(base, [path], names=tmp_path / "map.json")


def test_a_change_of_rows_is_cut_to_the_segments_that_it_meets(tmp_path: Path) -> None:
    """A fused weight of several segments: q, k and v come from three keys, each to its rows."""
    weight = random(3000, 1024, seed=1).bfloat16()
    base = save(tmp_path / "base.safetensors", {"qkv.weight": weight, "qkv.bias": weight[:, 0]})
    file, exact = {}, weight.double().clone()
    for i, key in enumerate(("to_q", "to_k", "to_v")):
        up, down = random(1000, 4, seed=10 + i), random(4, 1024, seed=20 + i)
        file |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        exact[i * 1000 : (i + 1) * 1000] += up.double() @ down.double()
    names = {f"to_{x}": f"qkv[{i * 1000}:{(i + 1) * 1000}]" for i, x in enumerate("qkv")}
    merged = cq_merge.merge(
        cq.open(base), [save(tmp_path / "a.safetensors", file)], names=names, dtype="fp32"
    )
    nearly(merged.read("qkv.weight"), exact, 1e-6)


def test_metadata_alpha_counts_unless_told_otherwise(tmp_path: Path) -> None:
    base, path = cq.open(base_file(tmp_path)), lora_file(tmp_path, "a", 10, (0,))
    config = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})
    told = save(tmp_path / "told.safetensors", load_file(path), lora_adapter_metadata=config)
    weight, change = base.read("blocks.0.q.weight").double(), delta(path, 0)

    def scale(**words: object) -> float:
        merged = cq_merge.merge(base, [told], dtype="fp32", **words)  # type: ignore[arg-type]
        got = merged.read("blocks.0.q.weight").double() - weight
        return float((got * change).sum() / change.square().sum())

    assert scale() == pytest.approx(2.0, abs=1e-4)
    assert scale(alpha="tensors") == pytest.approx(1.0, abs=1e-4)
    assert scale(alpha=2.0) == pytest.approx(0.5, abs=1e-4)
    assert scale(as_comfyui=True) == pytest.approx(1.0, abs=1e-4)
    remarks = cq_merge.merge(base, [told]).notes[0]["remarks"]
    assert any("ComfyUI" in remark for remark in remarks)


def test_a_config_beside_a_peft_file_travels_in_the_manifest(tmp_path: Path) -> None:
    base, path = cq.open(base_file(tmp_path)), lora_file(tmp_path, "adapter_model", 10, (0,))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12, "use_rslora": true}')
    merged = cq_merge.merge(base, [path], dtype="fp32")
    (tmp_path / "adapter_config.json").unlink()
    again = manifest.load(json.dumps(merged.manifest()).encode(), where="-")
    exact = base.read("blocks.0.q.weight").double() + 12 / math.sqrt(4) * delta(path, 0)
    nearly(again.read("blocks.0.q.weight"), exact, 1e-6)


# --- explaining -----------------------------------------------------------------------------------


def test_explain_measures_each_adapter_against_the_weights(tmp_path: Path) -> None:
    base = cq.open(base_file(tmp_path))
    paths = [lora_file(tmp_path, "a", 10), lora_file(tmp_path, "b", 20, (2,))]
    merged = cq_merge.merge(base, [paths[0], (paths[1], 40.0)], dampen=False)
    found = cq_merge.explain(merged, base)
    weights = {i: base.read(f"blocks.{i}.q.weight").double() for i in range(3)}
    changes = {i: delta(paths[0], i) for i in (0, 1)}
    whole = math.sqrt(sum(float(c.square().sum()) for c in changes.values()))
    against = math.sqrt(sum(float(weights[i].square().sum()) for i in (0, 1)))
    assert found.of(0)["relative"] == pytest.approx(whole / against, rel=1e-4)
    assert found.of(0)["saturated"] == []
    second = 40 * float(delta(paths[1], 2).norm() / weights[2].norm())
    assert found.of(1)["relative"] == pytest.approx(second, rel=1e-4)
    assert found.of(1)["saturated"] == ["blocks.2.q"]


def test_explain_of_a_quantized_base_measures_the_decoded_weights(tmp_path: Path) -> None:
    cq.write(
        cq_quant.quantize(cq.open(base_file(tmp_path)), family="none"), tmp_path / "q.safetensors"
    )
    base, path = cq.open(tmp_path / "q.safetensors"), lora_file(tmp_path, "a", 10, (0,))
    for keep in (False, True):
        found = cq_merge.explain(cq_merge.merge(base, [path], keep_format=keep), base)
        exact = float(delta(path, 0).norm() / random(256, 256, seed=0).norm())
        assert found.of(0)["relative"] == pytest.approx(exact, rel=1e-2)


# --- extracting -----------------------------------------------------------------------------------


def test_extract_of_a_merge_gives_the_adapter_back(tmp_path: Path) -> None:
    base = cq.open(base_file(tmp_path, torch.float32))
    path = lora_file(tmp_path, "a", 10)
    cq.write(cq_merge.merge(base, [path]), tmp_path / "tuned.safetensors")
    lora = cq_merge.extract(
        cq.open(tmp_path / "tuned.safetensors"),
        str(tmp_path / "base.safetensors"),
        rank=4,
        dtype="fp32",
    )
    cq.write(lora, tmp_path / "lora.safetensors")
    assert lora.outcomes[0].to_dict()["relative_error"] < 1e-5
    assert lora.outcomes[0].to_dict()["equal"] == 3  # a layer, a bias and a norm
    back = cq_merge.merge(base, [str(tmp_path / "lora.safetensors")])
    for i in (0, 1):
        exact = base.read(f"blocks.{i}.q.weight").double() + delta(path, i)
        nearly(back.read(f"blocks.{i}.q.weight"), exact, 1e-5)


def test_extract_finds_the_best_approximation_of_its_rank(tmp_path: Path) -> None:
    base_path = base_file(tmp_path, torch.float32)
    tensors = load_file(base_path)
    left, right = (torch.linalg.qr(random(256, 256, seed=s)).Q for s in (1, 2))
    values = 2.0 ** -torch.arange(256).float()
    tensors["blocks.0.q.weight"] += left @ values.diag() @ right
    tensors["blocks.0.q.bias"] += 1
    tuned = save(tmp_path / "tuned.safetensors", tensors)
    lora = cq_merge.extract(cq.open(tuned), base_path, rank=6, dtype="fp32")
    cq.write(lora, tmp_path / "lora.safetensors")
    file = load_file(tmp_path / "lora.safetensors")
    key = "diffusion_model.blocks.0.q"
    product = file[key + ".lora_up.weight"] @ file[key + ".lora_down.weight"]
    rest = (left @ values.diag() @ right - product).norm()
    best = values[6:].norm()
    assert rest == pytest.approx(float(best), rel=0.01)
    assert torch.equal(file[key + ".diff_b"], torch.ones(256)) or torch.allclose(
        file[key + ".diff_b"], torch.ones(256), atol=1e-6
    )
    assert lora.outcomes[0].to_dict()["worst"] == "blocks.0.q.weight"


def test_extract_recovers_part_of_a_quantization_error(tmp_path: Path) -> None:
    base_path = base_file(tmp_path)
    quantized = cq_quant.quantize(
        cq.open(base_path), format="convrot_w4a4", family="none", only=["blocks.*"]
    )
    cq.write(quantized, tmp_path / "q.safetensors")
    lora = cq_merge.extract(cq.open(base_path), str(tmp_path / "q.safetensors"), rank=64)
    assert set(lora.specs) == {
        f"diffusion_model.blocks.{i}.q.lora_{end}.weight"
        for i in range(3)
        for end in ("up", "down")
    }
    cq.write(lora, tmp_path / "lora.safetensors")
    assert 0.3 < lora.outcomes[0].to_dict()["relative_error"] < 0.9
    plain = cq.open(base_path).read("blocks.0.q.weight").double()
    decoded = cq_quant.quantize(quantized, format="fp32").read("blocks.0.q.weight").double()
    back = cq_merge.merge(
        cq.open(tmp_path / "q.safetensors"), [str(tmp_path / "lora.safetensors")], dtype="fp32"
    )
    mended = back.read("blocks.0.q.weight").double()
    assert (mended - plain).norm() < 0.9 * (decoded - plain).norm()


def test_extract_is_equal_for_any_workers_and_through_a_manifest(tmp_path: Path) -> None:
    base_path = base_file(tmp_path)
    tuned = second_model(tmp_path, "tuned", 4)
    lora = cq_merge.extract(cq.open(tuned), base_path, rank=8)
    for workers in (1, 2):
        cq.write(lora, tmp_path / f"{workers}.st", workers=workers)
    cq.write(manifest.load(json.dumps(lora.manifest()).encode(), where="-"), tmp_path / "3.st")
    assert len({(tmp_path / f"{n}.st").read_bytes() for n in (1, 2, 3)}) == 1


def test_extract_refuses_models_of_two_shapes(tmp_path: Path) -> None:
    base_path = base_file(tmp_path)
    tensors = load_file(base_path)
    tensors["blocks.0.q.weight"] = tensors["blocks.0.q.weight"][:128]
    tuned = save(tmp_path / "tuned.safetensors", tensors)
    with pytest.raises(PlanError, match=r"blocks\.0\.q\.weight.*BF16\[256,256\]"):
        cq_merge.extract(cq.open(tuned), base_path)
    with pytest.raises(UsageError, match="rank"):
        cq_merge.extract(cq.open(tuned), base_path, rank=0)
