"""`cq verify --calibration`: output errors are those of outputs, by recorded inputs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import make
import pytest
import torch
from test_architecture import check

import cq
import cq_analyze
import cq_quant
from cq.cli import main
from cq.cli.output import Terminal
from cq.core import calibration as files
from cq.core.calibration import Statistics
from cq.core.comfy import MARKER
from cq.core.errors import PlanError, UsageError
from cq.core.stored import stored_layers
from cq.layouts import load

LAYERS = ("blocks.0.mlp.0", "blocks.1.mlp.0", "blocks.2.mlp.0")


def inputs(rows: int, columns: int, seed: object = 0) -> torch.Tensor:
    """Correlated inputs with a mean, of which some channels are larger."""
    mix = torch.randn(8, columns, generator=make.generator("mix", columns))
    rng = make.generator("inputs", rows, columns, seed)
    loud = 1 + 4 * (torch.arange(columns) % 7 == 0)
    value = torch.randn(rows, 8, generator=rng) @ mix + torch.randn(rows, columns, generator=rng)
    return (value + 0.5) * loud


def statistics(rows: torch.Tensor, held: torch.Tensor) -> Statistics:
    """What a recorder of full rank keeps of the rows."""

    def sketch(of: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(of.T.double() @ of.double() / of.shape[0])
        return (vectors * values.clamp(min=0).sqrt()).T.flip(0).float()

    both = torch.cat((rows, held))
    return Statistics(
        diag=rows.square().mean(0),
        sketch=sketch(rows),
        mean=both.mean(0),
        absmax=both.abs().amax(0),
        rows=rows.shape[0],
        held_diag=held.square().mean(0),
        held_sketch=sketch(held),
        held_rows=held.shape[0],
    )


class Case:
    """Three layers of one width in a file, quantized, and the inputs of the first two recorded."""

    def __init__(self, folder: Path) -> None:
        self.weights = {f"{n}.weight": make.weight(64, 64, seed=n) for n in LAYERS}
        self.plain = make.save(folder / "plain.safetensors", self.weights)
        self.held = {name: inputs(40, 64, name) for name in LAYERS[:2]}
        recorded = {n: statistics(inputs(300, 64, (n, 1)), held) for n, held in self.held.items()}
        self.calibration = folder / "c.safetensors"
        files.save(self.calibration, recorded)
        self.quantized = folder / "quantized.safetensors"
        model = cq_quant.quantize(cq.open(self.plain), format="nvfp4", calibration=self.calibration)
        cq.write(model, self.quantized)

    def explicit(self, layer: str) -> float:
        """The error of the layer's output on the inputs held back, row by row."""
        model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
        checkpoint = cq.open(self.quantized)
        stored = stored_layers(checkpoint)[layer]
        tensors = checkpoint.read_many([*stored.names.values(), layer + MARKER])
        here = {name.replace(layer, "0"): tensor for name, tensor in tensors.items()}
        make.save(self.quantized.with_name("one"), here)
        load(model, self.quantized.with_name("one"))
        x, weight = self.held[layer].double(), self.weights[f"{layer}.weight"].double()
        error = model[0].weight.dequantize().double() - weight  # type: ignore[operator]
        return float((x @ error.T).norm() / (x @ weight.T).norm())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("outputs"))


def verified(case: Case, **settings: object) -> cq_analyze.Report:
    return cq_analyze.verify(
        cq.open(case.quantized),
        against=cq.open(case.plain),
        calibration=case.calibration,
        **settings,  # type: ignore[arg-type]
    )


def test_the_output_error_is_that_of_outputs_on_inputs_held_back(case: Case) -> None:
    report = verified(case)
    errors = {x.layer: x.output.relative_error for x in report.layers if x.output}
    assert set(errors) == set(LAYERS[:2])
    for layer, error in errors.items():
        assert error == pytest.approx(case.explicit(layer), rel=5e-3)
    # what the weights alone say is something else
    weights = {x.layer: x.fidelity.relative_error for x in report.layers if x.fidelity}
    assert all(errors[layer] < 0.8 * weights[layer] for layer in errors)
    assert report.fidelity is not None
    worst = [layer.layer for layer, _ in report.fidelity.worst_outputs]
    assert worst == sorted(errors, key=lambda name: -errors[name])
    assert "of 1 layers no inputs were recorded" in report.notes[-1]


def test_the_report_is_the_same_for_any_number_of_workers(case: Case) -> None:
    assert verified(case, workers=1).to_dict() == verified(case, workers=3).to_dict()


def test_equal_weights_have_no_output_error(case: Case) -> None:
    decoded = cq_quant.quantize(cq.open(case.quantized), format="fp32")
    report = cq_analyze.verify(
        cq.open(case.quantized), against=decoded, calibration=case.calibration, max_output_error=0
    )
    assert report.passed
    document = report.to_dict()
    assert document["fidelity"]["output"] == {"layers": 2, "mean_error": None, "worst": []}
    check("verify", document)


def run(*argv: object) -> tuple[int, str]:
    out = io.StringIO()
    terminal = Terminal(stdin=io.StringIO(), stdout=out, stderr=io.StringIO())
    return main.run([*map(str, argv)], terminal), out.getvalue()


def test_the_gate_judges_the_layers_that_were_recorded(case: Case, tmp_path: Path) -> None:
    largest = max(x.output.relative_error for x in verified(case).layers if x.output)
    page = tmp_path / "report.html"
    arguments = ["verify", case.quantized, "--against", case.plain]
    arguments += ["--calibration", case.calibration]
    code, out = run(*arguments, "--max-output-error", largest * 1.01, "--report", page)
    assert code == 0
    assert "worst outputs" in out and "mean of 2 layers" in out
    assert "kept by all 2 layers" in out
    assert "does not follow from a calibration" in out
    assert "output error" in page.read_text()
    code, out = run(*arguments, "--max-output-error", largest * 0.99, "--json")
    document = json.loads(out)
    assert code == 1
    assert document["gates"][0]["name"] == "max_output_error"
    assert [f["value"] for f in document["gates"][0]["failures"]] == [pytest.approx(largest)]
    check("verify", document)


def test_what_cannot_be_judged_is_said(case: Case, tmp_path: Path) -> None:
    here, there = cq.open(case.quantized), cq.open(case.plain)
    with pytest.raises(UsageError, match="`--calibration` needs weights"):
        cq_analyze.verify(here, calibration=case.calibration)
    with pytest.raises(UsageError, match="needs recorded inputs"):
        cq_analyze.verify(here, against=there, max_output_error=0.1)
    other = {"other.layer": statistics(inputs(30, 64), inputs(4, 64))}
    files.save(tmp_path / "other", other)
    with pytest.raises(PlanError, match="for none of the quantized layers"):
        cq_analyze.verify(here, against=there, calibration=tmp_path / "other")
    narrow = {LAYERS[0]: statistics(inputs(30, 32), inputs(4, 32))}
    files.save(tmp_path / "narrow", narrow)
    with pytest.raises(PlanError, match="has 32 input features"):
        cq_analyze.verify(here, against=there, calibration=tmp_path / "narrow")
