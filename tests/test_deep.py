"""`cq analyze --deep`: every candidate's error is what `cq verify` finds in the file it makes."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cq
import cq_analyze
import cq_quant
from cq.cli import main
from cq.cli.output import Terminal
from cq.core.checkpoint import Checkpoint, Piece
from cq.core.errors import PlanError, ResourceError, UsageError
from cq.core.recipe import Rule
from cq_analyze import candidates, chart, measuring, metrics, page, saving
from cq_analyze.deep import Cost, MeasuredLayer, Measurements, measure
from tests import processes
from tests.test_architecture import check

LAYER = "blocks.0.attn"


def opened(path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return cq.open(make.save(path / "in.safetensors", tensors))


def one(path: Path, weight: torch.Tensor, layer: str = LAYER, **asked: Any) -> MeasuredLayer:
    """The measurements of a checkpoint with a single layer."""
    (found,) = measure(opened(path, {f"{layer}.weight": weight}), **asked).layers
    return found


def costs(layer: MeasuredLayer) -> dict[str, Cost]:
    return {cost.candidate.name: cost for cost in layer.costs}


# Errors -----------------------------------------------------------------------------------------


def compare_with_verify(model: Checkpoint, found: Measurements, directory: Path) -> int:
    """Quantize `model` in every way that was measured and compare; the number of comparisons."""
    compared = 0
    for way in found.candidates:
        rules = [
            {"layers": layer.layer, "format": way.format, "scaling": way.scaling}
            | ({} if way.optimizer is None else {"optimizer": way.optimizer})
            for layer in found.layers
            if costs(layer)[way.name].error is not None
        ]
        recipe = [Rule.from_dict(rule, where="a rule") for rule in rules]
        path = directory / "out.safetensors"
        quantized = cq_quant.quantize(model, recipe=recipe, only=[r.pattern for r in recipe])
        cq.write(quantized, path, force=True)
        out = cq.open(path)
        report = cq_analyze.verify(out, against=model)
        told = {layer.layer: layer.fidelity for layer in report.layers}
        for rule in recipe:
            cost = costs(next(x for x in found.layers if x.layer == rule.pattern))[way.name]
            assert cost.error is not None
            error = told.get(rule.pattern)
            if way.optimizer is None:
                name = rule.pattern + ".weight"
                error = metrics.sums(model.read(name), out.read(name))
            assert error is not None, (way.name, rule.pattern)
            assert cost.error.error_energy == pytest.approx(error.error_energy, rel=2e-5, abs=1e-30)
            assert cost.error.sqnr == pytest.approx(error.sqnr, abs=1e-4)
            assert cost.error.cosine == pytest.approx(error.cosine, abs=1e-7)
            assert cost.nbytes == sum(
                spec.nbytes
                for n, spec in out.specs.items()
                if n in {*cost.option.tensors, f"{rule.pattern}.comfy_quant"}
            )
            compared += 1
    return compared


def test_measure_finds_the_error_of_the_file_that_quant_writes(tmp_path: Path) -> None:
    """Odd shapes, several segments, shared scales, rotation, padding and casts among them."""
    tensors = make.model(blocks=1, dtype="F32")
    tensors["blocks.0.odd.weight"] = make.weight(77, 80)
    tensors["blocks.0.large.weight"] = make.weight(2100, 512)  # two segments
    model = opened(tmp_path, tensors)
    found = measure(model)
    assert {way.format for way in found.candidates} >= {"int8_tensorwise", "nvfp4", "mxfp8", "bf16"}
    assert compare_with_verify(model, found, tmp_path) > 60


def test_measure_takes_stacked_experts_one_by_one(tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.experts.down_proj"
    weight = make.weight(3, 128, 64) * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    model = opened(tmp_path, {f"{layer}.weight": weight})
    found = measure(model, formats=["int8_tensorwise", "nvfp4", "convrot_w4a4"])
    assert compare_with_verify(model, found, tmp_path) == 4
    rotated = costs(found.layers[0])["int8_tensorwise+rotation"]
    assert rotated.refused is not None
    assert "no rotation" in rotated.refused


def test_measure_is_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    tensors = make.model(blocks=2)
    tensors["blocks.0.large.weight"] = make.weight(2100, 512, dtype="BF16")
    model = opened(tmp_path, tensors)
    assert measure(model, workers=1).to_dict() == measure(model, workers=4).to_dict()


def test_measure_reads_a_weight_twice_at_most(tmp_path: Path) -> None:
    """Once, and once more for all the candidates together whose scales reach over all rows."""
    reads = 0

    def counted(part: Any) -> Any:
        def produce() -> Iterator[Piece]:
            nonlocal reads
            reads += 1
            return part.produce()

        return replace(part, produce=produce, extent=None)

    model = opened(tmp_path, {f"{LAYER}.weight": make.weight(128, 64)})
    model = replace(model, parts=tuple(map(counted, model.parts)))
    found = measure(model)
    surveying = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise/tensor", "nvfp4"}
    assert surveying <= set(costs(found.layers[0]))
    assert reads == 2


def test_measure_takes_in_a_failing_survey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hands out the segments must not wait for a survey that has failed."""
    from cq.core.formats import nvfp4

    def fail(self: object, segments: object) -> None:
        raise ZeroDivisionError("a bug in a format")

    monkeypatch.setattr(nvfp4.Nvfp4Grid, "survey", fail)
    model = opened(tmp_path, {f"{LAYER}.weight": make.weight(9000, 512)})
    with pytest.raises(ZeroDivisionError):
        measure(model)


