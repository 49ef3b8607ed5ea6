"""What a calibration is for beside rounding: input scales, biases, smoothing, equalization."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import make
import pytest
import torch
import torch.nn.functional as functional
from test_architecture import check
from test_outputs import inputs, statistics

import cq
import cq_analyze
import cq_quant
from cq.calibration import Recorder
from cq.cli import main
from cq.cli.output import Terminal
from cq.core import calibration as files
from cq.core import catalog, families, folds
from cq.core.calibration import Calibration
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import CqError, InputError, PlanError, UsageError
from cq.core.families import Match
from cq.core.formats import decode
from cq.core.knowledge import Knowledge
from cq.core.manifest import open_checkpoint
from cq.core.moment import output_error
from cq.core.stored import stored_layers
from cq_quant.equalizing import Rule, equalized
from examples.digits.data import conditioning
from examples.digits.model import DigitsFlux, load
from tests.processes import BASE

LAYER, BARE = "blocks.0.mlp.0", "blocks.0.mlp.2"


@cache
def digits() -> DigitsFlux:
    return load(BASE)


def step(model: DigitsFlux, seed: object = 0) -> torch.Tensor:
    """One step of eight images."""
    rng = make.generator("step", seed)
    context, vector = conditioning(torch.arange(8))
    noise = torch.randn(8, 16, 8, 8, generator=rng)
    with torch.no_grad():
        return model(noise, torch.rand(8, generator=rng), context, vector)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the digits model."""
    path = tmp_path_factory.mktemp("uses") / "digits.calib"
    with Recorder(digits(), rank=16, held_rank=16, rows_per_call=64) as recorder:
        for seed in range(4):
            step(digits(), seed)
    recorder.save(path)
    return path


def pair(
    folder: Path, *, bias: str = "BF16", loud: float = 1.0, dtype: str = "F32"
) -> tuple[Path, Path]:
    """Two layers of 64 features, one with a bias, and their recorded inputs."""
    tensors = {f"{n}.weight": make.weight(96, 64, dtype=dtype, seed=n) for n in (LAYER, BARE)}
    tensors[f"{LAYER}.bias"] = make.weight(96, dtype=bias, seed="bias")
    factors = torch.where(torch.arange(64) % 9 == 0, loud, 1.0)
    found = {
        n: statistics(inputs(400, 64, n) * factors, inputs(50, 64, (n, 1)) * factors)
        for n in (LAYER, BARE)
    }
    files.save(folder / "c", found, force=True)
    return make.save(folder / "m.safetensors", tensors), folder / "c"


def quantized(model: Path, calibration: Path, **settings: Any) -> Checkpoint:
    return cq_quant.quantize(
        cq.open(model), calibration=calibration, allow_custom_loader=True, **settings
    )


def weight_of(checkpoint: Checkpoint, layer: str) -> torch.Tensor:
    """The layer's weight as a runtime multiplies its inputs by it, before smoothing."""
    stored = stored_layers(checkpoint)[layer]
    own = {n: checkpoint.read(name) for n, name in stored.names.items()}
    own.pop("pre_quant_scale", None)
    return decode(stored.format, own, stored.settings)


# Input scales -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "largest"), [("float8_e4m3fn", 448), ("float8_e5m2", 57344), ("nvfp4", 448 * 6)]
)
def test_an_input_scale_maps_the_largest_input_to_the_largest_number(
    name: str, largest: float, tmp_path: Path
) -> None:
    model, calibration = pair(tmp_path)
    found = quantized(model, calibration, format=name, input_scales="absmax", only=[LAYER])
    scale = found.read(f"{LAYER}.input_scale")
    assert scale.shape == () and scale.dtype == torch.float32
    reach = Calibration.open(calibration).statistics(LAYER).absmax.amax()
    assert float(scale) == pytest.approx(float(reach) / largest, rel=1e-6)
    cq.write(found, tmp_path / "q")
    assert cq_analyze.verify(cq.open(tmp_path / "q")).passed


def test_layers_without_recorded_inputs_keep_none_and_are_counted(tmp_path: Path) -> None:
    model, calibration = pair(tmp_path)
    kept = Calibration.open(calibration).statistics(LAYER)
    files.save(tmp_path / "half", {LAYER: kept})
    found = quantized(model, tmp_path / "half", format="nvfp4", input_scales="absmax")
    assert f"{LAYER}.input_scale" in found.specs and f"{BARE}.input_scale" not in found.specs
    marks = {note["layer"]: note.get("beside") for note in found.notes if "beside" in note}
    assert marks == {LAYER: {"input_scales": True}, BARE: {"input_scales": "was not recorded"}}


