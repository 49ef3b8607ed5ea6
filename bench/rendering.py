"""The bench's measurements as a page and as JSON. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from bench.jobs import FORMATS, YARDSTICK, Job
from bench.measuring import Bench, Model, Quality, Sample

DISTURBED_CORES = 0.15  # other processes used more than this: the wall time is an upper bound
FORMAT_FACTOR = 3  # a format may take so many times as long as plain int8 rows
MB = 1e6
MIB = 1 << 20
LEGEND = (
    f"`!`: other processes kept more than {DISTURBED_CORES} cores busy (median), so its wall time",
    "is an upper bound. `-`: not measured, or too little time beyond start-up to tell.",
)


def to_markdown(bench: Bench, facts: Mapping[str, Any]) -> str:
    """The report as a page."""
    lines = ["# Results", "", f"Measured by `python -m bench.bench` on {facts['date']}:", ""]
    lines += [
        f"* {facts['cores']} cores, {facts['cpu']}; {facts['memory_gib']} GiB; {facts['system']},"
        f" {facts['file_system']}; load before it {facts['load_before']}",
        f"* Python {facts['python']}, torch {facts['torch']}, cq {facts['cq']};"
        f" peer: {facts['peer'] or 'none'}",
        f"* medians of {bench.runs} runs (peer: {bench.peer_runs}), minimum to maximum in brackets",
    ]
    for model in bench.models:
        lines += ["", f"## {model.label}", "", *_model_table(bench, model)]
    lines += ["", *LEGEND]
    lines += ["", "## Aims", "", *table(("figure", "measured", "aim"), _aims(bench))]
    lines += ["", "## Start-up", "", *_startup_table(bench)]
    lines += ["", "## The commands", ""]
    lines += [f"* {job.name}: `{job.text}`" for job in bench.jobs]
    if bench.missing:
        lines += ["", "## Not measured", ""]
        lines += [f"* {what}: {why}" for what, why in bench.missing.items()]
    return "\n".join(lines) + "\n"


def _model_table(bench: Bench, model: Model) -> list[str]:
    titles = ("command", "wall s", "beyond start-up s", "CPU s", "peak RSS MiB", "MB/s", "of cp")
    rows = []
    for job in bench.jobs:
        found = bench.samples.get((job.name, model.path))
        if not found:
            continue
        beyond = bench.beyond_startup(job.name, model)
        quality = bench.qualities.get((job.name, model.path))
        disturbed = median(s.others for s in found) > DISTURBED_CORES
        rival = bench.ratio(job.rival, job.name, model) if job.rival else None
        rows.append(
            (
                job.name,
                _spread(s.wall for s in found) + (" !" if disturbed else ""),
                number(beyond),
                number(median(s.cpu for s in found)),
                _rss(found),
                number(model.nbytes / MB / beyond if beyond else None, 0),
                number(bench.ratio("cp", job.name, model)),
                number(_of_yardstick(bench, job, model)),
                number(rival, 1),
                _decibels(quality),
                str(quality.layers) if quality else "-",
            )
        )
    return table((*titles, "int8 rows", "x peer", "SQNR dB, mean / min", "layers"), rows)


def _of_yardstick(bench: Bench, job: Job, model: Model) -> float | None:
    return bench.ratio(job.name, YARDSTICK, model) if FORMATS in job.sets else None


def _startup_table(bench: Bench) -> list[str]:
    rows = [
        (name, _spread((s.wall for s in found), 3), number(median(s.rss for s in found) / MIB, 0))
        for name, found in bench.startup.items()
    ]
    for job in bench.jobs:
        if found := bench.samples.get((job.name, bench.tiny.path)):
            rss = number(median(s.rss for s in found) / MIB, 0)
            rows.append((f"{job.name}, on {bench.tiny.label}", _spread(s.wall for s in found), rss))
    return table(("command", "wall s", "peak RSS MiB"), rows)


def _aims(bench: Bench) -> list[tuple[str, str, str]]:
    rows = [row for model in bench.models for row in _aims_of_speed(bench, model)]
    largest, smallest = bench.models[-1], bench.models[0]
    for name in ("quant rtn", "quant quip", "merge | quant rtn", "merge | quant quip"):
        peak = bench.peak(name, largest)
        if peak is None:
            continue
        title = f"peak RSS of {name}, {largest.label}, MB"
        grown = peak - (bench.peak(name, smallest) or peak)
        change = "" if largest is smallest else f" ({grown / MB:+.0f} from {smallest.label})"
        rows.append((title, f"{peak / MB:.0f}{change}", "< 700, flat"))
    for name in ("cq --help", "cq verify --help"):
        if found := bench.startup.get(name):
            rows.append((f"{name}, s", number(median(s.wall for s in found)), "< 0.25"))
    return rows


def _aims_of_speed(bench: Bench, model: Model) -> Iterable[tuple[str, str, str]]:
    """The aims that a model's times decide, of the jobs that were to be measured."""
    asked = {job.name: job for job in bench.jobs}
    for name in ("quant rtn", "quant quip"):
        if name in asked:
            of_cp, of_peer = bench.ratio("cp", name, model), bench.ratio("peer", name, model)
            yield f"{name}, {model.label}, of cp", number(of_cp), "≥ 0.25"
            if "ctq" in bench.programs:
                yield f"{name}, {model.label}, x peer", number(of_peer, 1), "≥ 10"
    for name in ("rtn", "quip"):
        fused, alone = f"merge | quant {name}", f"quant {name}"
        if fused in asked and alone in asked:
            yield from _over(bench, fused, alone, model, "< 1.3")
    for name, job in asked.items():
        if FORMATS in job.sets and name.startswith("quant ") and name != YARDSTICK:
            yield from _over(bench, name, YARDSTICK, model, f"≤ {FORMAT_FACTOR}")
            if job.rival and "ctq" in bench.programs:
                times = bench.ratio(job.rival, name, model)
                yield f"{name}, {model.label}, x {job.rival}", number(times, 1), "≥ 10"


