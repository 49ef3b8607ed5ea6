"""The engine: promises checked, memory bounded, equal bytes for any workers, first error."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import make
import pytest
import torch

import cq
import cq_quant
from cq.core import source
from cq.core.checkpoint import Part, Piece
from cq.core.dtypes import TensorSpec
from cq.core.engine import groups, local, memory
from cq.core.engine.local import Job, Progress, Settings, checked, run
from cq.core.errors import InternalError, ResourceError

# Promises ---------------------------------------------------------------------------------------

PROMISED = {"w": TensorSpec("F32", (4, 2)), "s": TensorSpec("F32", ())}
W, S = torch.ones(4, 2), torch.tensor(1.0)
BROKEN = {
    "wrong dtype": [Piece("w", 0, W.half()), Piece("s", 0, S)],
    "dtype without a name": [Piece("w", 0, W.to(torch.complex128)), Piece("s", 0, S)],
    "wrong width": [Piece("w", 0, torch.ones(4, 3)), Piece("s", 0, S)],
    "wrong dimensions": [Piece("w", 0, torch.ones(4, 2, 1)), Piece("s", 0, S)],
    "flat": [Piece("w", 0, torch.ones(8)), Piece("s", 0, S)],
    "scalar for rows": [Piece("w", 0, S), Piece("s", 0, S)],
    "vector for a scalar": [Piece("w", 0, W), Piece("s", 0, torch.ones(1))],
    "too few rows": [Piece("w", 0, W[:3]), Piece("s", 0, S)],
    "too many rows": [Piece("w", 0, W), Piece("w", 4, W[:1]), Piece("s", 0, S)],
    "rows twice": [Piece("w", 0, W), Piece("w", 0, W), Piece("s", 0, S)],
    "rows out of order": [Piece("w", 2, W[2:]), Piece("w", 0, W[:2]), Piece("s", 0, S)],
    "a gap in the rows": [Piece("w", 0, W[:1]), Piece("w", 2, W[2:]), Piece("s", 0, S)],
    "a scalar twice": [Piece("w", 0, W), Piece("s", 0, S), Piece("s", 0, S)],
    "a tensor missing": [Piece("w", 0, W)],
    "nothing": [],
    "an unknown tensor": [Piece("w", 0, W), Piece("s", 0, S), Piece("x", 0, S)],
}


@pytest.mark.parametrize("broken", BROKEN)
def test_engine_refuses_a_broken_promise(broken: str, tmp_path: Path) -> None:
    """A part that yields anything but what its specs say is a bug report, never a file."""
    part = Part(tensors=PROMISED, nbytes_peak=1, produce=lambda: iter(BROKEN[broken]))
    with pytest.raises(InternalError) as caught:
        cq.write(make.checkpoint(part), tmp_path / "out.safetensors")
    assert (caught.value.exit_code, caught.value.code) == (70, "bug")
    assert any(f"`{name}`" in caught.value.message for name in "wsx")
    assert list(tmp_path.iterdir()) == []


def test_checked_passes_what_was_promised() -> None:
    pieces = [Piece("s", 0, S), Piece("w", 0, W[:3]), Piece("w", 3, W[3:])]
    part = Part(tensors=PROMISED, nbytes_peak=1, produce=lambda: iter(pieces))
    assert pieces == list(checked(part))


def test_checked_passes_a_tensor_without_rows() -> None:
    part = Part(tensors={"e": TensorSpec("F32", (0, 3))}, nbytes_peak=1, produce=lambda: iter([]))
    assert list(checked(part)) == []


# Memory -----------------------------------------------------------------------------------------


class Gauge:
    """Work that measures what is in flight together."""

    def __init__(self) -> None:
        self.now = self.most = self.runs = self.together = 0
        self.running = 0
        self._lock = threading.Lock()

    def work(self, job: Job) -> None:
        with self._lock:
            self.now += job.part.nbytes_peak
            self.running += 1
            self.runs += 1
            self.most = max(self.most, self.now)
            self.together = max(self.together, self.running)
        time.sleep(0.002)
        with self._lock:
            self.now -= job.part.nbytes_peak
            self.running -= 1


def parts_of(*peaks: int) -> list[Part]:
    return [make.part({f"t{i}": torch.ones(1)}, nbytes_peak=peak) for i, peak in enumerate(peaks)]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("limit", [10, 25, 1000])
def test_engine_keeps_parts_in_flight_under_the_limit(workers: int, limit: int) -> None:
    gauge = Gauge()
    peaks = [10, 3, 7, 10, 1, 9, 10, 2, 2, 2, 10, 5] * 3
    run(parts_of(*peaks), gauge.work, Settings(workers=workers, memory_limit=limit))
    assert len(peaks) == gauge.runs
    assert gauge.most <= limit
    assert gauge.together <= workers


def test_engine_runs_parts_side_by_side() -> None:
    barrier = threading.Barrier(3, timeout=20)
    run(parts_of(1, 1, 1), lambda job: barrier.wait() and None, Settings(workers=3, memory_limit=9))


def test_engine_refuses_a_part_over_the_limit_before_any_work(tmp_path: Path) -> None:
    started: list[int] = []
    parts = [
        make.part({"small": torch.ones(1)}, hook=lambda: started.append(1)),
        make.part({"large": torch.ones(1)}, nbytes_peak=3 << 20),
    ]
    with pytest.raises(ResourceError) as caught:
        cq.write(make.checkpoint(*parts), tmp_path / "out.safetensors", memory_limit=1 << 20)
    assert (caught.value.exit_code, caught.value.code) == (5, "resource.memory")
    assert "`large` needs 3.1 MB" in caught.value.message
    assert "limit of 1.0 MB" in caught.value.message
    assert started == []
    assert list(tmp_path.iterdir()) == []


def test_default_memory_limit_is_sane() -> None:
    assert memory.default_limit() >= 64 << 20
    assert memory.free() > 0
    assert local.default_workers() >= 1


MIB = 1 << 20
GROUPS = {
    "no groups": ({}, None),
    "version 2": (
        {"/proc/self/cgroup": "0::/a/b\n", "memory.max@a/b": 600, "memory.current@a/b": 100},
        500,
    ),
    "version 2, no bound": ({"/proc/self/cgroup": "0::/a\n", "memory.max@a": "max"}, None),
    "version 2, bound by the one around it": (
        {
            "/proc/self/cgroup": "0::/a/b\n",
            **{"memory.max@a/b": 900, "memory.current@a/b": 100},
            **{"memory.max@a": 800, "memory.current@a": 700},
        },
        100,
    ),
    "version 2, throttled": (
        {"/proc/self/cgroup": "0::/a\n", "memory.max@a": "max", "memory.high@a": 300},
        300,
    ),
    "version 2 in a container, whose own group is the root": (
        {"/proc/self/cgroup": "0::/\n", "memory.max@": 700, "memory.current@": 50},
        650,
    ),
    "version 2 behind a namespace": ({"/proc/self/cgroup": "0::/../c\n", "memory.max@": 70}, 70),
    "version 2, files in the page cache": (
        {
            "/proc/self/cgroup": "0::/a\n",
            **{"memory.max@a": 600, "memory.current@a": 590},
            "memory.stat@a": f"anon {90 * MIB}\nactive_file {300 * MIB}\n"
            f"inactive_file {200 * MIB}\n",
        },
        510,
    ),
    "version 2, more than all is used": (
        {"/proc/self/cgroup": "0::/a\n", "memory.max@a": 600, "memory.current@a": 601},
        0,
    ),
    "version 1": (
        {
            "/proc/self/cgroup": "5:cpu,memory:/a\n0::/a\n",
            **{"memory.limit_in_bytes@memory/a": 600, "memory.usage_in_bytes@memory/a": 300},
            "memory.stat@memory/a": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\n",
        },
        400,
    ),
    "version 1 in a container": (
        {"/proc/self/cgroup": "9:memory:/docker/0f\n", "memory.limit_in_bytes@memory": 500},
        500,
    ),
    "version 1, no bound": (
        {"/proc/self/cgroup": "9:memory:/\n", "memory.limit_in_bytes@memory": 1 << 43},
        1 << 43,
    ),
    "no numbers": (
        {
            "/proc/self/cgroup": "9:memory:/a\n0::\nnonsense\n::\n",
            **{"memory.limit_in_bytes@memory/a": "-1", "memory.max@": "\xff"},
        },
        None,
    ),
}


def machine(root: Path, files: Mapping[str, object]) -> Path:
    """A made-up `/` with these files: `NAME@GROUP` of a group, numbers in MiB."""
    for name, value in files.items():
        own, _, group = name.partition("@")
        path = root / (own.lstrip("/") if name.startswith("/") else f"sys/fs/cgroup/{group}/{own}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(value * MIB if isinstance(value, int) else value).encode("latin-1"))
    return root


@pytest.mark.parametrize(("files", "expected"), GROUPS.values(), ids=GROUPS)
def test_control_groups_leave_what_the_tightest_of_them_leaves(
    files: Mapping[str, object], expected: int | None, tmp_path: Path
) -> None:
    root = machine(tmp_path, files)
    left = groups.memory_left(root)
    assert left == (None if expected is None else expected * MIB)
    machine(root, {"/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {1 << 30} kB\n"})
    assert memory.free(root) == ((1 << 40) if left is None else min(left, 1 << 40))


@pytest.mark.parametrize(("bound", "limit"), [(8300, 4000), (700, 256), (500, 200), (310, 64)])
def test_default_memory_limit_is_half_of_what_a_container_has_beyond_torch(
    bound: int, limit: int, tmp_path: Path
) -> None:
    root = machine(tmp_path, {"/proc/self/cgroup": "0::/\n", "memory.max@": bound})
    machine(root, {"/proc/meminfo": f"MemAvailable: {1 << 30} kB\n"})
    assert memory.default_limit(root) == limit * MIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"/proc/self/cgroup": "0::/a", "cpu.max@a": "max 100000"}, None),
        ({"/proc/self/cgroup": "0::/a", "cpu.max@a": "150000 100000"}, 2),
        ({"/proc/self/cgroup": "0::/a/b", "cpu.max@a": "50000 100000", "cpu.max@a/b": "8 1"}, 1),
        (
            {
                "/proc/self/cgroup": "2:cpuacct,cpu:/a",
                "cpu.cfs_quota_us@cpu/a": "400000",
                "cpu.cfs_period_us@cpu/a": "100000",
            },
            4,
        ),
        (
            {
                "/proc/self/cgroup": "2:cpu,cpuacct:/a",
                "cpu.cfs_quota_us@cpu,cpuacct/a": "200000",
                "cpu.cfs_period_us@cpu,cpuacct/a": "100000",
            },
            2,
        ),
        ({"/proc/self/cgroup": "2:cpu:/a", "cpu.cfs_quota_us@cpu/a": "-1"}, None),
        ({"/proc/self/cgroup": "0::/a", "cpu.max@a": "0 0"}, None),
    ],
)
def test_control_groups_bound_the_workers(
    files: Mapping[str, object],
    expected: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = groups.cores(machine(tmp_path, files))
    assert found == expected
    monkeypatch.setattr(groups, "cores", lambda: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(local.sys, "platform", "linux")
    assert local.default_workers() == min(3, expected or 3)


# Bytes ------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.save(tmp_path / "base.safetensors", make.model(dim=128), {"format": "pt"})


def test_output_does_not_depend_on_workers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_CUT_ELEMENTS", 1 << 14)
    model = cq_quant.quantize(cq.open(base))
    assert len(list(model.pieces("blocks.0.mlp.0.weight"))) > 2
    outputs = set()
    for workers in (1, 2, 5):
        path = tmp_path / f"{workers}.safetensors"
        cq.write(model, path, workers=workers)
        outputs.add(path.read_bytes())
    assert len(outputs) == 1


@pytest.mark.parametrize("optimizer", ["rtn", "quip"])
def test_output_does_not_depend_on_where_tensors_are_cut(
    optimizer: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales reach over a row or the whole tensor, never over a segment of it."""
    for scaling in ("row", "tensor"):
        model = cq_quant.quantize(cq.open(base), optimizer=optimizer, scaling=scaling)
        cq.write(model, tmp_path / "whole.safetensors", force=True)
        with monkeypatch.context() as patch:
            patch.setattr(source, "_CUT_ELEMENTS", 1 << 14)
            cq.write(model, tmp_path / "cut.safetensors", force=True)
        whole, cut = (make.load(tmp_path / f"{n}.safetensors") for n in ("whole", "cut"))
        for name, expected in whole.items():
            assert make.same(expected, cut[name])


