"""Optimizers with a calibration: what is stored loses less on inputs that nobody rounded for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from test_architecture import check

import cq
import cq_quant
from cq.calibration import Recorder
from cq.core import calibration as files
from cq.core import catalog, rotation
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.formats import decode
from cq.core.moment import Moment
from cq_quant.guidance import opened_lora, parse_setting
from cq_quant.optimizers import Rounded, Task
from cq_quant.stage import QuantStage
from cq_quant.tally import Tally
from tests.processes import cq as command

LAYER, OTHER = "blocks.0.mlp.0", "blocks.0.mlp.2"
GRIDS = tuple(
    (name, scaling)
    for name in catalog.names("formats")
    for scaling in catalog.load("formats", name).scalings
    if not catalog.load("formats", name).casts
)
CALIBRATES = tuple(
    name for name in catalog.names("optimizers") if catalog.load("optimizers", name).calibrates
)


def inputs(rows: int, columns: int, seed: object = 0) -> torch.Tensor:
    """Correlated inputs of one distribution, other rows for another seed."""
    mix = torch.randn(24, columns, generator=make.generator("mix", columns))
    rng = make.generator("inputs", rows, columns, seed)
    return torch.randn(rows, 24, generator=rng) @ mix / 4 + 0.3 * torch.randn(
        rows, columns, generator=rng
    )


def moment(value: torch.Tensor, rank: int = 64) -> Moment:
    values, vectors = torch.linalg.eigh(value.T @ value / value.shape[0])
    sketch = (vectors * values.clamp(min=0).sqrt()).T.flip(0)[:rank]
    return Moment.of(value.square().mean(0), sketch, value.shape[0])


def task(shape: tuple[int, int], told: list[Rounded] | None = None, **settings: Any) -> Task:
    own = {"moment": moment(inputs(1024, shape[1])), "held": moment(inputs(512, shape[1], 1))}
    tell = (told if told is not None else []).append
    return Task(shape=shape, rows=lambda: iter(()), **{**own, "tell": tell, **settings})


def rounded(
    optimizer: str, name: str, scaling: str, weight: torch.Tensor, given: Task | None
) -> torch.Tensor:
    """The levels that an optimizer chooses; without a task as it works without calibration."""
    plug = catalog.load("optimizers", optimizer)
    grid = catalog.load("formats", name).grid(TensorSpec("F32", tuple(weight.shape)), scaling)
    shared = dict(grid.survey([weight])) if grid.surveys else {}
    fit = plug.fit if given is None else plug.prepare(given)
    codes, own = fit(weight, grid, shared, search=True)
    return grid.values(codes, {**shared, **own})


def relative(levels: torch.Tensor, weight: torch.Tensor, value: torch.Tensor) -> float:
    return float((value @ (levels - weight).T).norm() / (value @ weight.T).norm())


@pytest.mark.parametrize(("name", "scaling"), GRIDS)
@pytest.mark.parametrize("optimizer", CALIBRATES)
def test_calibration_lowers_the_error_on_inputs_that_were_never_seen(
    optimizer: str, name: str, scaling: str
) -> None:
    """On no row is the held-back loss above nearest rounding's."""
    weight, unseen = make.weight(256, 256), inputs(512, 256, "unseen")
    told: list[Rounded] = []
    given = task((256, 256), told)
    levels = rounded(optimizer, name, scaling, weight, given)
    plain = rounded("rtn", name, scaling, weight, None)
    assert relative(levels, weight, unseen) < 0.62 * relative(plain, weight, unseen)
    assert given.held is not None
    held, before = given.held.loss(levels - weight), given.held.loss(plain - weight)
    assert bool((held <= before * (1 + 1e-5)).all())
    assert told[0].rows == 256
    assert told[0].kept == pytest.approx(float(held.sum()), rel=1e-3)
    assert told[0].nearest == pytest.approx(float(before.sum()), rel=1e-3)


