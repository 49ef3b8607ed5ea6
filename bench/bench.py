"""Time `cq` against `cp` of the same file and against the peer `convert-to-quant`, in one run.

Every command is a real process, or a pipeline of them, measured by what the system says of it. The
rounds go through all commands in turn, so that a slow minute of the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
MAKE_MODEL = ROOT / "bench" / "make_model.py"
TINY_HIDDEN = 128  # a model so small that a command on it is all start-up
STARTUP_RUNS = 10
LOST_IN_STARTUP = 0.05  # of start-up: less time than that beyond it is noise
DISTURBED_CORES = 0.15  # other processes used more than this: the wall time is an upper bound
MB = 1e6
LEGEND = (
    f"`!`: other processes kept more than {DISTURBED_CORES} cores busy (median), so its wall time",
    "is an upper bound. `-`: not measured, or too little time beyond start-up to tell.",
)
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command to time, as one would type it: `|` and `&&` mean what they mean in a shell.

    `reference` is what its output is measured against: the `model`, the model `merged`, or nothing.
    """

    name: str
    text: str
    reference: str = ""
    peer: bool = False

    def steps(
        self, places: Mapping[str, str], programs: Mapping[str, str]
    ) -> list[list[list[str]]]:
        """The pipelines to run in sequence, each a list of argument lists."""
        steps = []
        for step in self.text.split(" && "):
            commands = [shlex.split(command) for command in step.split(" | ")]
            steps.append(
                [
                    [programs.get(words[0], words[0]), *(w.format(**places) for w in words[1:])]
                    for words in commands
                ]
            )
        return steps


