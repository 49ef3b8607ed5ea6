"""Running commands as processes, and what the system says of them: times, memory, disturbance.

Knows nothing of reports. Imports no torch: a child's peak memory begins with that of its parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.jobs import Job

STARTUP_RUNS = 10
LOST_IN_STARTUP = 0.05  # of start-up: less time than that beyond it is noise


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
    jobs: Sequence[Job]
    startup_jobs: Sequence[Job]
    samples: dict[tuple[str, Path], list[Sample]] = field(default_factory=dict)
    qualities: dict[tuple[str, Path], Quality] = field(default_factory=dict)
    startup: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: bool = False

    def measure_startup(self) -> None:
        """Time the commands that only start, on the largest model where they need one."""
        if self.startup_jobs:
            say(f"start-up, {STARTUP_RUNS} rounds")
        for turn in range(STARTUP_RUNS):
            for job in self._available(self.startup_jobs, turn):
                if (sample := self._try(job, self.models[-1], job.name)) is not None:
                    self.startup.setdefault(job.name, []).append(sample)

    def measure(self) -> None:
        """Time every job on every model, in rounds."""
        for turn in range(max(self.runs, self.peer_runs)):
            for model in self.models:
                _read_through(model.path)
            for job in self._available(self.jobs, turn):
                for model in self._models_of(job, turn):
                    self._measure_one(job, model)

    def _available(self, jobs: Sequence[Job], turn: int) -> list[Job]:
        # Another order in each round, so that no command always follows the same one.
        shift = turn % max(1, len(jobs))
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


def say(text: str) -> None:
    """Talk, on stderr: the report is what goes to stdout."""
    print(text, file=sys.stderr, flush=True)