def test_the_largest_input_is_that_of_all_rows(tmp_path: Path) -> None:
    """Though the recorder takes only some rows into the moments."""
    value = inputs(200, 64)
    value[17, 5] = 1e4
    value[18, 6] = torch.nan
    with Recorder(torch.nn.Linear(64, 2), rows_per_call=10) as recorder, torch.no_grad():
        recorder._modules[""](value)
    reach = recorder._layers[""].absmax
    assert torch.equal(reach, value[torch.isfinite(value).all(1)].abs().amax(0))


# Biases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["rtn", "gptq", "quip", "learned"])
@pytest.mark.parametrize("name", ["int8_tensorwise", "nvfp4", "convrot_w4a4", "asym_w4a8_int8"])
def test_a_corrected_bias_leaves_no_mean_error(name: str, optimizer: str, tmp_path: Path) -> None:
    """On the mean input that was recorded, whatever rounds, in whatever basis."""
    if optimizer == "quip" and catalog.load("formats", name).rotation == "never":
        optimizer = "gptq"
    model, calibration = pair(tmp_path, bias="F32")
    found = quantized(
        model, calibration, format=name, optimizer=optimizer, bias_correction=True, only=[LAYER]
    )
    mean = Calibration.open(calibration).statistics(LAYER).mean.double()
    plain = make.load(model)
    error = (weight_of(found, LAYER) - plain[f"{LAYER}.weight"]).double() @ mean
    bias = found.read(f"{LAYER}.bias").double()
    left = error + bias - plain[f"{LAYER}.bias"].double()
    assert float(left.abs().amax()) < 1e-3 * float(error.abs().amax())


def test_a_corrected_bias_is_rounded_to_its_dtype_and_no_further(tmp_path: Path) -> None:
    model, calibration = pair(tmp_path)
    found = quantized(model, calibration, format="nvfp4", bias_correction=True)
    bias = found.read(f"{LAYER}.bias")
    assert bias.dtype == torch.bfloat16 and f"{BARE}.bias" not in found.specs
    mean = Calibration.open(calibration).statistics(LAYER).mean.double()
    plain = make.load(model)
    wanted = plain[f"{LAYER}.bias"].double()
    wanted += (plain[f"{LAYER}.weight"] - weight_of(found, LAYER)).double() @ mean
    assert torch.equal(bias, wanted.bfloat16()) or bool(
        ((bias.double() - wanted).abs() <= wanted.abs() * 2**-8).all()
    )
    marks = {n["layer"]: n["beside"]["bias_correction"] for n in found.notes if "beside" in n}
    assert marks == {LAYER: True, BARE: "has no bias in floats"}


def test_a_bias_that_overflows_names_itself(tmp_path: Path) -> None:
    model, calibration = pair(tmp_path, bias="F16")
    tensors = make.load(model)
    tensors[f"{LAYER}.bias"] = torch.full((96,), 65504.0, dtype=torch.float16)
    tensors[f"{LAYER}.weight"] *= 1e7
    make.save(model, tensors)
    found = quantized(model, calibration, format="nvfp4", bias_correction=True)
    with pytest.raises(InputError, match=f"`{LAYER}.bias`"):
        found.read(f"{LAYER}.bias")


# Smoothing ----------------------------------------------------------------------------------------