_RTN = "--optimizer rtn -o {out} --force -q"
_QUIP = "--optimizer quip -o {out} --force -q"
_PEER = (
    "ctq -i {model} -o {out} --int8 --scaling_mode row --simple --low-memory --comfy_quant"
    ' --save-quant-metadata --exclude-layers "(img_in|final_layer)"'
)
JOBS = (
    Job(name="cp", text="cp {model} {out}"),
    Job(name="cp, then sync", text="cp {model} {out} && sync {out}"),
    Job(name="quant rtn", text=f"cq quant {{model}} {_RTN}", reference="model"),
    Job(name="quant quip", text=f"cq quant {{model}} {_QUIP}", reference="model"),
    Job(
        name="quant rtn tensor",
        text=f"cq quant {{model}} --scaling tensor {_RTN}",
        reference="model",
    ),
    Job(
        name="merge | quant rtn",
        text=f"cq merge {{model}} {{lora}} -q | cq quant {_RTN}",
        reference="merged",
    ),
    Job(
        name="merge | quant quip",
        text=f"cq merge {{model}} {{lora}} -q | cq quant {_QUIP}",
        reference="merged",
    ),
    Job(
        name="merge, then quant rtn",
        text=f"cq merge {{model}} {{lora}} -o {{staged}} -q && cq quant {{staged}} {_RTN}",
        reference="merged",
    ),
    Job(
        name="merge, then quant quip",
        text=f"cq merge {{model}} {{lora}} -o {{staged}} -q && cq quant {{staged}} {_QUIP}",
        reference="merged",
    ),
    Job(name="merge", text="cq merge {model} {lora} -o {out} --force -q"),
    Job(name="peer", text=_PEER, reference="model", peer=True),
    Job(name="peer convrot", text=f"{_PEER} --convrot", reference="model", peer=True),
)
STARTUP = (
    Job(name="python -c pass", text="python -c pass"),
    Job(name="cq --help", text="cq --help"),
    Job(name="cq verify --help", text="cq verify --help"),
    Job(name="cq quant MODEL --dry-run", text="cq quant {model} --dry-run -q"),
    Job(name="peer --help", text="ctq --help", peer=True),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: wall and CPU seconds, peak RSS of the largest process and of all at once at most."""

    wall: float
    cpu: float
    rss: int
    rss_sum: int
    others: float  # cores that the rest of the machine kept busy meanwhile


@dataclass(frozen=True, slots=True)
class Quality:
    """What `cq verify --against` says of an output: decibels over its quantized layers."""

    mean_db: float | None
    min_db: float | None
    layers: int
    findings: int


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint of the bench and the LoRA for it."""

    path: Path
    lora: Path

    @property
    def nbytes(self) -> int:
        """Size of the checkpoint."""
        return self.path.stat().st_size

    @property
    def label(self) -> str:
        """Its size, for people."""
        return f"{self.nbytes / 1e9:.3g} GB"


class FailedError(Exception):
    """A command that was to be timed did not work; the message is the last thing it said."""


def run_job(job: Job, places: Mapping[str, str], programs: Mapping[str, str]) -> Sample:
    """Run a job once. Raises: FailedError if one of its processes fails."""
    wall = cpu = 0.0
    rss = rss_sum = 0
    os.sync()  # what the run before it left to be written is not this run's work
    busy = _busy_seconds()
    for step in job.steps(places, programs):
        start = time.perf_counter()
        usages = _run_pipeline(step)
        wall += time.perf_counter() - start
        cpu += sum(usage.ru_utime + usage.ru_stime for usage in usages)
        peaks = [usage.ru_maxrss * 1024 for usage in usages]
        rss, rss_sum = max(rss, *peaks), max(rss_sum, sum(peaks))
    others = max(0.0, (_busy_seconds() - busy - cpu) / wall)
    return Sample(wall, cpu, rss, rss_sum, others)


def _run_pipeline(commands: Sequence[Sequence[str]]) -> list[Any]:
    processes: list[subprocess.Popen[bytes]] = []
    usages = []
    with tempfile.TemporaryFile() as said:
        try:
            upstream: Any = subprocess.DEVNULL
            for place, command in enumerate(commands):
                last = place == len(commands) - 1
                stdout = subprocess.DEVNULL if last else subprocess.PIPE
                process = subprocess.Popen(command, stdin=upstream, stdout=stdout, stderr=said)
                processes.append(process)
                if upstream is not subprocess.DEVNULL:
                    upstream.close()  # or the process before would never see a broken pipe
                upstream = process.stdout
            for process in processes:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                usages.append(usage)
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
                    process.wait()
        if any(process.returncode for process in processes):
            said.seek(0)
            raise FailedError(_last_words(said.read().decode(errors="replace")))
    return usages


def _last_words(text: str) -> str:
    text = text.replace(f"{Path.cwd()}/", "")  # it may end up on a page
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it failed without a word"])[-1]


def _busy_seconds() -> float:
    # user, nice, system, idle, iowait, irq, softirq, steal of all cores, where the system has it
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    return sum(int(t) for i, t in enumerate(ticks) if i not in {3, 4}) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Bench:
    """The measurements of one run of this script, and how to take them."""

    programs: dict[str, str]
    tiny: Model
    models: list[Model]
    scratch: Path
    peer_sizes: frozenset[Path]
    runs: int
    peer_runs: int
    verify: bool
    samples: dict[tuple[str, Path], list[Sample]] = field(default_factory=dict)
    qualities: dict[tuple[str, Path], Quality] = field(default_factory=dict)
    startup: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: bool = False

    def measure_startup(self) -> None:
        """Time the commands that only start, on the largest model where they need one."""
        say(f"start-up, {STARTUP_RUNS} rounds")
        for turn in range(STARTUP_RUNS):
            for job in self._available(STARTUP, turn):
                if (sample := self._try(job, self.models[-1], job.name)) is not None:
                    self.startup.setdefault(job.name, []).append(sample)

    def measure(self) -> None:
        """Time every job on every model, in rounds."""
        for turn in range(max(self.runs, self.peer_runs)):
            for model in self.models:
                _read_through(model.path)
            for job in self._available(JOBS, turn):
                for model in self._models_of(job, turn):
                    self._measure_one(job, model)

    def _available(self, jobs: Sequence[Job], turn: int) -> list[Job]:
        # Another order in each round, so that no command always follows the same one.
        shift = turn % len(jobs)
        return [j for j in (*jobs[shift:], *jobs[:shift]) if "ctq" in self.programs or not j.peer]

    def _models_of(self, job: Job, turn: int) -> list[Model]:
        tiny = [self.tiny] if turn < self.runs else []
        if not job.peer:
            return [*tiny, *self.models] if turn < self.runs else []
        chosen = [m for m in self.models if m.path in self.peer_sizes]
        return tiny + chosen if turn < self.peer_runs else tiny

    def _measure_one(self, job: Job, model: Model) -> None:
        what = f"{job.name}, {'start-up' if model is self.tiny else model.label}"
        sample = self._try(job, model, what)
        if sample is not None:
            say(f"{what}: {sample.wall:.2f} s")
            self.samples.setdefault((job.name, model.path), []).append(sample)

    def _try(self, job: Job, model: Model, what: str) -> Sample | None:
        if what in self.missing:
            return None  # it failed before
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            out = Path(folder, "out.safetensors")
            places = {
                "model": str(model.path),
                "lora": str(model.lora),
                "out": str(out),
                "staged": str(Path(folder, "staged.safetensors")),
            }
            try:
                sample = run_job(job, places, self.programs)
            except FailedError as error:
                say(f"{what}: failed: {error}")
                self.missing[what] = f"it failed: {error}"
                self.failed |= not job.peer
                return None
            measurable = self.verify and job.reference and model is not self.tiny
            if measurable and (job.name, model.path) not in self.qualities:
                self._measure_quality(job, model, out, what)
        return sample

    def _measure_quality(self, job: Job, model: Model, out: Path, what: str) -> None:
        try:
            reference = self._merged(model) if job.reference == "merged" else model.path
            self.qualities[job.name, model.path] = measure_quality(
                self.programs["cq"], out, reference
            )
        except FailedError as error:
            self.missing[f"SQNR of {what}"] = f"it failed: {error}"
            self.failed = True

    def _merged(self, model: Model) -> Path:
        merged = self.scratch / f"merged-{model.path.name}"
        if not merged.exists():
            command = [self.programs["cq"], "merge", str(model.path), str(model.lora)]
            _run_pipeline([[*command, "-o", str(merged), "-q"]])
        return merged

    def beyond_startup(self, name: str, model: Model) -> float | None:
        """Median seconds of a job on a model, less those that it takes on next to nothing.

        None if it was not measured, or if the difference is lost in start-up.
        """
        here, tiny = (self.samples.get((name, m.path)) for m in (model, self.tiny))
        if not here or not tiny:
            return None
        startup = median(s.wall for s in tiny)
        beyond = median(s.wall for s in here) - startup
        return beyond if beyond > LOST_IN_STARTUP * startup else None

    def wall(self, job: str, model: Model) -> float | None:
        """Median wall seconds of whole commands, start-up included."""
        found = self.samples.get((job, model.path))
        return median(s.wall for s in found) if found else None

    def ratio(self, name: str, other: str, model: Model) -> float | None:
        """How many times longer the job `name` takes than `other`, both beyond start-up."""
        mine, theirs = self.beyond_startup(name, model), self.beyond_startup(other, model)
        return None if mine is None or theirs is None else mine / theirs

    def peak(self, name: str, model: Model) -> float | None:
        """Median peak RSS in bytes of the largest process of a job."""
        found = self.samples.get((name, model.path))
        return median(s.rss for s in found) if found else None


def measure_quality(cq: str, output: Path, reference: Path) -> Quality:
    """Compare `output` with `reference`. Raises: FailedError if `cq verify` cannot tell."""
    command = [cq, "verify", str(output), "--against", str(reference), "--json", "-q"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:  # with findings it exits with 1, and its report is as good
        report = json.loads(done.stdout)
        fidelity = report["fidelity"]
        return Quality(
            fidelity["mean_sqnr_db"],
            fidelity["min_sqnr_db"],
            fidelity["layers"],
            len(report["findings"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FailedError(_last_words(done.stderr)) from error


def _read_through(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def make_model(folder: Path, size: float, hidden: int, seed: int) -> Model:
    """Make a model, unless it is there.

    In a process of its own: a child's peak memory begins with that of the process that started it,
    so this one must stay small and import no torch.
    """
    name = f"flux-{size:g}gb-{hidden}"
    model = Model(folder / f"{name}.safetensors", folder / f"{name}-lora.safetensors")
    command = [sys.executable, str(MAKE_MODEL), str(model.path), "--lora", str(model.lora)]
    options = ["--size", str(size), "--hidden", str(hidden), "--seed", str(seed)]
    subprocess.run([*command, *options], check=True, stdout=sys.stderr)
    return model


def machine_facts(folder: Path, peer_python: Path | None) -> dict[str, Any]:
    """What the numbers depend on."""
    file_system = _output(["stat", "-f", "-c", "%T", str(folder)])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system() + " " + platform.release(),
        "file_system": file_system or "unknown",
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "cq")},
        "peer": _peer_versions(peer_python) if peer_python else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _peer_versions(python: Path) -> str:
    code = (
        "from importlib.metadata import version as v;"
        "print('convert-to-quant', v('convert-to-quant'), 'with torch', v('torch'))"
    )
    return _output([str(python), "-c", code]) or "convert-to-quant of unknown version"


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def to_markdown(bench: Bench, facts: Mapping[str, Any]) -> str:
    """The report as a page."""
    lines = ["# Results", "", f"Measured by `bench/bench.py` on {facts['date']}:", ""]
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
    lines += ["", "## Aims", "", *_table(("figure", "measured", "aim"), _aims(bench))]
    lines += ["", "## Start-up", "", *_startup_table(bench)]
    lines += ["", "## The commands", ""]
    lines += [f"* {job.name}: `{job.text}`" for job in JOBS]
    if bench.missing:
        lines += ["", "## Not measured", ""]
        lines += [f"* {what}: {why}" for what, why in bench.missing.items()]
    return "\n".join(lines) + "\n"


def _model_table(bench: Bench, model: Model) -> list[str]:
    titles = ("command", "wall s", "beyond start-up s", "CPU s", "peak RSS MiB", "MB/s", "of cp")
    rows = []
    for job in JOBS:
        found = bench.samples.get((job.name, model.path))
        if not found:
            continue
        beyond = bench.beyond_startup(job.name, model)
        quality = bench.qualities.get((job.name, model.path))
        disturbed = median(s.others for s in found) > DISTURBED_CORES
        rows.append(
            (
                job.name,
                _spread(s.wall for s in found) + (" !" if disturbed else ""),
                _number(beyond),
                _number(median(s.cpu for s in found)),
                _rss(found),
                _number(model.nbytes / MB / beyond if beyond else None, 0),
                _number(bench.ratio("cp", job.name, model)),
                _number(bench.ratio("peer", job.name, model), 1),
                _decibels(quality),
                str(quality.layers) if quality else "-",
            )
        )
    return _table((*titles, "x peer", "SQNR dB, mean / min", "layers"), rows)


def _startup_table(bench: Bench) -> list[str]:
    rows = [
        (name, _spread((s.wall for s in found), 3), _number(median(s.rss for s in found) / MIB, 0))
        for name, found in bench.startup.items()
    ]
    for job in JOBS:
        if found := bench.samples.get((job.name, bench.tiny.path)):
            rss = _number(median(s.rss for s in found) / MIB, 0)
            rows.append((f"{job.name}, on {bench.tiny.label}", _spread(s.wall for s in found), rss))
    return _table(("command", "wall s", "peak RSS MiB"), rows)


def _aims(bench: Bench) -> list[tuple[str, str, str]]:
    rows = []
    for model in bench.models:
        for name in ("quant rtn", "quant quip"):
            of_cp, of_peer = bench.ratio("cp", name, model), bench.ratio("peer", name, model)
            rows.append((f"{name}, {model.label}, of cp", _number(of_cp), "≥ 0.25"))
            rows.append((f"{name}, {model.label}, x peer", _number(of_peer, 1), "≥ 10"))
        for name in ("rtn", "quip"):
            both, alone = (
                bench.wall(job, model) for job in (f"merge | quant {name}", f"quant {name}")
            )
            title = f"merge | quant {name} over quant {name}, whole commands, {model.label}"
            rows.append((title, _number(both / alone if both and alone else None), "< 1.3"))
            beyond = bench.ratio(f"merge | quant {name}", f"quant {name}", model)
            title = f"the same beyond start-up, {model.label}"
            rows.append((title, _number(beyond), "-"))
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
        found = bench.startup.get(name)
        rows.append(
            (f"{name}, s", _number(median(s.wall for s in found) if found else None), "< 0.25")
        )
    return rows


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [titles, ["---"] + ["--:"] * (len(titles) - 1), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(values: Iterable[float], digits: int = 2) -> str:
    found = sorted(values)
    middle = _number(median(found), digits)
    if len(found) == 1:
        return middle
    return f"{middle} ({_number(found[0], digits)} to {_number(found[-1], digits)})"


def _rss(found: Sequence[Sample]) -> str:
    largest, together = (median(getattr(s, n) for s in found) / MIB for n in ("rss", "rss_sum"))
    return f"{largest:.0f}" + (f" (sum {together:.0f})" if together > largest else "")


def _decibels(quality: Quality | None) -> str:
    if quality is None:
        return "-"
    findings = f" ({quality.findings} findings)" if quality.findings else ""
    return f"{_number(quality.mean_db, 1)} / {_number(quality.min_db, 1)}{findings}"


def to_json(bench: Bench, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Every single measurement, for a program."""
    measured = []
    for job in JOBS:
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
        "commands": {job.name: job.text for job in (*JOBS, *STARTUP)},
        "measured": measured,
        "startup": {name: [asdict(s) for s in found] for name, found in bench.startup.items()},
        "not_measured": bench.missing,
    }


def say(text: str) -> None:
    """Talk, on stderr: the report is what goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def stop(text: str) -> NoReturn:
    """End with a message."""
    say(f"error: {text}")
    raise SystemExit(2)


def find_peer(text: str | None) -> tuple[Path, Path] | None:
    """The peer's command and its Python, given either; those that `make` installs if neither."""
    if text is None and not (ROOT / ".venv-peer/bin/ctq").exists():
        return None
    given = ROOT / ".venv-peer/bin/ctq" if text is None else Path(text).absolute()
    command = given.with_name("ctq") if given.name.startswith("python") else given
    if not os.access(command, os.X_OK):
        stop(f"`{command}` is not a program")
    return command, command.with_name("python")


def check_space(folder: Path, sizes: Sequence[float]) -> None:
    """End if the disk cannot hold models, merged references, and what one run writes."""
    models = sum(s for s in sizes if not any(folder.glob(f"flux-{s:g}gb-*"))) * 1e9
    needed = 1.15 * (models + sum(sizes) * 1e9 + 2.5 * max(sizes) * 1e9)
    free = shutil.disk_usage(folder).free
    if free < needed:
        stop(f"`{folder}` has {free / 1e9:.1f} GB free, the bench needs {needed / 1e9:.1f} GB")


def sizes_of(text: str) -> list[float]:
    """Sizes in GB from a comma-separated list, smallest first."""
    return sorted(float(word) for word in text.split(",") if word)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=sizes_of, default=[1.0, 2.0], metavar="GB,…")
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--dir", type=Path, default=Path("out/bench"), help="models and outputs")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--peer", metavar="PATH", help="the peer's `ctq`, or the Python beside it")
    peer.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-sizes", type=sizes_of, default=[1.0], metavar="GB,…")
    parser.add_argument("--peer-runs", type=int, default=1, help="it is slow (default 1)")
    parser.add_argument("--no-verify", action="store_true", help="measure no quality")
    parser.add_argument("--hidden", type=int, default=3072, help="narrower models, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default DIR/results.json")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the page there as well"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, and report on stdout. 1 if a command of `cq` failed."""
    args = arguments()
    results = args.json or args.dir / "results.json"
    for folder in (args.dir, results.parent, (args.markdown or results).parent):
        folder.mkdir(parents=True, exist_ok=True)  # now, not after all the work
    check_space(args.dir, args.sizes)
    programs = {"cq": str(Path(sys.executable).with_name("cq")), "python": sys.executable}
    missing: dict[str, str] = {}
    peer = None if args.no_peer else find_peer(args.peer)
    if peer is None:
        missing["the peer"] = "--no-peer" if args.no_peer else "none was given (--peer)"
    else:
        programs["ctq"] = str(peer[0])
        for size in set(args.sizes) - set(args.peer_sizes):
            missing[f"the peer at {size:g} GB"] = "not among --peer-sizes"
    if args.no_verify:
        missing["SQNR"] = "--no-verify"
    facts = machine_facts(args.dir, peer and peer[1])
    models = {s: make_model(args.dir, s, args.hidden, args.seed) for s in args.sizes}
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="scratch-") as scratch:
        bench = Bench(
            programs=programs,
            tiny=make_model(args.dir, 0, TINY_HIDDEN, args.seed),
            models=list(models.values()),
            scratch=Path(scratch),
            peer_sizes=frozenset(models[s].path for s in args.peer_sizes if s in models),
            runs=args.runs,
            peer_runs=args.peer_runs,
            verify=not args.no_verify,
            missing=missing,
        )
        bench.measure_startup()
        bench.measure()
    page = to_markdown(bench, facts)
    results.write_text(json.dumps(to_json(bench, facts), indent=1, ensure_ascii=False) + "\n")
    if args.markdown is not None:
        args.markdown.write_text(page)
    print(page, end="")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