def test_measure_keeps_to_the_memory_limit(tmp_path: Path) -> None:
    model = opened(tmp_path, {f"{LAYER}.weight": make.weight(2048, 512)})
    with pytest.raises(ResourceError, match="memory limit"):
        measure(model, memory_limit=1 << 20)


# Layers and candidates --------------------------------------------------------------------------


def test_measure_marks_what_the_plan_advises_against(tmp_path: Path) -> None:
    found = measure(opened(tmp_path, make.model()))
    layers = {layer.layer: layer for layer in found.layers}
    assert {*make.quantized_names(), "img_in", "final_layer.linear"} <= set(layers)
    assert layers["blocks.0.mlp.0"].kept is None
    assert "norm" not in " ".join(layers)
    kept = layers["final_layer.linear"]
    assert kept.kept is not None
    assert all(cost.against for cost in kept.costs if cost.error is not None)
    total = next(t for t in found.totals() if t["candidate"] == "int8_tensorwise")
    assert total["layers"] == len(make.quantized_names())


def test_measure_says_why_a_candidate_is_refused(tmp_path: Path) -> None:
    found = costs(one(tmp_path, make.weight(96, 72)))
    told = {name: cost.refused for name, cost in found.items() if cost.refused is not None}
    assert found["int8_tensorwise"].error is not None
    assert "convrot_w4a4" in told
    assert "72" in str(told["int8_tensorwise+rotation"])


def test_measure_leaves_out_what_is_skipped_and_takes_only_what_is_named(tmp_path: Path) -> None:
    model = opened(tmp_path, make.model(blocks=1))
    assert "blocks.0.mlp.0" not in {x.layer for x in measure(model, skip=["*.mlp.0"]).layers}
    named = measure(model, only=["final_layer.*"]).layers
    assert [layer.layer for layer in named] == ["final_layer.linear"]
    assert costs(named[0])["int8_tensorwise"].against is None


def test_measure_of_a_weight_with_nan_says_so_and_measures_the_others(tmp_path: Path) -> None:
    tensors = make.model(blocks=1)
    tensors["blocks.0.mlp.0.weight"][3, 3] = math.nan
    layers = {x.layer: x for x in measure(opened(tmp_path, tensors)).layers}
    broken = layers["blocks.0.mlp.0"]
    assert broken.broken == "holds values that are not finite"
    assert all(cost.error is None and cost.refused for cost in broken.costs)
    assert costs(layers["blocks.0.mlp.2"])["int8_tensorwise"].error is not None


def test_measure_refuses_a_cast_that_overflows(tmp_path: Path) -> None:
    found = costs(one(tmp_path, make.weight(64, 64) * 1e8))
    assert found["fp16"].refused == "its weight overflows fp16"
    assert found["bf16"].error is not None


def test_measure_offers_casts_for_wide_weights_only(tmp_path: Path) -> None:
    assert "bf16" not in costs(one(tmp_path, make.weight(64, 64, dtype="BF16")))


def test_measure_refuses_what_quant_refuses(tmp_path: Path) -> None:
    model = opened(tmp_path, make.model())
    quantized = cq_quant.quantize(model)
    with pytest.raises(PlanError, match="quantized already"):
        measure(quantized)
    with pytest.raises(PlanError, match="there is no format"):
        measure(model, formats=["nvfp5"])
    with pytest.raises(PlanError, match="no layer"):
        measure(opened(tmp_path, {"norm.weight": make.weight(8)}))


