"""The parts of the bench that reason: which commands it times, and the figures it derives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import make
import pytest
import torch

from bench import bench as command
from bench.jobs import FORMATS, JOBS, STARTUP, YARDSTICK, chosen
from bench.measuring import Bench, Model, Sample
from bench.quality import GAUSSIAN, HEAVY, REAL_HEAVY, Measured, aims, nvfp4_bound, sqnr, synthetic
from bench.rendering import to_json, to_markdown
from cq.core import catalog
from tests.golden import kitchen

PLUGS = {n: p for n in catalog.names("formats") if not (p := catalog.load("formats", n)).casts}


def sample(wall: float) -> Sample:
    return Sample(wall=wall, cpu=wall, rss=1 << 28, rss_sum=1 << 28, others=0.0)


@pytest.fixture
def measured(tmp_path: Path) -> Bench:
    """A bench with made-up times: 1 s of start-up, then what a job's place in the list says."""
    models = []
    for name, size in (("tiny", 10), ("large", 10_000_000)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes(size))
        models.append(Model(path, path))
    tiny, large = models
    jobs = chosen(JOBS, [FORMATS])
    bench = Bench(
        programs={"ctq": "ctq"},
        tiny=tiny,
        models=[large],
        scratch=tmp_path,
        peer_sizes=frozenset(),
        runs=3,
        peer_runs=1,
        verify=False,
        jobs=jobs,
        startup_jobs=(),
    )
    for job in jobs:
        bench.samples[job.name, tiny.path] = [sample(1.0)] * 3
        beyond = {YARDSTICK: 2.0, "quant nvfp4": 5.0, "peer nvfp4": 50.0}.get(job.name, 4.0)
        bench.samples[job.name, large.path] = [sample(1 + beyond + d) for d in (0.5, 0, -0.1)]
    return bench


@pytest.mark.parametrize("name", sorted(PLUGS))
def test_jobs_time_every_storage_format_at_its_defaults(name: str) -> None:
    texts = [job.text.split() for job in chosen(JOBS, [FORMATS]) if not job.peer]
    mine = [t for t in texts if "--format" in t and t[t.index("--format") + 1] == name]
    if name == "int8_tensorwise":
        mine = [t for t in texts if t[:2] == ["cq", "quant"] and "--format" not in t]
    assert [t for t in mine if "--no-scale-search" not in t], f"no job times `{name}`"
    custom = PLUGS[name].first_comfyui is None
    assert all(("--allow-custom-loader" in t) == custom for t in mine)


def test_chosen_takes_names_and_sets() -> None:
    assert chosen(JOBS, []) == JOBS
    names = [job.name for job in chosen(JOBS, [FORMATS])]
    assert {"cp", YARDSTICK, "quant nvfp4", "peer mxfp8"} <= set(names)
    assert "merge" not in names
    assert [job.name for job in chosen(STARTUP, ["cq verify*"])] == ["cq verify --help"]


def test_patterns_that_choose_nothing_are_refused() -> None:
    with pytest.raises(command.argparse.ArgumentTypeError, match="`nothing` matches none"):
        command.patterns_of("quant nvfp4,nothing")


def test_ratio_leaves_out_start_up(measured: Bench) -> None:
    (large,) = measured.models
    assert measured.ratio("quant nvfp4", YARDSTICK, large) == pytest.approx(5 / 2)
    assert measured.ratio("peer nvfp4", "quant nvfp4", large) == pytest.approx(50 / 5)


def test_page_compares_formats_with_int8_rows_and_with_their_own_peer(measured: Bench) -> None:
    facts: dict[str, Any] = dict.fromkeys(
        ("date", "cores", "cpu", "memory_gib", "system", "file_system", "load_before", "python",
         "torch", "cq", "peer"),
        "x",
    )  # fmt: skip
    page = to_markdown(measured, facts)
    assert "| quant nvfp4 over quant rtn, whole commands, 0.01 GB | 2.00 | ≤ 3 |" in page
    assert "| the same beyond start-up, 0.01 GB | 2.50 | - |" in page
    assert "| quant nvfp4, 0.01 GB, x peer nvfp4 | 10.0 | ≥ 10 |" in page
    assert "merge" not in page
    document = to_json(measured, facts)
    found = {m["job"]: m["beyond_startup"] for m in document["measured"] if not m["startup"]}
    assert found["quant nvfp4"] == pytest.approx(5.0)


def test_sqnr_is_in_decibels() -> None:
    weight = torch.full((4, 4), 10.0)
    assert sqnr(weight, weight + 1) == pytest.approx(20.0)
    assert sqnr(weight, weight) == math.inf


def test_nvfp4_bound_is_above_kitchen_and_reached_by_what_needs_one_scale() -> None:
    weight = make.weight(64, 64)
    stored = kitchen.quantize("nvfp4", weight, {})
    plain = sqnr(weight, kitchen.dequantize("nvfp4", stored, {}, (64, 64)))
    assert plain < nvfp4_bound(weight) < plain + 3
    exact = torch.tensor([0.5, 1.0, 2.0, 6.0] * 16).view(4, 16) * 448
    assert nvfp4_bound(exact) > 100


def test_aims_are_missed_where_they_are_missed() -> None:
    def judged(gain: float, group: str = HEAVY, name: str = "convrot_w4a4") -> dict[str, str]:
        layers = [
            Measured(
                format=name,
                group=group,
                layer="a",
                default=20 + gain,
                plain=20.0,
                kitchen=20.0,
            )
        ]
        return {title: held for title, *_, held in aims(layers)}

    assert set(judged(1.7).values()) == {"yes"}
    assert list(judged(1.5).values()) == ["yes", "yes", "**no**"]
    assert set(judged(-0.1).values()) == {"**no**"}
    assert list(judged(1.21, REAL_HEAVY, "nvfp4").values()) == ["yes", "yes", "yes"]
    assert list(judged(1.19, REAL_HEAVY, "nvfp4").values()) == ["yes", "yes", "**no**"]


def test_synthetic_layers_are_the_same_each_time_and_as_heavy_as_they_say() -> None:
    first, second = synthetic(), synthetic()
    for title, weight in first.items():
        assert torch.equal(weight, second[title])
        kurtosis = float((weight / weight.std()).double().pow(4).mean())
        assert (kurtosis > 4) == (title != GAUSSIAN), title
