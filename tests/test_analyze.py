"""`cq analyze`: what a file is and what would become of it, from its header alone."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from safetensors.torch import save_file

import cq
import cq_analyze
import cq_quant
from cq.core import catalog, families, manifest, sink
from cq.core.checkpoint import Part
from cq.core.dtypes import DTYPES, TensorSpec, spec_of
from cq.core.errors import CqError, PlanError, UsageError
from cq_analyze import adapters, recipes
from docs import family_tensors
from tests.processes import BASE, STYLE, environment
from tests.test_architecture import check
from tests.test_cli_errors import cq as run
from tests.test_families import KNOWN, read

FORMATS = [n for n in catalog.names("formats") if not catalog.load("formats", n).casts]


def sparse(path: Path, specs: dict[str, Any], prefix: str = "") -> Path:
    """A full-size file whose data is one hole."""
    header, position = {}, 0
    for name, spec in specs.items():
        header[prefix + name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return path


def analysis(path: Path, **words: Any) -> dict[str, Any]:
    """The analysis of a file, checked against the schema."""
    found = cq_analyze.analyze(cq.open(path), **words).to_dict()
    document: dict[str, Any] = json.loads(json.dumps(found))
    check("analysis", document)
    return document


def packed(tmp_path: Path, format_name: str) -> Path:
    """The digits model in a format."""
    path = tmp_path / f"{format_name}.safetensors"
    model = cq_quant.quantize(cq.open(BASE), format=format_name, allow_custom_loader=True)
    cq.write(model, path)
    return path


@pytest.mark.parametrize("name", KNOWN)
def test_analyze_tells_every_released_model(name: str, tmp_path: Path) -> None:
    specs, family = read(name), KNOWN[name][0]
    found = analysis(sparse(tmp_path / "model.safetensors", specs))
    assert [f["name"] for f in found["families"]] == [family]
    assert found["doubtful"] == []
    inventory = found["inventory"]
    assert inventory["tensors"] == len(specs)
    assert inventory["parameters"] == sum(spec.numel for spec in specs.values())
    for division in ("dtypes", "roles"):
        for key in ("tensors", "parameters", "nbytes"):
            assert sum(a[key] for a in inventory[division].values()) == inventory[key]
    if family == "clip":  # ComfyUI builds it without quantized layers
        assert found["plan"] is None
    else:
        assert found["plan"]["nbytes"] < found["nbytes_file"]


def test_plan_is_that_of_quant(tmp_path: Path) -> None:
    found = analysis(BASE, format="nvfp4", skip=["*.img_mlp.2"])
    model = cq_quant.quantize(cq.open(BASE), format="nvfp4", skip=["*.img_mlp.2"])
    out = tmp_path / "out.safetensors"
    cq.write(model, out)
    assert found["plan"]["decisions"] == json.loads(json.dumps([dict(n) for n in model.notes]))
    assert found["plan"]["nbytes"] == out.stat().st_size
    assert found["plan"]["nbytes_peak"] == max(part.nbytes_peak for part in model.parts)
    assert found["plan"]["loaded_by"] == "ComfyUI 0.8.0 or newer"


def test_analyze_on_the_command_line_is_the_function() -> None:
    done = run("analyze", BASE, "--format", "float8_e4m3fn", "--only", "double_blocks.*", "--json")
    assert done.code == 0
    expected = analysis(BASE, format="float8_e4m3fn", only=["double_blocks.*"])
    assert json.loads(done.out) == expected


def test_text_names_family_roles_plan_and_loader() -> None:
    done = run("analyze", BASE)
    assert done.code == 0
    assert "FLUX.1 (flux1-schnell)" in done.out
    assert "modulation, for 8 bits at least" in done.out
    assert "int8_tensorwise row quip rotated by 256" in done.out
    assert "which ComfyUI 0.27.0 or newer loads" in done.out
    assert "embeds time, guidance or the pooled text" in done.out


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_file_is_described_and_has_no_findings(name: str, tmp_path: Path) -> None:
    path = packed(tmp_path, name)
    found = analysis(path)
    assert (found["what"], found["passed"], found["plan"]) == ("quantized", True, None)
    assert [f["name"] for f in found["families"]] == ["flux1"]
    layers = found["quantized"]["layers"]
    assert found["quantized"]["formats"] == {name: layers}
    assert found["quantized"]["evidence"] == {"marker": layers}
    plain = analysis(BASE)["inventory"]
    assert found["inventory"]["parameters"] == plain["parameters"]
    assert (
        found["inventory"]["roles"]["linear"]["parameters"]
        == (plain["roles"]["linear"]["parameters"])
    )
    assert run("analyze", path).code == 0


def test_a_lost_scale_is_a_finding_and_exit_1(tmp_path: Path) -> None:
    path = packed(tmp_path, "int8_tensorwise")
    tensors = make.load(path)
    layer = next(n for n in sorted(tensors) if n.endswith(".weight_scale"))
    broken = make.save(tmp_path / "b.safetensors", {n: t for n, t in tensors.items() if n != layer})
    found = analysis(broken)
    assert not found["passed"]
    verified = cq_analyze.verify(cq.open(broken), header_only=True)
    assert found["quantized"]["findings"] == [f.to_dict() for f in verified.findings]
    done = run("analyze", broken)
    assert done.code == 1
    assert "what to do" in done.out


def test_a_plan_for_a_quantized_file_is_refused_as_quant_refuses_it(tmp_path: Path) -> None:
    path = packed(tmp_path, "int8_tensorwise")
    with pytest.raises(PlanError, match="is quantized already"):
        cq_analyze.analyze(cq.open(path), format="nvfp4")


@pytest.mark.parametrize("words", [{}, {"format": "nvfp4", "skip": ["double_blocks.0.*"]}])
def test_the_plan_of_requantizing_is_that_of_quant(tmp_path: Path, words: dict[str, Any]) -> None:
    checkpoint = cq.open(packed(tmp_path, "int8_tensorwise"))
    found = cq_analyze.analyze(checkpoint, requantize=True, **words)
    expected = cq_quant.quantize(checkpoint, requantize=True, **words)
    assert found.what == "quantized"
    assert found.plan is not None
    assert found.plan.decisions == expected.notes
    assert found.plan.nbytes == sink.nbytes_file(expected)


def test_requantizing_means_nothing_for_what_is_not_quantized(tmp_path: Path) -> None:
    checkpoint = cq.open(make.save(tmp_path / "in.safetensors", make.model()))
    plain, again = (cq_analyze.analyze(checkpoint, requantize=r) for r in (False, True))
    assert plain.to_dict() == again.to_dict()


def test_weights_are_not_measured_before_they_are_dequantized(tmp_path: Path) -> None:
    done = run("analyze", packed(tmp_path, "nvfp4"), "--deep", "--requantize")
    assert done.code == 2
    assert "exclude each other" in done.err
    assert "--format bf16" in done.err


def test_an_unknown_model_gets_general_rules(tmp_path: Path) -> None:
    path = make.save(tmp_path / "in.safetensors", make.model())
    found = analysis(path)
    assert (found["families"], found["doubtful"]) == ([], [])
    chosen = {d["layer"] for d in found["plan"]["decisions"] if d["action"] == "quantize"}
    assert chosen == set(make.quantized_names())
    assert "unknown model, general rules apply" in run("analyze", path).out


def test_a_merged_checkpoint_is_analyzed_before_it_is_computed() -> None:
    done = run("merge", BASE, STYLE)
    assert done.code == 0
    deferred = manifest.load(done.out.encode(), where="test")
    merged = json.loads(json.dumps(cq_analyze.analyze(deferred).to_dict()))
    plain = analysis(BASE)
    assert merged["families"] == plain["families"]
    assert merged["plan"]["decisions"] == plain["plan"]["decisions"]


def test_components_of_a_checkpoint_are_listed(tmp_path: Path) -> None:
    specs = {f"model.diffusion_model.{n}": s for n, s in read("sdxl-unet").items()}
    vae = {"first_stage_model.decoder.conv_in.weight": make.weight(8, 4, 3, 3)}
    text = {f"conditioner.embedders.0.transformer.{n}": s for n, s in read("te-clip-l").items()}
    path = sparse(
        tmp_path / "all.safetensors",
        {**specs, **text, **{n: spec_of(t) for n, t in vae.items()}},
    )
    found = analysis(path)
    kinds = {c["prefix"]: c["kind"] for c in found["components"]}
    assert kinds == {
        "model.diffusion_model.": "diffusion model",
        "conditioner.embedders.0.": "text encoder",
        "first_stage_model.": "VAE",
    }
    assert found["inventory"]["roles"]["VAE"]["tensors"] == 1
    assert found["inventory"]["roles"]["text encoder"]["tensors"] == len(text)
    kept = {d["layer"]: d["reason"] for d in found["plan"]["decisions"] if d["action"] == "keep"}
    assert (
        "VAE" in kept["first_stage_model.decoder.conv_in"]
        or "4-D" in (kept["first_stage_model.decoder.conv_in"])
    )
    assert "first_stage_model." in run("analyze", path).out


def test_a_vae_alone_is_called_one_and_has_no_plan(tmp_path: Path) -> None:
    path = make.save(
        tmp_path / "v.safetensors", {"decoder.conv_in.weight": make.weight(8, 4, 3, 3)}
    )
    found = analysis(path)
    assert (found["what"], found["plan"]) == ("other", None)
    assert "there is no layer to quantize" in found["unplanned"]
    done = run("analyze", path)
    assert done.code == 0
    assert "VAE" in done.out


def test_digits_lora_is_described() -> None:
    found = analysis(STYLE)
    adapter = found["adapter"]
    assert (found["what"], found["plan"], found["quantized"]) == ("adapter", None, None)
    assert adapter["kinds"] == {"LoRA": 19}
    assert adapter["spellings"] == {"kohya": 19}
    assert adapter["ranks"] == {"16": 19}
    assert adapter["alphas"] == {"8": 19}
    assert adapter["scales"] == [0.5, 0.5]
    assert adapter["fits"][0] == {"family": "flux1", "title": "FLUX.1", "known": 19, "targets": 19}
    assert adapter["merges"] == ["LoRA"]
    done = run("analyze", STYLE)
    assert done.code == 0
    assert "fits FLUX.1 by its layers' names\n" in done.out


TARGET = "double_blocks.3.img_attn.qkv"
KOHYA = "lora_unet_" + TARGET.replace(".", "_")
SMALL, LARGE = make.weight(4, 64), make.weight(64, 4)
SPELLINGS: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "kohya": (
        {f"{KOHYA}.lora_down.weight": SMALL, f"{KOHYA}.lora_up.weight": LARGE},
        "LoRA",
        "kohya",
    ),
    "peft": (
        {
            f"base_model.model.{TARGET}.lora_A.weight": SMALL,
            f"base_model.model.{TARGET}.lora_B.weight": LARGE,
        },
        "LoRA",
        "PEFT",
    ),
    "diffusers": (
        {
            f"transformer.{TARGET}.lora.down.weight": SMALL,
            f"transformer.{TARGET}.lora.up.weight": LARGE,
        },
        "LoRA",
        "diffusers",
    ),
    "dora": (
        {
            f"{KOHYA}.lora_down.weight": SMALL,
            f"{KOHYA}.lora_up.weight": LARGE,
            f"{KOHYA}.dora_scale": LARGE[:, :1],
        },
        "DoRA",
        "kohya",
    ),
    "loha": (
        {
            f"{KOHYA}.hada_w1_a": LARGE,
            f"{KOHYA}.hada_w1_b": SMALL,
            f"{KOHYA}.hada_w2_a": LARGE,
            f"{KOHYA}.hada_w2_b": SMALL,
        },
        "LoHa",
        "LyCORIS",
    ),
    "lokr": (
        {f"{KOHYA}.lokr_w1": LARGE, f"{KOHYA}.lokr_w2_a": LARGE, f"{KOHYA}.lokr_w2_b": SMALL},
        "LoKr",
        "LyCORIS",
    ),
    "oft": ({f"{KOHYA}.oft_blocks": LARGE}, "OFT", "LyCORIS"),
    "diff": ({f"diffusion_model.{TARGET}.diff": LARGE}, "diff", "LyCORIS"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_adapter_kind_spelling_and_fit_are_told_by_names(name: str, tmp_path: Path) -> None:
    tensors, kind, spelling = SPELLINGS[name]
    tensors = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    adapter = analysis(make.save(tmp_path / "a.safetensors", tensors))["adapter"]
    assert adapter["kinds"] == {kind: 1}
    assert list(adapter["spellings"]) == [spelling]
    assert adapter["unrecognized"] == []
    assert "flux1" in {fit["family"] for fit in adapter["fits"]}
    if any(
        n.endswith(("lora_down.weight", "lora_A.weight", "_b", "lora.down.weight")) for n in tensors
    ):
        assert adapter["ranks"] == {"4": 1}


def test_targets_that_a_family_does_not_know_are_counted(tmp_path: Path) -> None:
    names = [f"lora_unet_double_blocks_{i}_img_attn_qkv" for i in range(5)] + ["lora_unet_odd_one"]
    tensors = {f"{n}.lora_down.weight": SMALL for n in names}
    tensors |= {f"{n}.lora_up.weight": LARGE for n in names}
    tensors |= {f"lora_te1_layers_{i}_q.lora_down.weight": SMALL for i in range(2)}
    path = make.save(tmp_path / "a.safetensors", {n: t.clone() for n, t in tensors.items()})
    adapter = analysis(path)["adapter"]
    assert (adapter["targets"], adapter["text_encoder_targets"]) == (8, 2)
    fit = next(fit for fit in adapter["fits"] if fit["family"] == "flux1")
    assert (fit["known"], fit["targets"]) == (5, 6)
    text = run("analyze", path).out
    assert "1 of 6 targets are unknown to it" in text
    assert "text encoder: 2 of 8 targets" in text
    assert "alpha: no tensor" in text


def test_an_adapter_that_fits_nothing_says_so(tmp_path: Path) -> None:
    path = make.save(
        tmp_path / "a.safetensors", {"x.lora_A.weight": SMALL, "x.lora_B.weight": LARGE}
    )
    assert analysis(path)["adapter"]["fits"] == []
    assert "fits no family that cq knows" in run("analyze", path).out


@pytest.mark.parametrize(
    ("width", "families", "model"),
    [
        (768, ["sd15"], None),
        (2048, ["sdxl"], None),
        (1024, [], "Stable Diffusion 2"),
    ],
)
def test_a_lora_of_a_unet_says_of_which_by_what_its_cross_attention_reads(
    width: int, families: list[str], model: str | None, tmp_path: Path
) -> None:
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{key}.lora_down.weight": make.weight(4, width),
        f"{key}.lora_up.weight": make.weight(640, 4),
        f"{key}.alpha": torch.tensor(4.0),
    }
    path = make.save(tmp_path / "a.safetensors", tensors)
    adapter = analysis(path)["adapter"]
    assert [fit["family"] for fit in adapter["fits"]] == families
    assert adapter["names_of"] == model
    if model is not None:
        told = f"fits {model}: its layers' names are those of the diffusers"
        assert told in run("analyze", path).out


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (["transformer.single_transformer_blocks.3.attn.to_q"], "flux1"),
        (["transformer.layers.3.attention.to_out.0"], "z-image"),
        (["transformer.joint_blocks.3.x_block.attn.proj"], "sd3"),
        (["base_model.model.transformer_blocks.3.attn.add_q_proj"], "sd3"),
        (["lora_unet__blocks_3_cross_attn_k"], "wan"),
        (["transformer.blocks.3.attn2.to_out.0"], "wan"),
        (["unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out"], "sdxl"),
        (["oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"], "sdxl"),
        (["single_blocks.3.processor.qkv", "single_blocks.3.processor.proj"], "flux1"),
    ],
)
def test_an_adapter_fits_by_every_name_that_merge_takes(
    keys: list[str], family: str, tmp_path: Path
) -> None:
    tensors = {}
    for key in keys:
        tensors |= {
            f"{key}_lora.down.weight": SMALL.clone(),
            f"{key}_lora.up.weight": LARGE.clone(),
        }
    adapter = analysis(make.save(tmp_path / "a.safetensors", tensors))["adapter"]
    fits = {fit["family"]: fit["known"] for fit in adapter["fits"]}
    assert fits.get(family) == len(keys)
    # Only those are listed that know all of it.
    assert set(fits.values()) == {len(keys)}


def test_differences_of_norms_do_not_count_against_a_family(tmp_path: Path) -> None:
    block = "diffusion_model.blocks.0."
    tensors = {f"{block}norm3.diff": LARGE[:, 0].clone(), f"{block}modulation.diff": LARGE.clone()}
    tensors[f"{block}self_attn.q.lora_down.weight"] = SMALL.clone()
    tensors[f"{block}self_attn.q.lora_up.weight"] = LARGE.clone()
    adapter = analysis(make.save(tmp_path / "a.safetensors", tensors))["adapter"]
    assert "wan" in {fit["family"] for fit in adapter["fits"]}
    assert adapter["kinds"] == {"diff": 2, "LoRA": 1}


def test_whole_file_layouts_are_told(tmp_path: Path) -> None:
    control = {
        "img_in.lora_A.weight": SMALL.clone(),
        "img_in.lora_B.weight": LARGE.clone(),
        "img_in.lora_B.bias": LARGE[:, 0].clone(),
        **{f"single_blocks.{i}.norm.key_norm.scale": LARGE[:, 0].clone() for i in range(9)},
    }
    adapter = analysis(make.save(tmp_path / "control.safetensors", control))["adapter"]
    assert adapter["kinds"] == {"set_weight": 9, "LoRA": 1}
    assert (adapter["unrecognized"], set(adapter["merges"])) == ([], {"set_weight", "LoRA"})
    uso = {}
    for layer in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"):
        uso[f"double_blocks.0.processor.{layer}.down.weight"] = SMALL.clone()
        uso[f"double_blocks.0.processor.{layer}.up.weight"] = LARGE.clone()
    adapter = analysis(make.save(tmp_path / "uso.safetensors", uso))["adapter"]
    assert (adapter["targets"], adapter["kinds"]) == (4, {"LoRA": 4})
    assert ("flux1", 4) in {(fit["family"], fit["known"]) for fit in adapter["fits"]}


@pytest.mark.parametrize(
    ("ending", "shape", "kind", "merged"),
    [
        (".oft_blocks", (2, 32, 32), "OFT", True),
        (".oft_blocks", (2, 2, 32, 32), "BOFT", True),
        (".oft_diag", (64,), "diagonal OFT", False),
        (".oft_R.weight", (64, 16), "PEFT's OFT", False),
        (".w_norm", (64,), "norm", True),
        (".set_weight", (64,), "set_weight", True),
        (".lora_magnitude_vector.default.weight", (64,), "DoRA", True),
    ],
)
def test_an_adapter_says_whether_merge_takes_its_kind(
    ending: str, shape: tuple[int, ...], kind: str, merged: bool, tmp_path: Path
) -> None:
    tensors = {KOHYA + ending: torch.ones(shape)}
    adapter = analysis(make.save(tmp_path / "a.safetensors", tensors))["adapter"]
    assert adapter["kinds"] == {kind: 1}
    assert adapter["merges"] == ([kind] if merged else [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_left_out(value: float, tmp_path: Path) -> None:
    tensors = {**SPELLINGS["kohya"][0], f"{KOHYA}.alpha": torch.tensor(value)}
    adapter = analysis(make.save(tmp_path / "a.safetensors", tensors))["adapter"]
    assert (adapter["alphas"], adapter["scales"]) == ({}, None)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64", "I64"])
def test_alphas_are_read_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    alpha = torch.tensor(2).to(getattr(torch, DTYPES[dtype].torch_name or ""))
    tensors = {**SPELLINGS["kohya"][0], f"{KOHYA}.alpha": alpha}
    adapter = analysis(make.save(tmp_path / "a.safetensors", tensors))["adapter"]
    assert (adapter["alphas"], adapter["scales"]) == ({"2": 1}, [0.5, 0.5])


def test_a_plan_for_an_adapter_is_refused() -> None:
    with pytest.raises(PlanError, match="is an adapter, which is merged, not quantized"):
        cq_analyze.analyze(cq.open(STYLE), format="nvfp4")
    assert run("analyze", STYLE, "--format", "nvfp4").code == 4


def test_a_model_with_a_few_adapter_names_is_no_adapter() -> None:
    model = cq.open(BASE)
    assert adapters.describe(model) is None


@pytest.mark.parametrize("family", families.names())
def test_tensors_of_a_family_are_what_its_skeletons_say(family: str) -> None:
    """Run `docs/family_tensors.py` if this fails."""
    rows = family_tensors.lines(family_tensors.releases()[family])
    assert families.load(family).tensors.splitlines() == list(rows)


WRONG: dict[str, tuple[dict[str, Any], type[CqError], str]] = {
    "format": ({"format": "int9"}, PlanError, "no format `int9`"),
    "optimizer": ({"optimizer": "quipp"}, PlanError, "no optimizer `quipp`"),
    "family": ({"family": "fluxx"}, PlanError, "no family `fluxx`"),
    "pattern": ({"only": ["nothing.*"]}, PlanError, "matches no layer"),
    "rotate": ({"rotate": "17"}, UsageError, "no rotation `17`"),
    "recipe": ({"recipe": "no-such.json"}, CqError, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_word_is_an_error_as_in_quant(name: str) -> None:
    words, kind, message = WRONG[name]
    for function in (cq_analyze.analyze, cq_analyze.template):
        with pytest.raises(kind, match=message):
            function(cq.open(BASE), **words)


HOSTILE: dict[str, dict[str, torch.Tensor]] = {
    "marker": {"a.weight": make.weight(64, 64), "a.comfy_quant": torch.zeros(3, dtype=torch.uint8)},
    "0-d": {"blocks.0.a.weight": torch.tensor(1.0), "x": torch.tensor(2.0)},
    "empty": {"blocks.0.a.weight": torch.empty(0, 64)},
    "names": {"": torch.ones(2), ".weight": torch.ones(64, 64), "a\n.weight": torch.ones(64, 64)},
    "half": {"a.lora_down.weight": make.weight(4, 64)},
    "rank 0": {"a.lora_down.weight": torch.empty(0, 64), "a.alpha": torch.tensor(1.0)},
    "flat": {"a.lora_down.weight": torch.ones(4), "a.lora_up.weight": torch.tensor(1.0)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_odd_files_are_described_without_a_failure(name: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(HOSTILE[name], path)
    analysis(path)
    done = run("analyze", path)
    assert done.code in {0, 1}
    assert "bug" not in done.err


@pytest.mark.parametrize("value", ["not json", "[]", '{"layers": 3}'])
def test_a_broken_header_entry_is_a_finding(value: str, tmp_path: Path) -> None:
    path = make.save(tmp_path / "a.safetensors", make.model(), {"_quantization_metadata": value})
    found = analysis(path)
    assert not found["passed"]
    assert found["quantized"]["findings"][0]["name"] == "header.invalid"


@pytest.mark.parametrize("command", ["analyze", "template"])
def test_looking_imports_no_torch(command: str) -> None:
    code = (
        "import sys; from cq.cli.main import run; from cq.cli.output import Terminal\n"
        f"code = run([{command!r}, {str(BASE)!r}], Terminal())\n"
        "sys.exit(code or 'torch' in sys.modules or 'rich' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_analysis_is_linear_in_tensors() -> None:
    """Twice the tensors take about twice the time: no list is walked for each of them."""

    def seconds(blocks: int) -> float:
        names = [f"blocks.{i}.{n}.weight" for i in range(blocks) for n in ("a", "b", "c", "d")]
        spec = TensorSpec("BF16", (128, 128))
        parts = [Part(tensors={n: spec}, nbytes_peak=1, produce=lambda: iter(())) for n in names]
        model = make.checkpoint(*parts)
        start = time.process_time()
        cq_analyze.analyze(model)
        recipes.rules(cq_quant.quantize(model).notes)
        return time.process_time() - start

    seconds(10)
    assert seconds(2000) < 6 * seconds(1000) + 0.5


def test_two_models_in_one_file_are_called_ambiguous(tmp_path: Path) -> None:
    path = sparse(tmp_path / "both.safetensors", {**read("flux1-dev"), **read("sd3.5-medium")})
    found = analysis(path)
    assert found["families"] == []
    assert [{f["name"] for f in doubt} for doubt in found["doubtful"]] == [{"flux1", "sd3"}]
    assert "ambiguous: FLUX.1 (flux1-dev) or Stable Diffusion 3" in run("analyze", path).out
    told = analysis(path, family="flux1")
    assert [f["name"] for f in told["families"]] == ["flux1"]


def test_a_full_size_model_takes_little_memory(tmp_path: Path) -> None:
    """24 GB of weights, of which none is read: under 80 MB in all."""
    path = sparse(tmp_path / "flux.safetensors", read("flux1-dev"))
    code = (
        "import sys; from cq.cli.main import run; from cq.cli.output import Terminal\n"
        f"run(['analyze', {str(path)!r}], Terminal())\n"
        "status = open('/proc/self/status').read()\n"
        "sys.stderr.write(status.partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert "23.80 GB of tensors become a file of 11.98 GB" in done.stdout
    assert int(done.stderr) < 80_000