def test_candidates_need_no_list_of_formats() -> None:
    """Every format that a released ComfyUI loads is one, in each scaling, rotated if it can be."""
    names = [way.name for way in candidates.candidates()]
    assert len(set(names)) == len(names)
    assert {"int8_tensorwise", "int8_tensorwise/tensor", "int8_tensorwise+rotation"} <= set(names)
    assert "int8_blockwise" not in names
    assert "int8_blockwise" in [w.name for w in candidates.candidates(allow_custom_loader=True)]


# Outliers ---------------------------------------------------------------------------------------


def test_outliers_of_plain_signs_are_known(tmp_path: Path) -> None:
    signs = torch.ones(64, 64)
    signs[:, ::2] = -1
    found = one(tmp_path, signs).outliers
    assert found == measuring.Outliers(peak=1.0, kurtosis=-2.0, row_spread=1.0, column_spread=1.0)


def test_outliers_tell_rows_from_columns(tmp_path: Path) -> None:
    weight = make.weight(128, 64, seed="flat").clamp(-0.03, 0.03)
    rows, columns = weight.clone(), weight.clone()
    rows[5] *= 10
    columns[:, 5] *= 10
    by_row, by_column = one(tmp_path, rows).outliers, one(tmp_path, columns).outliers
    assert by_row.row_spread == pytest.approx(10, rel=0.1)
    assert by_row.column_spread is not None
    assert by_row.column_spread < 2
    assert by_column.column_spread == pytest.approx(10, rel=0.3)
    assert by_column.kurtosis is not None
    assert by_column.kurtosis > 3


def test_outliers_of_normal_numbers_have_no_excess(tmp_path: Path) -> None:
    weight = torch.randn(2048, 640, generator=make.generator("normal"))  # several segments
    found = one(tmp_path, weight + 3.0, formats=["int8_tensorwise"]).outliers
    assert found.kurtosis == pytest.approx(0, abs=0.02)


def test_outliers_of_zeros_are_no_numbers(tmp_path: Path) -> None:
    layer = one(tmp_path, torch.zeros(64, 64))
    assert set(layer.outliers.to_dict().values()) == {None}
    assert costs(layer)["int8_tensorwise"].noise == 0.0


# The order, the document, the page --------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Measurements:
    return measure(cq.open(processes.BASE))


def test_ordered_puts_the_worst_first(digits: Measurements) -> None:
    def levels(metric: str) -> list[float]:
        found = digits.ordered("nvfp4", metric)
        values = [costs(layer)["nvfp4"].metric(metric) for layer in found]
        assert values[-1] is None, "what is refused comes last"
        return [value for value in values if value is not None]

    assert levels("sqnr") == sorted(levels("sqnr"))
    assert levels("mse") == sorted(levels("mse"), reverse=True)
    sizes = [layer.nbytes for layer in digits.ordered("size")]
    assert sizes == sorted(sizes, reverse=True)
    peaks = [layer.outliers.peak for layer in digits.ordered("peak")]
    assert peaks == sorted(peaks, reverse=True)  # type: ignore[type-var]
    with pytest.raises(UsageError, match="no order `weight`"):
        digits.ordered("weight")


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "input", "path", "line"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(html: str) -> _Seen:
    found = _Seen()
    found.feed(html)
    found.close()
    assert found.open == ["html"] or found.open == []
    return found


def page_of(measured: Measurements) -> str:
    return page.page(cq_analyze.analyze(measured.checkpoint), measured)


def test_page_needs_nothing_else_and_shows_every_layer(digits: Measurements) -> None:
    html = page_of(digits)
    assert html.count(chart.library()) == 1
    html = html.replace(chart.library(), "")
    found = seen(html)
    for layer in digits.layers:
        assert layer.layer in found.text
    for way in digits.candidates:
        assert way.name in found.text
    assert [value for name, value in found.attributes if name == "id"] == ["roles", "depth"]
    assert not [name for name, _ in found.attributes if name in {"src", "href", "onclick"}]
    assert not re.search(r"https?://|url\(|@import", html)
    assert len(html) < 100_000