def test_a_stored_smoothing_factor_helps_inputs_and_leaves_the_layer_as_it_is(
    tmp_path: Path,
) -> None:
    model, calibration = pair(tmp_path, loud=16.0)
    settings = {"format": "nvfp4", "optimizer": "rtn"}
    found = quantized(model, calibration, smoothquant=0.5, **settings)
    scale = found.read(f"{LAYER}.pre_quant_scale")
    assert scale.shape == (64,) and torch.equal(scale, scale.bfloat16().float())
    loud = torch.arange(64) % 9 == 0
    assert float(scale[loud].mean()) < 0.5 * float(scale[~loud].mean())
    plain = make.load(model)[f"{LAYER}.weight"]
    # what is rounded is W s, so that (x / s) (W s) is as before
    smoothed = weight_of(found, LAYER)
    make.save(tmp_path / "smoothed", {f"{LAYER}.weight": plain * (1 / scale)})
    explicit = cq_quant.quantize(cq.open(tmp_path / "smoothed"), **settings)
    assert torch.equal(smoothed, weight_of(explicit, LAYER))
    cq.write(found, tmp_path / "q")
    report = cq_analyze.verify(
        cq.open(tmp_path / "q"), against=cq.open(model), calibration=calibration
    )
    assert report.passed and report.first_comfyui == "0.30.0"
    assert {note["first_comfyui"] for note in found.notes if "beside" in note} == {"0.30.0"}
    # and with runtime rounding of inputs it pays
    x = inputs(200, 64, LAYER) * torch.where(loud, 16.0, 1.0)
    unsmoothed = weight_of(cq_quant.quantize(cq.open(model), **settings), LAYER)
    exact = x @ plain.T
    errors = [
        float((nvfp4(x * s) @ w.T - exact).norm())
        for s, w in ((scale, smoothed), (torch.ones(64), unsmoothed))
    ]
    assert errors[0] < 0.95 * errors[1]


def nvfp4(x: torch.Tensor) -> torch.Tensor:
    """The rows as an nvfp4 runtime rounds them."""
    plug = catalog.load("formats", "nvfp4")
    grid = plug.grid(TensorSpec("F32", (x.shape[0], x.shape[1])), "block")
    scales = {**grid.survey([x])}
    scales |= grid.scales(x, scales)
    levels: torch.Tensor = grid.values(grid.nearest(x, scales), scales)
    return levels


def test_input_scales_are_of_smoothed_inputs(tmp_path: Path) -> None:
    model, calibration = pair(tmp_path, loud=16.0)
    found = quantized(
        model, calibration, format="nvfp4", smoothquant=0.5, input_scales="absmax", only=[LAYER]
    )
    reach = Calibration.open(calibration).statistics(LAYER).absmax
    smoothed = (reach * found.read(f"{LAYER}.pre_quant_scale")).amax() / (448 * 6)
    assert float(found.read(f"{LAYER}.input_scale")) == pytest.approx(float(smoothed), rel=1e-6)


# Equalization -------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"equalize": True}, {"smoothquant": 0.5}])
def test_the_float_model_computes_the_same_with_factors_folded(
    asked: Mapping[str, Any], recorded: Path
) -> None:
    """On the architecture of Flux.1, up to float32 rounding; and there is something to fold."""
    found = quantized(BASE, recorded, format="fp32", **asked)
    folded = load(found.read_many(found.specs))
    weights = [n for n in found.specs if n.endswith(".weight")]
    own = dict(digits().state_dict())
    changed = [n for n in weights if not torch.equal(found.read(n).float(), own[n])]
    assert len(changed) == 8 + 2 * 3 and not any("mlp.2" in name for name in changed)
    before, after = step(digits(), 9), step(folded, 9)
    assert float((before - after).norm() / before.norm()) < 1e-6


def test_weights_that_are_kept_keep_their_dtype_and_small_tensors_lose_nothing(
    recorded: Path,
) -> None:
    found = quantized(BASE, recorded, equalize=True, only=["single_blocks.1.linear2"])
    source = cq.open(BASE).specs
    others = {n: s.dtype for n, s in found.specs.items() if s.dtype != source.get(n, s).dtype}
    assert set(others.values()) == {"F32", "I8"}
    floats = [name for name, dtype in others.items() if dtype == "F32"]
    assert len(floats) == 8 and all(name.endswith(".bias") for name in floats)
    kept, exact = (
        "double_blocks.0.img_attn.qkv.weight",
        quantized(BASE, recorded, equalize=True, format="fp32"),
    )
    assert torch.equal(found.read(kept), exact.read(kept).bfloat16())