@pytest.mark.parametrize("name", ["int8_tensorwise", "nvfp4", "convrot_w4a4"])
def test_learned_refines_what_ldlq_found(name: str) -> None:
    scaling = catalog.load("formats", name).scalings[0]
    weight, unseen = make.weight(256, 256), inputs(512, 256, "unseen")
    ldlq, learned = (
        relative(rounded(o, name, scaling, weight, task((256, 256))), weight, unseen)
        for o in ("gptq", "learned")
    )
    assert learned < ldlq * (1.005 if name == "int8_tensorwise" else 1.0)


@pytest.mark.parametrize(("name", "scaling"), GRIDS)
def test_rows_that_gain_nothing_keep_nearest_rounding(name: str, scaling: str) -> None:
    """A calibration of noise alone that is judged by another: codes and scales are nearest's."""
    weight = make.weight(128, 256)
    noise = torch.randn(40, 256, generator=make.generator("noise"))
    white = Moment(rest=torch.ones(256), sketch=torch.zeros(0, 256), rows=10**6)
    told: list[Rounded] = []
    given = task((128, 256), told, moment=moment(noise, 40), held=white)
    found = rounded("gptq", name, scaling, weight, given)
    plain = rounded("rtn", name, scaling, weight, None)
    errors = [(levels - weight).square().sum(1) for levels in (found, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
    kept = (found == plain).all(1)
    assert int(kept.sum()) >= 128 - told[0].taken
    assert told[0].taken < 40


@pytest.mark.parametrize("optimizer", ["gptq", "quip"])
@pytest.mark.parametrize(("name", "scaling"), GRIDS)
def test_without_calibration_codes_are_nearest(optimizer: str, name: str, scaling: str) -> None:
    weight = make.weight(128, 256)
    plain = Task(shape=(128, 256), rows=lambda: iter([weight]))
    plug = catalog.load("optimizers", optimizer)
    assert plug.note is not None and "nearest" in plug.note
    levels = rounded(optimizer, name, scaling, weight, plain)
    assert make.same(levels, rounded("rtn", name, scaling, weight, None))


@pytest.mark.parametrize("name", ["int8_tensorwise", "nvfp4"])
def test_learned_without_calibration_lowers_the_loss_that_it_states(name: str) -> None:
    """The error along the weight's leading directions, in every row."""
    weight = make.weight(128, 96) @ make.weight(96, 256, seed=1) + make.weight(128, 256)
    given = Task(shape=(128, 256), rows=lambda: iter(weight.split(64)), seed=3)
    scaling = catalog.load("formats", name).scalings[0]
    levels = rounded("learned", name, scaling, weight, given)
    plain = rounded("rtn", name, scaling, weight, None)
    leading = torch.linalg.svd(weight)[2][:48]
    before, after = (((x - weight) @ leading.T).norm() for x in (plain, levels))
    assert float(after) < 0.9 * float(before)
    again = rounded("learned", name, scaling, weight, given)
    assert make.same(levels, again)


def test_the_fewer_the_rows_the_more_they_are_damped() -> None:
    from cq_quant.optimizers import _feedback

    few, usual, many = (moment(inputs(rows, 64)) for rows in (100, 256, 4096))
    found = [_feedback.damping(each, {}) for each in (few, usual, many)]
    assert found == [_feedback.DAMP_FEW, _feedback.DAMP, _feedback.DAMP_MANY]
    assert found == sorted(found, reverse=True)
    assert _feedback.damping(few, {"damp": 0.7}) == 0.7


# Through the stage --------------------------------------------------------------------------------


def mlp(weights: dict[str, torch.Tensor]) -> Any:
    """A model with the two layers of a checkpoint's MLP."""
    model, block = torch.nn.Module(), torch.nn.Module()
    block.mlp = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)
    )
    model.blocks = torch.nn.ModuleList([block])
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.safetensors`, `nested.safetensors` with a prefix, and `calib.safetensors`."""
    found = tmp_path_factory.mktemp("calibrated")
    weights = {
        f"{LAYER}.weight": make.weight(512, 256),
        f"{LAYER}.bias": make.weight(512),
        f"{OTHER}.weight": make.weight(256, 512),
        f"{OTHER}.bias": make.weight(256),
    }
    make.save(found / "model.safetensors", weights)
    nested = {f"model.diffusion_model.{n}": t for n, t in weights.items()}
    make.save(found / "nested.safetensors", nested)
    model = mlp(weights)
    with Recorder(model, rank=64, held_rank=32) as recorder, torch.no_grad():
        for seed in range(3):
            model.blocks[0].mlp(inputs(1000, 256, seed))
    recorder.save(found / "calib.safetensors")
    return found


def quantized(directory: Path, source: str = "model", **settings: Any) -> Checkpoint:
    if settings.pop("calibrated", True):
        settings["calibration"] = directory / "calib.safetensors"
    return cq_quant.quantize(cq.open(directory / f"{source}.safetensors"), only=["*"], **settings)


def stored(model: Checkpoint, path: Path, **how: Any) -> dict[str, torch.Tensor]:
    cq.write(model, path, force=True, **how)
    return make.load(path)


@pytest.mark.parametrize("format_name", ["int8_tensorwise", "nvfp4", "convrot_w4a4"])
def test_stored_layers_lose_less(format_name: str, directory: Path, tmp_path: Path) -> None:
    """Of the file itself, decoded: rotated layers in the basis that they are stored in."""
    plug, value = catalog.load("formats", format_name), inputs(500, 256, "unseen")
    weight = make.weight(512, 256)
    errors = []
    for calibrated in (True, False):
        tensors = stored(
            quantized(directory, format=format_name, calibrated=calibrated), tmp_path / "out"
        )
        own = {n.removeprefix(f"{LAYER}."): t for n, t in tensors.items() if n.startswith(LAYER)}
        marker = json.loads(bytes(own.pop("comfy_quant").tolist()))
        own.pop("bias")
        errors.append(relative(decode(plug, own, marker), weight, value))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("format_name", ["int8_tensorwise", "nvfp4"])
def test_workers_resuming_and_manifests_change_nothing(
    format_name: str, directory: Path, tmp_path: Path
) -> None:
    model = quantized(directory, format=format_name)
    one = stored(model, tmp_path / "a", workers=1)
    two = stored(quantized(directory, format=format_name), tmp_path / "b", workers=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stage = model.stages[-1]
    again = QuantStage.from_arguments(json.loads(json.dumps(stage.arguments())))
    assert again == stage
    three = stored(again.apply(cq.open(directory / "model.safetensors")), tmp_path / "c")
    assert all(make.same(one[n], two[n]) and make.same(one[n], three[n]) for n in one)


def test_bfloat16_stands_in_the_manifest_and_in_the_placements(
    directory: Path, tmp_path: Path
) -> None:
    plain, narrow = quantized(directory), quantized(directory, bf16=True)
    assert "bf16" not in plain.stages[-1].arguments()
    again = QuantStage.from_arguments(json.loads(json.dumps(narrow.stages[-1].arguments())))
    assert again == narrow.stages[-1]
    dtypes = [part.work.dtype for part in narrow.parts if part.work is not None]
    assert dtypes == ["bfloat16"] * 2
    files = []
    for name, model in (("plain", plain), ("narrow", narrow)):
        cq.write(model, tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    again_applied = again.apply(cq.open(directory / "model.safetensors"))
    cq.write(again_applied, tmp_path / "again")
    assert files[0] != files[1] == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize(
    "settings", [{"calibrated": False}, {"optimizer": "rtn", "bias_correction": True}]
)
def test_bfloat16_is_refused_where_nothing_is_guided(
    settings: dict[str, Any], directory: Path
) -> None:
    with pytest.raises(UsageError, match="rounding by a calibration"):
        quantized(directory, bf16=True, **settings)


def test_bfloat16_is_chosen_for_a_gpu_that_is_named() -> None:
    from cq_quant.where import in_bf16

    for device, auto in (("cpu", False), ("auto", False), ("cuda", None), ("cuda:1", None)):
        assert in_bf16("auto", device) is auto
        assert in_bf16("on", device) is True
        assert in_bf16("off", device) is False


@pytest.mark.parametrize(
    ("settings", "narrow"),
    [
        ({}, True),
        ({"calibrated": False}, False),
        ({"optimizer": "rtn", "bias_correction": True}, False),
    ],
)
def test_bfloat16_if_of_use(settings: dict[str, Any], narrow: bool, directory: Path) -> None:
    model = quantized(directory, bf16=None, **settings)
    assert ("bf16" in model.stages[-1].arguments()) == narrow


def test_a_command_for_a_gpu_needs_no_word_of_bfloat16(directory: Path, tmp_path: Path) -> None:
    done = command(
        "quant", directory / "model.safetensors", "--only", "*", "--optimizer", "rtn",
        "--calibration", directory / "calib.safetensors", "--bias-correction", "--device", "cuda",
        "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err


def test_a_prefix_does_not_matter(directory: Path, tmp_path: Path) -> None:
    plain = stored(quantized(directory), tmp_path / "a")
    nested = stored(quantized(directory, "nested"), tmp_path / "b")
    for name, tensor in plain.items():
        assert make.same(tensor, nested[f"model.diffusion_model.{name}"])


def test_rows_are_cut_as_the_source_is(directory: Path, tmp_path: Path) -> None:
    """Several segments are rounded together, and still come as segments."""
    weight = make.weight(6144, 512)
    make.save(tmp_path / "m", {f"{OTHER}.weight": weight})
    model = cq_quant.quantize(
        cq.open(tmp_path / "m"), only=["*"], calibration=directory / "calib.safetensors"
    )
    before = [p.start for p in cq.open(tmp_path / "m").pieces(f"{OTHER}.weight")]
    assert len(before) > 2
    assert [p.start for p in model.pieces(f"{OTHER}.weight")] == before
    assert model.part(f"{OTHER}.weight").nbytes_peak > 24 * weight.numel()


def test_stacked_experts_share_the_moment(directory: Path, tmp_path: Path) -> None:
    layer, found = "blocks.0.mlp.experts.gate_up_proj", {}
    one = files.Calibration.open(directory / "calib.safetensors").statistics(LAYER)
    files.save(tmp_path / "c", {layer: one})
    experts = torch.stack([make.weight(128, 256, seed=i) for i in range(3)])
    for name, tensor in (("all", experts), ("one", experts[1])):
        make.save(tmp_path / "m", {f"{layer}.weight": tensor})
        model = cq_quant.quantize(
            cq.open(tmp_path / "m"), only=["*"], format="nvfp4", calibration=tmp_path / "c"
        )
        found[name] = stored(model, tmp_path / "out")
        (outcome,) = model.outcomes
        assert outcome.to_dict()["layers"][0]["rows"] == tensor.numel() // 256
    for name in ("weight", "weight_scale", "weight_scale_2"):
        assert make.same(
            found["all"][f"{layer}.{name}"][1].contiguous(), found["one"][f"{layer}.{name}"]
        )


def test_layers_that_were_not_recorded_are_rounded_to_nearest(
    directory: Path, tmp_path: Path
) -> None:
    files.save(
        tmp_path / "part",
        {LAYER: files.Calibration.open(directory / "calib.safetensors").statistics(LAYER)},
    )
    model = quantized(directory, calibrated=False, calibration=tmp_path / "part")
    notes = {note["layer"]: note for note in model.notes if note["action"] == "quantize"}
    assert notes[LAYER]["calibration"] == LAYER
    assert notes[LAYER]["note"] is None
    assert "calibration" not in notes[OTHER]
    assert "nearest" in notes[OTHER]["note"]
    some, none = (
        stored(model, tmp_path / "a"),
        stored(quantized(directory, calibrated=False), tmp_path / "b"),
    )
    assert make.same(some[f"{OTHER}.weight"], none[f"{OTHER}.weight"])
    assert not make.same(some[f"{LAYER}.weight"], none[f"{LAYER}.weight"])


def test_gptq_is_the_default_where_the_basis_is_the_original(directory: Path) -> None:
    for settings, expected in (
        ({"format": "nvfp4"}, "gptq"),
        ({"rotate": "off"}, "gptq"),
        ({}, "quip"),
        ({"format": "nvfp4", "calibrated": False}, "rtn"),
    ):
        model = quantized(directory, **settings)
        assert {n["optimizer"] for n in model.notes if n["action"] == "quantize"} == {expected}


def test_arguments_without_guidance_are_as_they_were(directory: Path) -> None:
    arguments = quantized(directory, calibrated=False).stages[-1].arguments()
    assert not {"calibration", "calibration_loras", "settings", "seed"} & set(arguments)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"calibration": "none.safetensors"}, InputError, "none.safetensors"),
        ({"calibration": "model.safetensors"}, InputError, "is not a calibration"),
        ({"optimizer": "rtn"}, PlanError, "guides none of the 2 layers"),
        ({"format": "bf16"}, PlanError, "guides none"),
        ({"settings": {"quip.dump": 1}}, UsageError, "no setting `quip.dump`"),
        ({"settings": {"quip.damp": 0}}, UsageError, "cannot be 0"),
        ({"settings": {"learned.passes": 1.5}}, UsageError, "cannot be 1.5"),
        ({"settings": {"gptq.damp": 1}}, UsageError, "no layer is rounded by `gptq`"),
        ({"settings": {"quip.damp": 1}, "calibrated": False}, UsageError, "only with a calib"),
        ({"calibration_loras": ["model.safetensors"], "calibrated": False}, UsageError, "adds to"),
        ({"calibration_loras": ["model.safetensors"]}, PlanError, "no layer that is calibrated"),
        ({"calibration_loras": ["model.safetensors:-1"]}, UsageError, "is not a weight"),
        ({"seed": -1}, UsageError, "is not a seed"),
    ],
)
def test_what_cannot_guide_is_said(
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(directory)
    settings = dict(settings)
    if "calibration" in settings:
        settings["calibrated"] = False
    with pytest.raises(error, match=message):
        quantized(directory, **settings)


@pytest.mark.parametrize(
    ("layers", "message", "hint"),
    [
        ({"blocks.9.mlp.7": (256,)}, "is for none of the layers", "did you mean"),
        ({LAYER: (128,)}, "has 128 input features", "another model"),
    ],
)
def test_a_calibration_of_another_model_is_refused(
    layers: dict[str, tuple[int]], message: str, hint: str, directory: Path, tmp_path: Path
) -> None:
    one = files.Calibration.open(directory / "calib.safetensors").statistics(LAYER)
    for name, (columns,) in layers.items():
        cut = {
            key: getattr(one, key)[..., :columns]
            for key in ("diag", "sketch", "mean", "absmax", "held_diag", "held_sketch")
        }
        files.save(
            tmp_path / "c",
            {name: files.Statistics(**cut, rows=one.rows, held_rows=one.held_rows)},
        )
    with pytest.raises(PlanError, match=message) as caught:
        quantized(directory, calibrated=False, calibration=tmp_path / "c")
    assert hint in (caught.value.hint or "")


def test_settings_are_parsed_and_matter(directory: Path, tmp_path: Path) -> None:
    assert parse_setting("learned.passes=3") == ("learned.passes", 3.0)
    for wrong in ("quip.damp", "quip.damp=x", "damp=1", "quip.damp=nan"):
        with pytest.raises(UsageError):
            parse_setting(wrong)
    plain, damped = (
        stored(quantized(directory, settings=settings), tmp_path / "out")
        for settings in ({}, {"quip.damp": 50.0})
    )
    assert not make.same(plain[f"{LAYER}.weight"], damped[f"{LAYER}.weight"])


def test_what_a_lora_reads_is_rounded_for(directory: Path, tmp_path: Path) -> None:
    """Directions in which the recorded inputs are weak."""
    rng = make.generator("lora")
    down = torch.randn(4, 256, generator=rng)
    tensors = {
        f"lora_unet_{LAYER.replace('.', '_')}.lora_down.weight": down,
        f"lora_unet_{LAYER.replace('.', '_')}.lora_up.weight": torch.zeros(512, 4),
        f"lora_unet_{LAYER.replace('.', '_')}.alpha": torch.tensor(4.0),
    }
    make.save(tmp_path / "lora.safetensors", tensors)
    assert opened_lora(f"{tmp_path}/lora.safetensors:8").weight == 8
    weight, read = make.weight(512, 256), []
    for loras in ([], [f"{tmp_path}/lora.safetensors:8"]):
        model = quantized(directory, format="nvfp4", calibration_loras=loras)
        tensors = stored(model, tmp_path / "out")
        own = {n.removeprefix(f"{LAYER}."): t for n, t in tensors.items() if n.startswith(LAYER)}
        own.pop("bias"), own.pop("comfy_quant")
        error = decode(catalog.load("formats", "nvfp4"), own, {}) - weight
        read.append(float((down @ error.T).norm()))
        arguments = json.loads(json.dumps(model.stages[-1].arguments()))
        assert QuantStage.from_arguments(arguments) == model.stages[-1]
    assert read[1] < 0.7 * read[0]


def test_the_command_says_what_the_calibration_does(directory: Path, tmp_path: Path) -> None:
    source, out = directory / "model.safetensors", tmp_path / "out.safetensors"
    calibrated = ("--calibration", directory / "calib.safetensors", "--only", "*")
    told = command("quant", source, *calibrated, "-o", tmp_path / "other.safetensors").err
    assert "the calibration guides all 2 layers" in told
    assert "by inputs held back, calibration leaves 0." in told
    done = command("quant", source, *calibrated, "--set", "quip.damp=0.1", "--json", "-o", out)
    document = json.loads(done.out)
    check("plan", document)
    (outcome,) = document["outcomes"]
    assert outcome["expected"] == 2
    assert [layer["rows"] for layer in outcome["layers"]] == [512, 256]
    assert all(layer["error"] < 0.9 for layer in outcome["layers"])
    history = json.loads(make.metadata(out)["cq.history"])
    assert history["stages"][0]["calibration"]["name"] == "calib.safetensors"
    assert history["stages"][0]["settings"] == {"quip.damp": 0.1}


def test_a_run_that_went_on_says_how_many_layers_it_computed() -> None:
    """A layer that is computed again counts once."""
    tally = Tally()
    tally.expect(["a", "b", "c"])
    assert tally.remarks() == []
    for _ in range(2):
        tally.begin("b")(Rounded(rows=8, taken=6, nearest=4.0, kept=1.0))
    (remark,) = tally.remarks()
    assert "leaves 0.50 of nearest rounding's output error" in remark
    assert "2 of 8 rows keep nearest rounding" in remark
    assert remark.endswith("1 of 3 layers were computed in this run")


def test_a_rotation_of_weights_and_moment_is_one(directory: Path) -> None:
    """The loss of an error is the same in both bases, but for the rest's correlations."""
    found = moment(inputs(4000, 256))
    even = Moment(rest=torch.full((256,), 0.1), sketch=found.sketch, rows=4000)
    error = make.weight(8, 256)
    turned = rotation.rotate(error, 64)
    assert torch.allclose(even.rotated(64).loss(turned), even.loss(error), rtol=1e-4)