def test_page_escapes_names_from_the_file(tmp_path: Path) -> None:
    hostile = 'blocks.0.</td></svg><script>alert(1)</script><img src=x onerror="x">&amp;'
    group = "<b>blocks"
    tensors = {
        f"{hostile}.weight": make.weight(64, 64),
        f"{group}.1.x.weight": make.weight(64, 64),
        "blocks.2.\u202e\x1b[31m.weight": make.weight(64, 64),
    }
    html = page_of(measure(opened(tmp_path, tensors), formats=["int8_tensorwise"]))
    found = seen(html.replace(chart.library(), ""))
    assert found.tags.count("script") == 5  # two charts, the library, what draws, what sorts
    assert not {"img", "b"} & set(found.tags)
    assert hostile in found.text
    assert "\x1b" not in html
    assert "\u202e" not in html


def drawn(layers: list[str], *series: chart.Series) -> dict[str, Any]:
    """The figure of a chart, as the browser gets it."""
    found = chart.depth_chart("depth", layers, series)
    assert found is not None
    figure: dict[str, Any] = json.loads(found.figure)
    return figure


def levels_of(name: str, levels: dict[str, float]) -> chart.Series:
    return chart.Series(name=name, points=[chart.Point(*pair) for pair in levels.items()])


def test_a_chart_has_a_line_of_means_and_a_dot_for_each_layer_of_each_series() -> None:
    layers = [f"net.{row}.{i}.{x}" for row in ("double", "single") for i in range(3) for x in "ab"]
    levels = {layer: 20.0 + i * i for i, layer in enumerate(layers)}
    some = dict.fromkeys(layers[2:], 5.0) | {"img_in": 7.0}
    figure = drawn([*layers, "img_in"], levels_of("a", levels), levels_of("b", some))
    line, dots, _, others = figure["data"]
    assert (line["mode"], dots["mode"]) == ("lines", "markers")
    assert sorted(zip(dots["text"], dots["y"], strict=True)) == sorted(levels.items())
    assert dots["x"] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert line["x"] == [1, 2, 3, None, 4, 5, 6], "no line from one row of blocks to the next"
    assert line["y"] == [20.5, 26.5, 40.5, None, 62.5, 92.5, 130.5]
    assert others["x"] == [0, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    axis = figure["layout"]["xaxis"]
    assert axis["ticktext"] == ["outside blocks", "double", "single"]
    assert axis["tickvals"] == [0, 2, 5]


@given(st.lists(st.tuples(st.sampled_from(["a", "b.c", "b", ""]), st.integers(-1, 40)), min_size=1))
def test_rows_of_blocks_lie_side_by_side_and_each_in_its_order(
    places: list[tuple[str, int]],
) -> None:
    layers = ["x" if block < 0 else f"{row}.{block}.x".lstrip(".") for row, block in places]
    found = chart.columns(layers)
    assert sorted(found.values()) == [*range(len(found))]
    assert {chart.place(layer) for layer in layers} == set(found)
    rows = chart.groups(found)
    assert [first for _, first, _ in rows] == [0, *(last + 1 for _, _, last in rows[:-1])]
    for _, first, last in rows:
        within = [where for where, column in found.items() if first <= column <= last]
        assert len({where.row for where in within}) == 1
        assert within == sorted(within)
    for column, number in chart.numbered(found).items():
        assert [where.block for where, at in found.items() if at == column] == [number]


@pytest.mark.parametrize("levels", [{}, {"a.0.b": 7.0}, {"a.0.b": -400.0, "a.1.b": 900.0}])
def test_a_chart_takes_any_levels(levels: dict[str, float]) -> None:
    series = levels_of("x", levels)
    if not levels:
        assert chart.depth_chart("x", ["a.0.b", "a.1.b"], [series]) is None
        return
    low, high = drawn(["a.0.b", "a.1.b"], series)["layout"]["yaxis"]["range"]
    assert low < min(levels.values()) <= max(levels.values()) < high
    assert high - low >= 5, "a tenth of a dB is not drawn as a cliff"


def test_a_bar_is_as_long_as_its_bytes() -> None:
    found = chart.size_chart("x", {"<b>a": 3_000_000, "b": 1_000_000}, "bytes")
    assert found is not None
    (bars,) = json.loads(found.figure)["data"]
    assert bars["x"] == [3_000_000, 1_000_000]
    assert bars["y"] == ["&lt;b&gt;a", "b"]
    assert bars["text"] == ["3.00 MB, 75.0 %", "1.00 MB, 25.0 %"]
    assert chart.size_chart("x", {"a": 0}, "bytes") is None


def test_a_page_without_plotly_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chart, "find_spec", lambda name: None)
    path = tmp_path / "r.html"
    for command in (["analyze", processes.BASE, "--deep"], ["verify", processes.BASE]):
        code, out, err = run(*command, "--report", path)
        assert (code, out) == (5, "")
        assert "there is no `plotly`" in err and "`pip install plotly`" in err
        assert "%" not in err, "no progress"
    assert not path.exists()


