"""The HTML pages of `--report` in a real browser: drawn, quiet, offline, on any screen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import make
import pytest
from test_verify_catalogue import held, stored
from test_verify_reports import hostile, report_of

import cq
from cq_analyze import analyze, measure
from cq_analyze.page import page
from cq_analyze.verify_page import verify_page
from tests import browser
from tests.browser import Visit

pytestmark = pytest.mark.slow

FORMATS = ["int8_tensorwise", "nvfp4"]

# How a person uses a chart: points at a dot, clicks on a name, and sorts the table.
_USED = """
const rest = ms => new Promise(go => setTimeout(go, ms));
const chart = document.getElementById('depth');
const dots = [...chart.querySelectorAll('.point')];
const labels = [];
for (const dot of [dots[0], dots.at(-1)]) {
    const box = dot.getBoundingClientRect();
    const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true};
    for (const kind of ['mouseover', 'mousemove'])
        chart.querySelector('.nsewdrag').dispatchEvent(new MouseEvent(kind, at));
    await rest(150);
    labels.push(chart.querySelector('.hovertext text').textContent);
}
const table = [...document.querySelectorAll('.sortable')].at(-1);
const first = () => table.tBodies[0].rows[0].cells[0].textContent;
const before = first();
table.tHead.rows[0].cells[0].click(); table.tHead.rows[0].cells[0].click();
Plotly.restyle(chart, {visible: 'legendonly'}, [0, 1]);
return {
    labels, dots: dots.length,
    after: chart.querySelectorAll('.point').length,
    bars: document.querySelectorAll('.chart:not(#depth) .point').length,
    names: [...chart.querySelectorAll('.legendtext')].map(one => one.textContent),
    rows: [...chart.querySelectorAll('.xtick')].map(one => one.textContent),
    sorted: before !== first(),
    links: document.querySelectorAll('a[href], svg a').length,
};
"""

# What would be cut off, run over the edge, or be unreadable.
_LOOKED = """
const ink = () => getComputedStyle(document.querySelector('#depth .xtick text')).fill;
const outside = [...document.querySelectorAll('.chart')].flatMap(chart => {
    const edge = chart.getBoundingClientRect();
    return [...chart.querySelectorAll('.main-svg text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < edge.left - 1 || box.right > edge.right + 1
            || box.top < edge.top - 1 || box.bottom > edge.bottom + 1;
    }).map(text => text.textContent);
});
const overlaps = ['.xtick text', '.x2tick text', '.ytick text'].flatMap(kind => {
    const texts = [...document.querySelectorAll('#depth ' + kind)];
    const boxes = texts.map(text => text.getBoundingClientRect());
    return boxes.filter((a, i) => boxes.some((b, j) => j > i && a.left < b.right - 1
        && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)).map(() => kind);
});
const screen = ink();
dispatchEvent(new Event('beforeprint'));
const paper = [ink(), document.querySelector('#depth svg').getBoundingClientRect().width];
dispatchEvent(new Event('afterprint'));
await new Promise(go => setTimeout(go, 200));
return {
    outside, overlaps, screen, paper, again: ink(),
    back: getComputedStyle(document.body).backgroundColor,
    wide: document.documentElement.scrollWidth,
};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both pages, and one with names that try to get out."""
    directory = tmp_path_factory.mktemp("pages")
    rows = {"noise_refiner": 2, "context_refiner": 2, "layers": 30}  # as crowded as Z-Image's
    layers = ["x_embedder", *(f"{row}.{i}.w1" for row, n in rows.items() for i in range(n))]
    tensors = {f"{layer}.weight": make.weight(64, 64, seed=layer) for layer in layers}
    model = cq.open(make.save(directory / "in.safetensors", tensors))
    texts = {
        "deep": page(analyze(model), measure(model, formats=FORMATS)),
        "verify": verify_page(report_of(held(stored("nvfp4")), min_sqnr=99)),
        "hostile": verify_page(hostile()),
    }
    for name, text in texts.items():
        (directory / f"{name}.html").write_text(text)
    return {name: directory / f"{name}.html" for name in texts}


def test_pages_are_drawn_without_a_word_or_a_request(pages: dict[str, Path]) -> None:
    visits = [Visit(str(path), _USED) for path in pages.values()]
    found = dict(zip(pages, browser.open_pages(visits), strict=True))
    for name, opened in found.items():
        assert opened.console == [], name
        assert opened.fetched == [pages[name].as_uri()]
        assert opened.result["sorted"] and opened.result["links"] == 0
        assert opened.result["after"] < opened.result["dots"]
    deep, verify = found["deep"].result, found["verify"].result
    model = measure(cq.open(pages["deep"].with_name("in.safetensors")), formats=FORMATS)
    sound = [cost for layer in model.layers for cost in layer.costs if cost.error is not None]
    assert deep["dots"] == len(sound) > 30
    assert deep["names"] == [way.name for way in model.candidates]
    assert deep["rows"] == ["outside blocks", "context_refiner", "layers", "noise_refiner"]
    assert verify["dots"] == 5 and verify["bars"] == 2
    assert [label.split("linear: ")[0] for label in verify["labels"]] == [
        "blocks.0.mlp.0",
        "blocks.4.mlp.0",
    ]
    assert "dBnvfp4, 18.44 kB, relative error 0.0" in verify["labels"][0]
    assert "Error by depth and role" in found["verify"].text
    # Nothing in a name is taken for a tag, or for something to be filled in.
    label = found["hostile"].result["labels"][0]
    assert label.startswith("</script><script>alert(1)</script><b>x</b>%{y}")
    assert "<img src=http://x/y.png onerror=z>blocks.0.mlp.0linear: " in label


def test_pages_fit_a_narrow_dark_screen_and_white_paper(pages: dict[str, Path]) -> None:
    visits = [Visit(str(pages[n]), _LOOKED, width=500, dark=True) for n in ("deep", "verify")]
    for opened in browser.open_pages(visits):
        looked = opened.result
        assert opened.console == []
        assert (looked["outside"], looked["overlaps"]) == ([], [])
        assert looked["wide"] <= 500
        assert looked["back"] == "rgb(21, 24, 27)"
        assert looked["screen"] == looked["again"] == "rgb(154, 160, 166)"
        assert looked["paper"] == ["rgb(85, 85, 85)", 900]


@pytest.mark.skipif(browser.missing() is not None, reason=browser.missing() or "")
def test_a_browser_without_its_shared_libraries_skips_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "libnss3.so: cannot open shared object file"
    (tmp_path / "PyQt6").mkdir()
    (tmp_path / "PyQt6" / "__init__.py").write_text(f"raise ImportError({why!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=why):
        browser.open_pages([Visit("x.html")])


def test_commands_that_make_no_page_never_import_plotly() -> None:
    code = (
        "import sys, cq_analyze.cli.analyze, cq_analyze.cli.verify, cq_analyze.page,"
        " cq_analyze.verify_page\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('plotly', 'narwhals')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
