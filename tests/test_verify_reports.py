"""What `cq verify` reports beside its findings: roles, what survives of a change, agreement with
comfy-kitchen, and the same as JUnit XML and as a page."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_deep import seen
from test_verify_catalogue import STORING, base, held, stored

from cq.cli import main
from cq.cli.output import Terminal
from cq.core.checkpoint import Checkpoint
from cq.core.errors import PlanError, UsageError
from cq.layouts import kitchen
from cq_analyze import agreement, verify
from cq_analyze.chart import library
from cq_analyze.junit import junit
from cq_analyze.report import Finding, Gate, Layer, Report
from cq_analyze.survival import Survival, survival, together
from cq_analyze.verify_page import verify_page
from cq_quant import quantize
from tests import processes
from tests.test_architecture import check

Tensors = dict[str, torch.Tensor]
LAYER = "blocks.1.mlp.0"


def changed(strength: float, tensors: Tensors) -> Tensors:
    """`tensors` with a low-rank change of their weights, as a LoRA makes."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("mlp.0.weight"):
            rng = make.generator("change", name)
            up = torch.randn(tensor.shape[0], 2, generator=rng)
            down = torch.randn(2, tensor.shape[1], generator=rng)
            found[name] = (tensor.float() + strength * up @ down).to(tensor.dtype)
    return found


# What survives of a change


def test_all_of_a_change_survives_in_eight_bits_and_less_in_four() -> None:
    # In float32, so that the change is not lost before it is quantized.
    origin = {name: tensor.float() for name, tensor in base().items()}
    merged = changed(2e-4, origin)
    shares = {}
    for name in ("int8_tensorwise", "nvfp4"):
        tensors = stored(name, merged)
        report = verify(held(tensors), against=held(merged), base=held(origin))
        assert report.passed and report.fidelity is not None
        whole = report.fidelity.survival
        assert whole is not None and whole.share is not None and whole.snr is not None
        shares[name] = whole.share, whole.snr
        # an independent formula over everything at once
        layers = [f"blocks.{i}.mlp.0" for i in range(5)]
        decoded = [value for layer in layers for value in [_decoded(tensors, layer, name)]]
        d = torch.cat([(merged[f"{x}.weight"] - origin[f"{x}.weight"]).double() for x in layers])
        left = torch.cat(
            [
                v.double() - origin[f"{x}.weight"].double()
                for x, v in zip(layers, decoded, strict=True)
            ]
        )
        assert whole.share == pytest.approx(float((left * d).sum() / (d * d).sum()), rel=1e-5)
        error = float(((left - d) ** 2).sum())
        assert whole.snr == pytest.approx(10 * math.log10(float((d * d).sum()) / error), abs=1e-4)
    assert shares["int8_tensorwise"][0] == pytest.approx(1, abs=0.1)
    assert shares["int8_tensorwise"][1] > shares["nvfp4"][1] + 10


def _decoded(tensors: Tensors, layer: str, format_name: str) -> torch.Tensor:
    from cq.core import catalog
    from cq.core.formats import decode

    own = {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{layer}.") and "bias" not in name
    }
    settings = json.loads(own.pop("comfy_quant").numpy().tobytes())
    return decode(catalog.load("formats", format_name), own, settings)


def test_a_layer_that_did_not_change_has_no_share() -> None:
    origin = base()
    merged = {**origin, f"{LAYER}.weight": changed(1e-2, origin)[f"{LAYER}.weight"]}
    report = verify(held(stored("nvfp4", merged)), against=held(merged), base=held(origin))
    shares = {x.layer: x.survival.share for x in report.layers if x.survival is not None}
    assert len(shares) == 5
    assert [layer for layer, share in shares.items() if share is not None] == [LAYER]
    told = next(x for x in report.layers if x.layer != LAYER).to_dict()["survival"]
    assert told == {"share": None, "snr_db": None}


def test_a_base_without_the_layer_or_of_another_shape_says_nothing() -> None:
    origin = base()
    origin[f"{LAYER}.weight"] = origin[f"{LAYER}.weight"][:64].clone()
    del origin["blocks.2.mlp.0.weight"]
    report = verify(held(stored("int8_tensorwise")), against=held(base()), base=held(origin))
    assert report.passed
    without = [x.layer for x in report.layers if x.survival is None]
    assert without == [LAYER, "blocks.2.mlp.0"]