def test_page_is_written_whole_and_never_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    saving.save("one", path)
    with pytest.raises(PlanError, match="exists already"):
        saving.save("two", path)
    assert path.read_text() == "one"
    saving.save("two", path, force=True)
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(ResourceError, match="does not exist"):
        saving.save("x", tmp_path / "none" / "r.html")


# The command ------------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str, str]:
    """A command line within this process, which has torch already."""
    terminal = Terminal(stdin=io.StringIO(), stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run([str(word) for word in words], terminal)
    return code, terminal.stdout.getvalue(), terminal.stderr.getvalue()


def test_analyze_deep_tells_as_the_library_does(tmp_path: Path, digits: Measurements) -> None:
    path = tmp_path / "r.html"
    code, out, err = run("analyze", processes.BASE, "--deep", "--json", "--report", path)
    assert (code, err) == (0, "")
    expected = json.loads(json.dumps(digits.to_dict()))
    document = json.loads(out)
    check("analysis", document)
    assert document["deep"] == expected
    assert document["kind"] == "analysis"
    assert path.read_text() == page_of(digits)
    code, out, err = run("analyze", processes.BASE, "--deep", "--report", path)
    assert (code, out) == (4, "")
    assert "exists already" in err


def test_analyze_deep_shows_a_table() -> None:
    words = ("analyze", processes.BASE, "--deep", "--among", "nvfp4")
    code, out, _ = run(*words, "--sort", "size")
    assert code == 0
    assert re.search(r"single_blocks.0.linear1 +917.50 kB +21\.\d\d\n", out)
    assert re.search(r"img_mod.lin +786.43 kB +2\d\.\d\d\*\n", out)
    assert out.index("single_blocks.0.linear1") < out.index("double_blocks.0.img_attn.proj")
    assert "column spread" in run(*words, "--metric", "outliers")[1]


@pytest.mark.slow
def test_analyze_deep_works_as_a_process() -> None:
    told = processes.cq("analyze", processes.BASE, "--deep", "--only", "*.linear1", "-q")
    assert (told.code, told.err) == (0, "")
    assert "single_blocks.1.linear1" in told.out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--metric", "sqnr"], 2, "`--metric` needs `--deep`"),
        (["--report", "x.html"], 2, "`--report` needs `--deep`"),
        (["--deep", "--metric", "psnr"], 2, "no metric `psnr`"),
        (["--deep", "--sort", "nvfp5"], 2, "no order `nvfp5`"),
        (["--deep", "--among", "nvfp5"], 4, "no format `nvfp5`"),
        (["--deep", "--report", "/nowhere/x.html"], 5, "does not exist"),
    ],
)
def test_analyze_refuses_wrong_words_before_it_reads(
    options: list[str], code: int, words: str
) -> None:
    told = run("analyze", processes.BASE, *options)
    assert told[:2] == (code, "")
    assert words in told[2]
    assert "%" not in told[2], "no progress"


def test_page_never_replaces_the_model_it_is_about(tmp_path: Path) -> None:
    model = make.save(tmp_path / "model.safetensors", make.model())
    before = model.read_bytes()
    done = processes.cq("analyze", model, "--deep", "--report", model, "--force")
    assert (done.code, "is the input itself" in done.err) == (4, True)
    assert before == model.read_bytes()


def test_layers_of_any_scale_are_measured(tmp_path: Path) -> None:
    """Squares that float32 cannot hold are neither nothing nor infinite."""
    tensors = {f"blocks.{i}.a.weight": make.weight(128, 128) for i in range(3)}
    tensors["blocks.1.a.weight"] *= 1e-26
    tensors["blocks.2.a.weight"] *= 1e19
    found = measure(cq.open(make.save(tmp_path / "in.safetensors", tensors)))
    for layer in found.layers:
        assert layer.broken is None
        errors = {c.candidate.format: c.error for c in layer.costs if c.error is not None}
        assert 25 < errors["mxfp8"].sqnr < 60


def test_a_format_that_is_no_candidate_cannot_be_asked_for(tmp_path: Path) -> None:
    model = opened(tmp_path, make.model())
    with pytest.raises(PlanError, match="not among the candidates") as caught:
        measure(model, formats=["int8_tensorwise"], only=["blocks.*=nvfp4"])
    assert "--among nvfp4" in (caught.value.hint or "")