def test_equalized_inputs_are_evener_and_their_moments_follow(recorded: Path) -> None:
    """What the optimizers are told of the inputs is what the folded model's layers get."""
    found = quantized(BASE, recorded, format="fp32", equalize=True)
    folded = load(found.read_many(found.specs))
    layer = "double_blocks.0.img_mlp.0"
    with Recorder(folded, rank=16, held_rank=16, rows_per_call=64) as recorder:
        for seed in range(4):
            step(folded, seed)
    stage = cq_quant.stage.QuantStage.from_arguments(found.stages[-1].arguments())
    own = stage.before_rounding(cq.open(BASE)).inputs[layer]()
    before = Calibration.open(recorded).moment(layer)
    again = recorder._layers[layer].statistics()
    assert torch.allclose(again.diag, before.scaled(own).diagonal(), rtol=1e-2)
    weights = [
        c.read(f"{layer}.weight").float().square().mean(0).sqrt() for c in (cq.open(BASE), found)
    ]
    uneven = [
        float((rms / weight).log2().std())
        for rms, weight in zip((before.diagonal().sqrt(), again.diag.sqrt()), weights, strict=True)
    ]
    assert uneven[1] < 0.05 * uneven[0]


def test_rounding_is_guided_by_the_inputs_that_equalized_layers_get(
    recorded: Path, tmp_path: Path
) -> None:
    """As if the folded model had been recorded and quantized."""
    layer = "double_blocks.0.img_attn.qkv"
    folded = quantized(BASE, recorded, format="fp32", equalize=True)
    stage = cq_quant.stage.QuantStage.from_arguments(folded.stages[-1].arguments())
    own = stage.before_rounding(cq.open(BASE)).inputs[layer]()
    was = Calibration.open(recorded).statistics(layer)
    now = replace(
        was,
        diag=was.diag * own.square(),
        sketch=was.sketch * own,
        held_diag=was.held_diag * own.square(),
        held_sketch=was.held_sketch * own,
    )
    files.save(tmp_path / "c", {layer: now})
    settings = {"format": "int8_tensorwise", "optimizer": "gptq", "only": [layer]}
    there = cq_quant.quantize(folded, calibration=tmp_path / "c", **settings)
    here = quantized(BASE, recorded, equalize=True, **settings)
    same = here.read(f"{layer}.weight") == there.read(f"{layer}.weight")
    assert float(same.float().mean()) > 0.97


def path_of(calibration: Path) -> dict[str, Any]:
    return {"path": str(calibration), **Calibration.open(calibration).source.fingerprint()}


def test_an_equalized_file_is_verified_against_the_original(recorded: Path, tmp_path: Path) -> None:
    settings = {"format": "int8_tensorwise", "equalize": True, "rotate": "off"}
    cq.write(quantized(BASE, recorded, **settings), tmp_path / "q")
    plain = quantized(BASE, recorded, **{**settings, "equalize": False})
    reports = [
        cq_analyze.verify(model, against=cq.open(BASE), calibration=recorded)
        for model in (cq.open(tmp_path / "q"), plain)
    ]
    assert all(report.passed for report in reports)
    assert reports[0].unquantized is not None and not reports[0].unquantized.changed
    assert "after the same equalization" in " ".join(reports[0].notes)
    layer, file = "double_blocks.0.img_mlp.0", cq.open(tmp_path / "q")
    stage = cq_quant.stage.QuantStage.from_arguments({**settings, "calibration": path_of(recorded)})
    folded = stage.before_rounding(cq.open(BASE))
    weight = folded.checkpoint.read(f"{layer}.weight")
    held = Calibration.open(recorded).held(layer)
    assert held is not None
    held = held.scaled(folded.inputs[layer]())
    explicit = output_error(held, weight_of(file, layer) - weight, weight) ** 0.5
    errors = {x.layer: x.output.relative_error for x in reports[0].layers if x.output}
    assert errors[layer] == pytest.approx(explicit, rel=1e-4)
    with pytest.raises(PlanError, match="equalized before weights were rounded"):
        cq_analyze.verify(cq.open(tmp_path / "q"), against=cq.open(BASE))
    other = tmp_path / "other"
    with Recorder(digits(), rank=2) as recorder:
        step(digits())
    recorder.save(other)
    with pytest.raises(PlanError, match="another calibration"):
        cq_analyze.verify(cq.open(tmp_path / "q"), against=cq.open(BASE), calibration=other)