@given(st.integers(1, 60_000), st.sampled_from([0.0, 0.3, 1.0, 2.0]))
def test_survival_adds_up_over_any_segments(count: int, kept: float) -> None:
    rng = make.generator(count)
    b = torch.randn(count, generator=rng)
    d = torch.randn(count, generator=rng)
    cut = count // 3
    w, v = b + d, b + kept * d
    parts = [survival(b[:cut], w[:cut], v[:cut]), survival(b[cut:], w[cut:], v[cut:])]
    whole = together(parts)
    assert whole.share == pytest.approx(kept, abs=1e-4)
    one = survival(b, w, v)
    assert whole.change_energy == pytest.approx(one.change_energy, rel=1e-12)
    assert whole.kept == pytest.approx(one.kept, rel=1e-9, abs=1e-9)


def test_survival_without_error_is_plain_json() -> None:
    assert Survival(change_energy=1, kept=1).to_dict() == {"share": 1, "snr_db": None}
    assert Survival().to_dict() == {"share": None, "snr_db": None}


def test_a_base_needs_a_reference_and_may_not_be_quantized() -> None:
    quantized, original = held(stored("int8_tensorwise")), held(base())
    with pytest.raises(UsageError, match="`--base` needs"):
        verify(quantized, base=original)
    with pytest.raises(PlanError, match=r"the base .* is quantized itself"):
        verify(quantized, against=original, base=quantized)


# Roles, findings that count


def test_fidelity_is_told_by_role() -> None:
    tensors = base()
    tensors["model.embed_tokens.weight"] = make.weight(64, 64, seed="e")
    quantized = stored("int8_tensorwise", tensors, only=["blocks.*.mlp.*", "model.embed_tokens"])
    report = verify(held(quantized), against=held(tensors))
    assert report.fidelity is not None
    assert list(report.fidelity.roles) == ["embedding", "linear"]
    assert report.fidelity.roles["embedding"].count == 64 * 64
    whole = report.fidelity.overall.count
    assert sum(sums.count for sums in report.fidelity.roles.values()) == whole


def test_fail_on_lets_only_the_named_findings_count() -> None:
    tensors = stored("int8_tensorwise")
    del tensors[f"{LAYER}.weight_scale"]
    broken = held(tensors)
    assert not verify(broken).passed
    assert not verify(broken, fail_on=["scale.*"]).passed
    assert not verify(broken, fail_on=["marker.missing", "scale.missing"]).passed
    other = verify(broken, fail_on=["marker.*"])
    assert other.passed and [f.name for f in other.findings] == ["scale.missing"]
    with pytest.raises(UsageError, match=r"there is no finding `scale\.mising`") as failed:
        verify(broken, fail_on=["scale.mising"])
    assert "`scale.missing`" in (failed.value.hint or "")


# comfy-kitchen