def test_torch_has_its_threads_back_afterwards(base: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen: list[int] = []
        part = make.part({"a": torch.ones(1)}, hook=lambda: seen.append(torch.get_num_threads()))
        cq.write(make.checkpoint(part), tmp_path / "out.safetensors")
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


# Progress ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_rises_to_the_total(workers: int, base: Path, tmp_path: Path) -> None:
    events: list[Progress] = []
    model = cq_quant.quantize(cq.open(base))
    cq.write(model, tmp_path / "out.safetensors", workers=workers, on_progress=events.append)
    assert {(model.nbytes, len(model.parts))} == {(e.total, e.parts) for e in events}
    assert [e.done for e in events] == sorted(e.done for e in events)
    assert [e.parts_done for e in events] == sorted(e.parts_done for e in events)
    assert model.nbytes == events[-1].done
    assert {part.name for part in model.parts} == {e.name for e in events}


def test_progress_counts_what_was_done_before(base: Path) -> None:
    parts = cq.open(base).parts
    events: list[Progress] = []
    skip = frozenset(range(5))
    run(
        parts,
        lambda job: job.advance(job.part.nbytes),
        Settings(workers=1, on_progress=events.append),
        skip=skip,
    )
    before = sum(part.nbytes for part in parts[:5])
    assert before + parts[5].nbytes == events[0].done
    assert events[0].parts_done == 5
    assert sum(part.nbytes for part in parts) == events[-1].done


def test_engine_skips_what_it_is_told_to() -> None:
    done: list[int] = []
    run(
        parts_of(*[1] * 6),
        lambda job: done.append(job.index),
        Settings(workers=1),
        skip=frozenset({0, 4}),
    )
    assert done == [1, 2, 3, 5]


def test_engine_does_nothing_for_no_parts() -> None:
    run([], lambda job: None, Settings())
    run(parts_of(1, 1), lambda job: None, Settings(), skip=frozenset({0, 1}))


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_engine_raises_the_first_error_and_stops_the_others(workers: int) -> None:
    started: list[int] = []
    others = threading.Event()
    first = ValueError("first")

    def work(job: Job) -> None:
        started.append(job.index)
        if job.index == 3:
            assert workers == 1 or others.wait(20)
            raise first
        if job.index > 3:
            others.set()
            assert job.stop.wait(20)
            raise ValueError("later")

    with pytest.raises(ValueError, match="first") as caught:
        run(parts_of(*[1] * 100), work, Settings(workers=workers, memory_limit=100))
    assert first is caught.value
    assert len(started) <= 4 + workers


def test_engine_stops_between_the_pieces_of_a_part() -> None:
    pieces = 0
    halted = threading.Event()

    def produce() -> Iterator[Piece]:
        nonlocal pieces
        for row in range(1000):
            if row == 2:
                halted.wait(20)
            pieces += 1
            yield Piece("long", row, torch.ones(1, 1))

    long = Part(tensors={"long": TensorSpec("F32", (1000, 1))}, nbytes_peak=1, produce=produce)

    def work(job: Job) -> None:
        if job.index == 1:
            raise ValueError("stop")
        stop = job.stop
        threading.Thread(target=lambda: stop.wait(20) and halted.set(), daemon=True).start()
        for _ in job.pieces():
            pass

    with pytest.raises(ValueError, match="stop"):
        run([long, *parts_of(1)], work, Settings(workers=2, memory_limit=10))
    assert pieces <= 4


@pytest.mark.parametrize("workers", [1, 3])
def test_engine_passes_ctrl_c_on_after_an_orderly_stop(workers: int) -> None:
    done: list[int] = []

    def work(job: Job) -> None:
        if job.index == 5:
            raise KeyboardInterrupt
        done.append(job.index)

    with pytest.raises(KeyboardInterrupt):
        run(parts_of(*[1] * 50), work, Settings(workers=workers, memory_limit=100))
    assert len(done) < 49
    assert not [t for t in threading.enumerate() if t.name.startswith("cq-")]


def test_an_error_in_the_progress_function_ends_the_work(tmp_path: Path) -> None:
    def broken(event: Progress) -> None:
        raise RuntimeError("the display is gone")

    with pytest.raises(RuntimeError, match="the display is gone"):
        cq.write(
            make.checkpoint(make.part({"a": W})), tmp_path / "out.safetensors", on_progress=broken
        )
    assert list(tmp_path.iterdir()) == []


def test_engine_waits_for_its_workers_when_ctrl_c_comes(tmp_path: Path) -> None:
    """A worker that lives on would write into files that its sink has closed."""
    inside, ended = threading.Event(), threading.Event()

    def work(job: local.Job) -> None:
        inside.set()
        time.sleep(0.5)
        ended.set()

    def press() -> None:
        inside.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        run(parts_of(1, 1), work, Settings(workers=1))
    presser.join()
    assert ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cq-")]