def test_bytes_do_not_depend_on_workers_or_on_the_pipe(recorded: Path, tmp_path: Path) -> None:
    settings = {"format": "nvfp4", "optimizer": "rtn", "equalize": True, "bias_correction": True}
    found = quantized(BASE, recorded, input_scales="absmax", **settings)
    cq.write(found, tmp_path / "a", workers=1)
    cq.write(found, tmp_path / "b", workers=3)
    (tmp_path / "m.json").write_text(json.dumps(found.manifest()))
    cq.write(open_checkpoint(tmp_path / "m.json"), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


class NextDit(torch.nn.Module):
    """A block of Z-Image, as ComfyUI computes it (`comfy/ldm/lumina/model.py`), one head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        linear = partial(torch.nn.Linear, bias=False)
        names: dict[str, torch.nn.Module] = {
            "attention_norm1": torch.nn.RMSNorm(width),
            "attention_norm2": torch.nn.RMSNorm(width),
            "attention.qkv": linear(width, 3 * width),
            "attention.out": linear(width, width),
            "ffn_norm1": torch.nn.RMSNorm(width),
            "ffn_norm2": torch.nn.RMSNorm(width),
            "feed_forward.w1": linear(width, 80),
            "feed_forward.w2": linear(80, width),
            "feed_forward.w3": linear(width, 80),
            "adaLN_modulation.0": torch.nn.Linear(16, 4 * width),
        }
        self.own = torch.nn.ModuleDict({n.replace(".", "/"): m for n, m in names.items()})
        for name, tensor in self.own.named_parameters():
            tensor.data = make.weight(*tensor.shape, seed=name) * 8 + (tensor.ndim == 1)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"layers.0.{n.replace('/', '.')}": t.detach() for n, t in self.own.named_parameters()
        }

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        own, rest = self.own, functional
        scale_msa, gate_msa, scale_mlp, gate_mlp = own["adaLN_modulation/0"](given).chunk(4, 1)
        y = own["attention_norm1"](x) * (1 + scale_msa.unsqueeze(1))
        q, k, v = own["attention/qkv"](y).chunk(3, -1)
        y = own["attention/out"](rest.scaled_dot_product_attention(q, k, v))
        x = x + gate_msa.tanh().unsqueeze(1) * own["attention_norm2"](y)
        y = own["ffn_norm1"](x) * (1 + scale_mlp.unsqueeze(1))
        y = own["feed_forward/w2"](rest.silu(own["feed_forward/w1"](y)) * own["feed_forward/w3"](y))
        found: torch.Tensor = x + gate_mlp.tanh().unsqueeze(1) * own["ffn_norm2"](y)
        return found


@pytest.mark.parametrize(("family", "places"), [("z-image", 4), ("lumina2", 3)])
def test_norm_gains_and_gated_layers_fold_exactly(family: str, places: int, tmp_path: Path) -> None:
    model = NextDit()
    x, given = inputs(24, 32).view(3, 8, 32), inputs(3, 16)
    with Recorder(model) as recorder, torch.no_grad():
        before = model(x, given)
    recorder.save(tmp_path / "raw")
    found = Calibration.open(tmp_path / "raw")
    renamed = {
        n.replace("own.", "layers.0.").replace("/", "."): found.statistics(n) for n in found.layers
    }
    files.save(tmp_path / "c", renamed)
    make.save(tmp_path / "m", model.tensors())
    known = Knowledge(matches=(Match(families.load(family), None, ""),))
    done = equalized(cq.open(tmp_path / "m"), known, Calibration.open(tmp_path / "c"), Rule())
    assert done.places == places
    for name, tensor in model.own.named_parameters():
        now = done.checkpoint.read(f"layers.0.{name.replace('/', '.')}")
        spared = family == "lumina2" and name == "attention/out.weight"
        folds = name.startswith(("attention/", "feed_forward", "attention_norm1", "ffn_norm1"))
        assert torch.equal(now, tensor) == (spared or not folds)
        tensor.data = now
    with torch.no_grad():
        after = model(x, given)
    assert float((before - after).norm() / before.norm()) < 1e-6


def test_a_silent_channel_gets_an_ordinary_factor() -> None:
    value = torch.tensor([0.0, 1.0, 4.0, 1e30, 16.0]).double()
    for rule in (Rule(), Rule(alpha=0.5)):
        exponents = rule.exponents(value, torch.ones(5).double())
        assert float(exponents[0]) == 0
        assert 0 < float(exponents.abs().amax()) <= 5
    assert bool((Rule().exponents(torch.zeros(3), torch.zeros(3)) == 0).all())


# Folds as data ------------------------------------------------------------------------------------


def test_every_fold_of_a_family_names_layers_that_it_has() -> None:
    having = []
    for name in families.names():
        family = families.load(name)
        for fold in family.folds:
            having.append(name)
            linear = {*fold.consumers, *(() if fold.kind == "norm" else fold.producers)}
            assert linear <= family.layers
    assert "flux1" in having


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "`kind` is one of"),
        ({"kind": "rows", "producers": "a", "consumers": ["b"]}, "`producers` are names"),
        ({"kind": "rows", "producers": ["a.*"], "consumers": ["b"], "rows": "0:K"}, "numbers"),
        ({"kind": "rows", "producers": ["a"], "consumers": ["b"], "rows": "K"}, "`FROM:TO`"),
        ({"kind": "norm", "producers": ["a"], "consumers": ["b"], "rows": "0:K"}, "key `rows`"),
    ],
)
def test_a_fold_that_is_none_is_refused(table: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        folds.parse([table])


def test_folds_are_found_only_where_everything_fits() -> None:
    fold = folds.parse(
        [{"kind": "rows", "producers": ["*.v"], "consumers": ["*.o"], "rows": "0:N"}]
    )
    specs = {f"p.{i}.{n}.weight": TensorSpec("BF16", (8, 8)) for i in range(4) for n in "vo"}
    specs["p.1.v.bias"] = TensorSpec("BF16", (8,))
    specs["p.2.o.weight"] = TensorSpec("I8", (8, 8))
    specs["p.3.o.weight"] = TensorSpec("BF16", (8, 16))
    found = list(folds.find(fold, specs, "p."))
    assert [[s.name for s in one.divided] for one in found] == [
        ["p.0.v.weight"],
        ["p.1.v.weight", "p.1.v.bias"],
    ]


# Words --------------------------------------------------------------------------------------------


def run(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(stdin=io.StringIO(), stdout=out, stderr=err)
    return main.run([*map(str, argv)], terminal), out.getvalue(), err.getvalue()


def test_the_command_says_what_was_done_and_what_was_not(recorded: Path) -> None:
    code, out, err = run(
        "quant", BASE, "--calibration", recorded, "--format", "nvfp4", "--equalize",
        "--bias-correction", "--input-scales", "absmax", "--dry-run", "--json",
    )  # fmt: skip
    assert code == 0, err
    check("plan", json.loads(out))
    code, _, err = run(
        "quant", BASE, "--calibration", recorded, "--format", "nvfp4", "--equalize",
        "--bias-correction", "--input-scales", "absmax", "--dry-run",
    )  # fmt: skip
    assert "12 of 12 layers get an input scale" in err
    assert "the biases of 12 of 12 layers are corrected" in err
    assert "equalized (2 not: has no place for factors)" in err
    assert "merge them first" in err


Settings = Mapping[str, Any]


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"equalize": True, "calibration": None}, UsageError, "there are none"),
        ({"input_scales": "99.9", "format": "nvfp4"}, UsageError, "cannot be chosen by"),
        ({"smoothquant": 1.5, "format": "nvfp4"}, UsageError, "cannot be 1.5"),
        ({"smoothquant": 0.5, "equalize": True}, UsageError, "choose factors for the same"),
        ({"smoothquant": 0.5}, PlanError, "no layer has a place for a smoothing factor"),
        ({"equalize": True}, PlanError, "there is nothing to equalize: of a model of no known"),
        ({"input_scales": "absmax"}, PlanError, "`int8_tensorwise` takes no input scale"),
        ({"bias_correction": True, "only": [BARE]}, PlanError, "has no bias in floats"),
    ],
)
def test_what_cannot_be_done_is_said(
    settings: Settings, kind: type[CqError], said: str, tmp_path: Path
) -> None:
    model, calibration = pair(tmp_path)
    with pytest.raises(kind, match=said) as caught:
        quantized(model, **{"calibration": calibration, **settings})
    assert caught.value.hint and caught.value.exit_code == (2 if kind is UsageError else 4)


def test_a_quantized_checkpoint_is_not_corrected(tmp_path: Path) -> None:
    model, calibration = pair(tmp_path)
    cq.write(quantized(model, calibration), tmp_path / "q")
    with pytest.raises(UsageError, match="starts from unrounded weights"):
        quantized(
            tmp_path / "q", calibration, format="nvfp4", requantize=True, bias_correction=True
        )


@pytest.mark.parametrize("key", ["equalize", "bias_correction", "smoothquant", "input_scales"])
def test_a_manifest_with_ill_typed_uses_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=f"`{key}` cannot be"):
        cq_quant.stage.QuantStage.from_arguments({key: ["x"]})