@pytest.mark.parametrize("format_name", STORING)
def test_comfy_kitchen_sees_the_same_values_and_is_heard_when_it_does_not(
    format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make.weight(384, 512, seed="k")
    tensors = stored(format_name, {f"{LAYER}.weight": weight}, only=[LAYER])
    seen_rows: list[int] = []
    see = agreement.Agreement.see

    def counted(self: Any, packed: Any, start: int, beside: Any, value: torch.Tensor) -> None:
        seen_rows.append(value.shape[0])
        see(self, packed, start, beside, value)

    monkeypatch.setattr(agreement.Agreement, "see", counted)
    report = verify(held(tensors))
    assert report.findings == () and report.kitchen == agreement.version() is not None
    if not kitchen.has_twin(format_name):
        assert format_name == "int8_blockwise"
        assert seen_rows == []
        return
    assert sum(seen_rows) >= 384
    twin = kitchen.twin

    class Off:
        def __init__(self, weight: Any) -> None:
            self._value = twin(weight).dequantize()

        def dequantize(self) -> torch.Tensor:
            self._value.reshape(-1)[3] += 1
            return self._value

    monkeypatch.setattr(kitchen, "twin", Off)
    (found,) = verify(held(tensors)).findings
    assert (found.name, found.layer) == ("kitchen.disagrees", LAYER)
    assert "differ by up to 1," in found.sentence

    def refuse(weight: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(kitchen, "twin", refuse)
    (found,) = verify(held(tensors)).findings
    assert "cannot be decoded by comfy-kitchen: RuntimeError: no kernel" in found.sentence
    with kitchen.left_out():
        report = verify(held(tensors))
        assert report.passed and report.kitchen is None


def test_comfy_kitchen_decodes_segments_with_their_own_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weight of several segments and of rows that differ much: a scale off by one would show."""
    weight = make.weight(2944, 1024, seed="s") * torch.logspace(-2, 2, 2944)[:, None]
    starts: dict[str, set[int]] = {}
    compared: dict[str, int] = Counter()
    wants, see = agreement.Agreement.wants, agreement.Agreement.see

    def noted(self: Any, start: int, rows: int) -> bool:
        starts.setdefault(self._stored.format.name, set()).add(start)
        return wants(self, start, rows)

    def counted(self: Any, *args: Any) -> None:
        compared[self._stored.format.name] += 1
        see(self, *args)

    monkeypatch.setattr(agreement.Agreement, "wants", noted)
    monkeypatch.setattr(agreement.Agreement, "see", counted)
    for format_name in STORING:
        tensors = stored(format_name, {f"{LAYER}.weight": weight}, only=[LAYER], scale_search=False)
        assert verify(held(tensors)).findings == (), format_name
    segmented = {name for name, found in starts.items() if len(found) > 2}
    assert {"int8_tensorwise", "nvfp4", "mxfp8", "convrot_w4a4"} <= segmented
    assert all(compared[name] == 2 for name in segmented if kitchen.has_twin(name))


def test_segments_that_are_not_compared_are_decoded_to_the_same_but_for_the_order_of_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make.weight(2944, 1024, seed="s") * torch.logspace(-2, 2, 2944)[:, None]
    tensors = stored("int8_tensorwise", {f"{LAYER}.weight": weight}, only=[LAYER], rotate="256")
    against = held({f"{LAYER}.weight": weight})
    near = verify(held(tensors), against=against).fidelity
    monkeypatch.setattr(agreement.Agreement, "wants", lambda *_: True)
    exact = verify(held(tensors), against=against).fidelity
    assert near is not None and exact is not None
    assert near.overall.sqnr == pytest.approx(exact.overall.sqnr, abs=1e-4)
    assert near.overall.max_abs_error == pytest.approx(exact.overall.max_abs_error, rel=1e-4)


@pytest.mark.slow
def test_the_command_decodes_with_comfy_kitchen_too(tmp_path: Path) -> None:
    path = make.save(tmp_path / "q.safetensors", stored("nvfp4"))
    told = json.loads(processes.cq("verify", path, "--json", CQ_KITCHEN="1").out)
    assert told["passed"] and told["kitchen"] == agreement.version() is not None


# JUnit


def report_of(checkpoint: Checkpoint, **asked: Any) -> Report:
    return verify(checkpoint, against=held(base()), **asked)


def test_junit_has_a_case_for_each_layer_and_each_gate() -> None:
    tensors = stored("int8_tensorwise")
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"].reshape(-1)
    tensors["blocks.3.mlp.0.bias"] = tensors["blocks.3.mlp.0.bias"] * torch.inf
    report = report_of(held(tensors), min_sqnr=20, max_error=1e-6)
    root = ElementTree.fromstring(junit(report))
    (suite,) = root.findall("testsuite")
    cases = {(c.get("classname"), c.get("name")): c for c in suite.findall("testcase")}
    assert ("cq.verify.file", "the file as a whole") in cases
    assert sum(kind == "cq.verify.layer" for kind, _ in cases) == 5
    broken = cases["cq.verify.layer", LAYER].findall("failure")
    missed = ["gate.min_sqnr", "gate.max_error"]  # it cannot be measured
    assert [f.get("type") for f in broken] == ["scale.shape", *missed]
    assert "what to do" in (broken[0].get("message") or "")
    high = cases["cq.verify.layer", "blocks.0.mlp.0"].findall("failure")
    assert [f.get("type") for f in high] == ["gate.max_error"]
    assert cases["cq.verify.gate", "min_sqnr 20"].find("failure") is not None
    measured = cases["cq.verify.layer", "blocks.2.mlp.0"].findall("failure")
    assert [f.get("type") for f in measured] == ["gate.max_error"]
    assert cases["cq.verify.gate", "max_error 1e-06"].find("failure") is not None
    assert cases["cq.verify.tensor", "blocks.3.mlp.0.bias"].find("failure") is not None
    failing = sum(case.find("failure") is not None for case in cases.values())
    for element in (root, suite):
        assert element.get("tests") == str(len(cases))
        assert element.get("failures") == str(failing)


def test_junit_of_findings_that_do_not_count_passes() -> None:
    tensors = stored("int8_tensorwise")
    del tensors[f"{LAYER}.weight_scale"]
    root = ElementTree.fromstring(junit(report_of(held(tensors), fail_on=["marker.*"])))
    assert root.get("failures") == "0"
    assert "scale.missing" in (root.findtext(".//system-out") or "")


@given(st.text(), st.text())
def test_junit_is_xml_whatever_names_are(name: str, sentence: str) -> None:
    layer = Layer(layer=name, role="linear", format=None, settings={}, weight=None, nbytes=0)
    found = Finding(name="scale.shape", layer=name, sentence=sentence, mend=sentence)
    gate = Gate(name="min_sqnr", limit=1, measured=1, failures=((name, -math.inf),))
    report = Report(checkpoint=sentence, layers=(layer,), findings=(found,), gates=(gate,))
    root = ElementTree.fromstring(junit(report))
    assert len(root.findall(".//failure")) == 3


# The page


def hostile() -> Report:
    """A report whose names try to get out of the page."""
    evil = "</script><script>alert(1)</script><b>x</b>%{y}\u202e\x1b[31m"
    evil += "<img src=http://x/y.png onerror=z>"
    report = report_of(held(stored("int8_tensorwise")), min_sqnr=99)
    layers = tuple(dataclasses.replace(layer, layer=evil + layer.layer) for layer in report.layers)
    found = Finding(name="scale.shape", layer=evil, sentence=evil, mend=evil)
    history = {"sources": [{"name": evil}, 3], "stages": [{"op": evil, "x": [evil]}, "?"]}
    return dataclasses.replace(
        report,
        checkpoint=evil,
        layers=layers,
        findings=(found,),
        notes=(evil,),
        history=history,
    )


def test_the_page_is_sound_html_that_fetches_nothing() -> None:
    report = report_of(held(stored("int8_tensorwise")), min_sqnr=99)
    html = verify_page(report)
    assert html.count(library()) == 1
    html = html.replace(library(), "")
    found = seen(html)
    assert not re.search(r"https?://|url\(|@import", html)
    for part in ("Error by depth and role", "Worst layers", "Size by format", "Fidelity by role"):
        assert f"<h2>{part}</h2>" in html
    assert [value for name, value in found.attributes if name == "id"] == ["formats", "depth"]
    assert "did not pass" in html and "min_sqnr 99" in html


def test_a_page_without_charts_has_no_library() -> None:
    html = verify_page(Report(notes=("nothing was looked at",)))
    assert library() not in html and len(html) < 10_000


def test_no_name_gets_out_of_the_page() -> None:
    html = verify_page(hostile()).replace(library(), "")
    found = seen(html)
    assert found.tags.count("script") == 5  # two charts, the library, what draws, what sorts
    assert "<img" not in html and "\x1b" not in html and "\u202e" not in html


def test_the_page_shows_where_the_file_comes_from(tmp_path: Path) -> None:
    import cq

    origin = cq.open(make.save(tmp_path / "origin.safetensors", base()))
    cq.write(quantize(origin, optimizer="rtn", only=["blocks.*.mlp.*"]), tmp_path / "q.safetensors")
    report = verify(cq.open(tmp_path / "q.safetensors"))
    html = verify_page(report)
    assert "made of origin.safetensors" in html
    assert "quant: " in html and "int8_tensorwise" in html
    assert report.history is not None and report.history["stages"][0]["op"] == "quant"
    assert verify(cq.open(tmp_path / "q.safetensors"), header_only=True).history is None


def run(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = main.run([*map(str, argv)], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return code, out.getvalue(), err.getvalue()


def test_the_command_writes_all_reports(tmp_path: Path) -> None:
    origin = {name: tensor.float() for name, tensor in base().items()}
    merged = changed(1e-3, origin)
    broken = stored("int8_tensorwise", merged)
    broken["img_in.weight"] = broken["img_in.weight"] * 1.25
    files = {"q": broken, "m": merged, "o": origin}
    q, m, o = (make.save(tmp_path / f"{k}.safetensors", v) for k, v in files.items())
    page, xml = tmp_path / "r.html", tmp_path / "r.xml"
    given = ["verify", q, "--against", m, "--base", o]
    code, out, err = run(*given, "--report", page, "--junit", xml)
    assert code == 0, err + out
    assert re.search(r"all 5 layers that changed +9\d\.\d %|100\.\d %", out)
    assert "`img_in.weight` F32, relative error 0.25" in out and "max error" in out
    assert "change kept" in page.read_text() and ElementTree.parse(xml).getroot().tag
    code, out, _ = run(*given, "--json")
    document = json.loads(out)
    check("verify", document)
    assert document["base"] == str(o) and document["layers"][0]["survival"]["share"] > 0.5
    code, _, err = run(*given, "--report", q, "--force")
    assert code == 2 and "is an input" in err
    assert q.read_bytes()[8:9] == b"{"