def _over(
    bench: Bench, name: str, other: str, model: Model, aim: str
) -> Iterable[tuple[str, str, str]]:
    """How many times as long one command takes as another: as a user waits for them, which is what
    is aimed at, and of what grows with the model."""
    walls = bench.wall(name, model), bench.wall(other, model)
    factor = walls[0] / walls[1] if walls[0] and walls[1] else None
    yield f"{name} over {other}, whole commands, {model.label}", number(factor), aim
    beyond = bench.ratio(name, other, model)
    yield f"the same beyond start-up, {model.label}", number(beyond), "-"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of Markdown, the first column words and the others figures."""
    cells = [titles, ["---"] + ["--:"] * (len(titles) - 1), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]


def number(value: float | None, digits: int = 2) -> str:
    """A figure; `-` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(values: Iterable[float], digits: int = 2) -> str:
    found = sorted(values)
    middle = number(median(found), digits)
    if len(found) == 1:
        return middle
    return f"{middle} ({number(found[0], digits)} to {number(found[-1], digits)})"


def _rss(found: Sequence[Sample]) -> str:
    largest, together = (median(getattr(s, n) for s in found) / MIB for n in ("rss", "rss_sum"))
    return f"{largest:.0f}" + (f" (sum {together:.0f})" if together > largest else "")


def _decibels(quality: Quality | None) -> str:
    if quality is None:
        return "-"
    findings = f" ({quality.findings} findings)" if quality.findings else ""
    return f"{number(quality.mean_db, 1)} / {number(quality.min_db, 1)}{findings}"


def to_json(bench: Bench, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Every single measurement, for a program."""
    measured = []
    for job in bench.jobs:
        for model in (bench.tiny, *bench.models):
            quality = bench.qualities.get((job.name, model.path))
            measured.append(
                {
                    "job": job.name,
                    "model": model.path.name,
                    "nbytes": model.nbytes,
                    "startup": model is bench.tiny,
                    "beyond_startup": bench.beyond_startup(job.name, model),
                    "samples": [asdict(s) for s in bench.samples.get((job.name, model.path), ())],
                    "quality": asdict(quality) if quality else None,
                }
            )
    return {
        "bench": 1,
        "facts": dict(facts),
        "commands": {job.name: job.text for job in (*bench.jobs, *bench.startup_jobs)},
        "measured": measured,
        "startup": {name: [asdict(s) for s in found] for name, found in bench.startup.items()},
        "not_measured": bench.missing,
    }
