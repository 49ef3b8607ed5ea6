"""`cq verify --images`: the metrics are those of independent formulas, and what cannot be compared
is a finding."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import uniform_filter

from cq.cli import main
from cq.cli.output import Terminal
from cq.core.errors import InputError, ResourceError, UsageError
from cq_analyze import images
from cq_analyze.images import compare_images, contact_sheet
from tests.test_architecture import check

Pixels = np.ndarray[Any, Any]


def pixels(height: int = 40, width: int = 60, seed: int = 0) -> Pixels:
    y, x = np.mgrid[0:height, 0:width]
    wave = np.stack([x * 4 % 256, y * 5 % 256, (x + y) * 2 % 256], 2)
    noise = np.random.default_rng(seed).integers(0, 9, wave.shape)
    return np.clip(wave + noise, 0, 255).astype("uint8")


def save(path: Path, values: Pixels, **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(values).save(path, **options)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with two pairs: an equal one and one that differs."""
    for directory in ("a", "b"):
        save(tmp_path / directory / "2.png", pixels())
    save(tmp_path / "a" / "10.png", pixels(seed=1))
    save(tmp_path / "b" / "10.png", pixels(seed=2))
    return tmp_path / "a", tmp_path / "b"


def ssim(a: Pixels, b: Pixels) -> float:
    """The formula of Wang et al. with a 7 x 7 window, channel by channel."""
    found = []
    for x, y in zip(*(np.moveaxis(v.astype(float), 2, 0) for v in (a, b)), strict=True):
        ux, uy = uniform_filter(x, 7), uniform_filter(y, 7)
        unbiased = 49 / 48
        vx = unbiased * (uniform_filter(x * x, 7) - ux * ux)
        vy = unbiased * (uniform_filter(y * y, 7) - uy * uy)
        vxy = unbiased * (uniform_filter(x * y, 7) - ux * uy)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        s = (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
        found.append(s[3:-3, 3:-3].mean())
    return float(np.mean(found))


def test_pairs_are_compared_by_name_in_natural_order(pair: tuple[Path, Path]) -> None:
    found = compare_images(*pair)
    assert [p.name for p in found.pictures] == ["2.png", "10.png"]
    assert found.findings == ()
    equal, other = found.pictures
    assert math.isinf(equal.psnr) and equal.ssim == 1.0 and equal.to_dict()["equal"]
    a, b = pixels(seed=1), pixels(seed=2)
    error = sum((int(x) - int(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / a.size
    assert other.psnr == pytest.approx(10 * math.log10(255**2 / error))
    assert other.ssim == pytest.approx(ssim(a, b), abs=1e-9)
    assert (other.width, other.height) == (60, 40)
    assert [p.name for p in found.worst] == ["10.png", "2.png"]
    assert found.mean_psnr == other.psnr


def test_what_cannot_be_compared_is_a_finding(pair: tuple[Path, Path]) -> None:
    left, right = pair
    save(left / "only-a.png", pixels())
    save(right / "only-b.png", pixels())
    save(left / "size.png", pixels(40, 60))
    save(right / "size.png", pixels(40, 61))
    (left / "text.png").write_text("hello")
    save(right / "text.png", pixels())
    save(left / "cut.png", pixels())
    (right / "cut.png").write_bytes((left / "cut.png").read_bytes()[:300])
    (left / "notes.txt").write_text("no picture")
    found = compare_images(left, right)
    assert [(f.name, f.layer) for f in found.findings] == [
        ("images.unreadable", "cut.png"),
        ("images.missing", "only-a.png"),
        ("images.missing", "only-b.png"),
        ("images.shape", "size.png"),
        ("images.unreadable", "text.png"),
    ]
    assert f"is not in `{right}`" in found.findings[1].sentence
    assert "60x40 in the reference, 61x40" in found.findings[3].sentence
    assert len(found.pictures) == 2


def test_pictures_of_other_modes_are_compared_as_rgb(tmp_path: Path) -> None:
    grey = pixels()[:, :, 0]
    save(tmp_path / "a" / "g.png", grey)
    save(tmp_path / "b" / "g.png", np.stack([grey] * 3, 2))
    save(tmp_path / "a" / "tiny.png", pixels(3, 3))
    save(tmp_path / "b" / "tiny.png", pixels(3, 3))
    found = compare_images(tmp_path / "a", tmp_path / "b")
    assert [math.isinf(p.psnr) for p in found.pictures] == [True, True]
    assert found.pictures[1].ssim is None


def test_a_directory_without_pictures_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.png", pixels())
    with pytest.raises(InputError, match="cannot be listed: no such file"):
        compare_images(tmp_path / "a", tmp_path / "none")
    with pytest.raises(InputError, match="cannot be listed: not a directory"):
        compare_images(tmp_path / "a" / "x.png", tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no picture in"):
        compare_images(tmp_path / "empty", tmp_path / "a")


def test_without_its_packages_the_comparison_says_what_to_install(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None if name == "skimage" else name)
    with pytest.raises(ResourceError, match="there is no `skimage`") as failed:
        compare_images(*pair)
    assert "pip install pillow" in (failed.value.hint or "")


def test_the_contact_sheet_has_a_row_for_each_pair(pair: tuple[Path, Path]) -> None:
    sheet = Image.open(io.BytesIO(contact_sheet(compare_images(*pair))))
    assert sheet.size == (3 * 60, 2 * (40 + 18))
    shown = np.asarray(sheet)
    worst = shown[18 : 18 + 40]
    assert np.array_equal(worst[:, :60], pixels(seed=1))
    assert np.array_equal(worst[:, 60:120], pixels(seed=2))
    apart = np.abs(pixels(seed=1).astype(int) - pixels(seed=2))
    assert np.array_equal(worst[:, 120:], np.minimum(255, 8 * apart))
    assert not shown[-40:, 120:].any()  # no difference, no light


def _lpips(monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    """A package as `lpips` is: a distance of two pictures in [-1, 1], NCHW."""

    class Model:
        def __init__(self, *, net: str, verbose: bool) -> None:
            if not loads:
                raise RuntimeError("weights cannot be fetched")

        def eval(self) -> Model:
            return self

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == (1, 3, 40, 60) and float(a.min()) >= -1 and float(a.max()) <= 1
            return (a - b).abs().mean().reshape(1, 1, 1, 1)

    module = types.ModuleType("lpips")
    module.LPIPS = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)


def test_lpips_is_told_where_its_package_is(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [p.lpips for p in compare_images(*pair).pictures] == [None, None]
    _lpips(monkeypatch, loads=True)
    equal, other = compare_images(*pair).pictures
    apart = np.abs(pixels(seed=1).astype(float) - pixels(seed=2)).mean() / 127.5
    assert equal.lpips == 0 and other.lpips == pytest.approx(apart, rel=1e-5)
    _lpips(monkeypatch, loads=False)
    found = compare_images(*pair)
    assert found.notes == ("LPIPS is installed, but cannot be used: weights cannot be fetched",)
    assert found.pictures[1].lpips is None


def run(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = main.run([*map(str, argv)], Terminal(stdin=io.StringIO(), stdout=out, stderr=err))
    return code, out.getvalue(), err.getvalue()


def test_the_command_compares_and_gates(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    code, out, _ = run("verify", "--images", *pair, "--contact-sheet", sheet, "--min-psnr", 20)
    assert code == 0 and "kept by all 2 pictures" in out
    assert contact_sheet(compare_images(*pair)) == sheet.read_bytes()
    code, out, _ = run("verify", "--images", *pair, "--min-psnr", 60, "--json")
    document = json.loads(out)
    check("verify", document)
    assert code == 1 and not document["passed"]
    (gate,) = document["gates"]
    assert [f["layer"] for f in gate["failures"]] == ["10.png"]
    save(pair[0] / "more.png", pixels())
    code, out, _ = run("verify", "--images", *pair)
    assert code == 1 and "images.missing: `more.png` is not in" in out
    code, out, _ = run("verify", "--images", *pair, "--fail-on", "scale.*")
    assert code == 0 and "does not count" in out


def test_reports_replace_nothing_without_force(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sheet = tmp_path / "s.png"
    sheet.write_bytes(b"mine")
    code, _, err = run("verify", "--images", *pair, "--contact-sheet", sheet)
    assert code == 4 and "exists already" in err and sheet.read_bytes() == b"mine"
    assert run("verify", "--images", *pair, "--contact-sheet", sheet, "--force")[0] == 0
    code, _, err = run(
        "verify", "--images", *pair, "--report", tmp_path / "x", "--junit", tmp_path / "x"
    )
    assert code == 2 and "one file" in err


def test_a_limit_must_be_a_number(pair: tuple[Path, Path]) -> None:
    code, _, err = run("verify", "--images", *pair, "--min-psnr", "nan")
    assert code == UsageError.exit_code and "`--min-psnr` cannot be nan" in err
