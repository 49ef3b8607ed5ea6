"""The Ray engine: equal bytes, whatever dies; its planning is tested without Ray as well."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cq
import cq_quant
from cq.core import shards
from cq.core.checkpoint import Checkpoint
from cq.core.engine import ray as engine
from cq.core.engine.local import Progress, Settings
from cq.core.errors import CqError, InputError, PlanError, ResourceError
from cq.core.sink import FileSink
from cq.core.streaming import MODES, Checkpointed, Room, StreamingMode, Work
from cq.core.write import write
from tests.processes import cq as run_cq

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed; `make test-ray` does that"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.save(tmp_path / "base.safetensors", make.model(blocks=3, dim=128))


def work(base: Path, **options: Any) -> Checkpoint:
    """Parts of all kinds: computed, copied and constant ones."""
    return cq_quant.quantize(cq.open(base), format="nvfp4", optimizer="rtn", **options)


@given(
    sizes=st.lists(st.integers(0, 1 << 24), min_size=1, max_size=60),
    workers=st.integers(1, 64),
)
def test_tasks_have_each_part_once_and_none_is_large_by_being_batched(
    sizes: list[int], workers: int
) -> None:
    parts = [
        make.part({f"t{i}": torch.empty((size,), dtype=torch.uint8, device="meta")})
        for i, size in enumerate(sizes)
    ]
    found = engine.batches(parts, range(len(parts)), workers)
    assert sorted(index for task in found for index in task) == list(range(len(parts)))
    aim = max(1 << 20, sum(sizes) // workers // 12)
    for task in found:
        assert sum(sizes[i] for i in task[:-1]) < aim
    loads = [sum(sizes[i] for i in task) for task in found]
    assert loads == sorted(loads, reverse=True)


def test_engine_without_ray_says_how_to_get_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, found = work(base), importlib.import_module

    def missing(name: str) -> Any:
        if name == "ray":
            raise ImportError(name)
        return found(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ResourceError) as caught:
        write(checkpoint, tmp_path / "out.st", engine="ray")
    assert "pip install ray" in (caught.value.hint or "")
    assert not list(tmp_path.glob("out*"))


PLUGIN = """
from cq.layouts import QuantizedLayout

class PlainLayout(QuantizedLayout):
    pass
"""


@pytest.mark.parametrize(
    "options",
    [
        ("run", "-o", "-"),
        ("run", "-o", "x.st", "--plugin", "plugin.py"),
        ("run", "-o", "x.st", "--shard", "1/2"),
        ("run", "-o", "x.st", "--device", "cuda:1"),
    ],
)
def test_engine_refuses_what_other_machines_cannot_do(
    options: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    found = run_cq(*options, base, "--engine", "ray", cwd=tmp_path)
    assert (found.code, found.out) == (2, ""), found.err
    assert not (tmp_path / "x.st").exists()


def test_part_that_no_machine_can_take_is_refused(base: Path) -> None:
    parts = work(base).parts
    nodes = [{"Resources": {"CPU": 4.0, "memory": float(300 << 20)}}]
    with pytest.raises(ResourceError) as caught:
        engine._check_memory(parts, range(len(parts)), nodes, Settings())
    assert caught.value.code == "resource.memory"
    nodes[0]["Resources"]["memory"] = float(4 << 30)
    engine._check_memory(parts, range(len(parts)), nodes, Settings())


def test_layers_are_tasks_with_a_gpu_and_copies_are_not(base: Path) -> None:
    checkpoint = work(base)
    every = range(len(checkpoint.parts))
    without, with_gpu = engine.tasks_of(checkpoint.parts, every, Settings(device="cuda"), 2, 1)
    layers = {i for i in every if checkpoint.parts[i].work is not None}
    assert {i for task in with_gpu for i in task.indexes} == layers
    assert {i for task in without for i in task.indexes} == set(every) - layers
    assert layers
    assert set(every) - layers
    assert all(task.gpu for task in with_gpu)
    assert not any(task.gpu for task in without)
    assert engine.tasks_of(checkpoint.parts, every, Settings(), 2, 1)[1] == []


def test_device_of_a_cluster_is_what_it_has() -> None:
    found = {(asked, n): engine.device_of(asked, n) for asked in ("cpu", "auto") for n in (0, 2)}
    assert found == {("cpu", 0): "cpu", ("cpu", 2): "cpu", ("auto", 0): "cpu", ("auto", 2): "cuda"}
    assert engine.device_of("cuda", 1) == "cuda"
    with pytest.raises(ResourceError, match="no machine of the Ray cluster offers a GPU"):
        engine.device_of("cuda", 0)


@given(st.sampled_from(MODES), st.none() | st.just(Checkpointed(8, 4)), st.booleans())
def test_task_asks_for_the_memory_that_its_layers_may_take(
    mode: StreamingMode, wide: Checkpointed | None, gpu: bool
) -> None:
    """Whatever placement the worker comes to, it is within what Ray was asked for."""
    layer = Work(
        weights=100 << 20,
        columns=1024,
        cut=1 << 20,
        usual=16,
        gains=True,
        nbytes_host=1 << 20,
        nbytes_fixed=10 << 20,
        nbytes_weight=28,
        nbytes_staged=2,
    )
    part = replace(make.part({"p": torch.zeros(1)}), work=layer)
    device = "cuda" if gpu else "cpu"
    settings = Settings(device=device, streaming_mode=mode, quip_checkpointed=wide)
    asked = engine.needed(part, settings)
    for vram in (0, 100 << 20, 1 << 30, 1 << 34) if gpu else (0,):
        room = Room(host=asked, device="cuda:0" if gpu else "cpu", vram=vram)
        place = settings.placed(layer, room)
        assert place.nbytes_host <= asked


class TestTask:
    """What a worker does, in this process."""

    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        yield
        engine._CACHED.clear()

    def order(self, checkpoint: Checkpoint, partial: Path, **settings: Any) -> dict[str, Any]:
        sink = FileSink(checkpoint, partial.with_name("unused.st"))
        found = engine.order_of(checkpoint, sink, Settings(**settings))
        return {**found, "partial": str(partial)}

    def failure(self, order: dict[str, Any]) -> CqError:
        told = engine.fill_batch(order, engine.Task((0,)))
        assert told["error"] is not None
        return engine._error(told["error"])

    def test_tasks_in_any_order_and_twice_fill_the_file(self, base: Path, tmp_path: Path) -> None:
        whole = tmp_path / "whole.st"
        write(work(base), whole)
        with FileSink(work(base), tmp_path / "out.st") as sink:
            order = self.order(work(base), sink.partial)
            indexes = range(len(work(base).parts))
            for task in (indexes[5:], indexes[:5], indexes[3:7]):
                done = engine.fill_batch(order, engine.Task(tuple(task)))
                assert done == {"error": None, "retreated": [], "outcomes": []}
            for index in indexes:
                sink.part_done(index)
        assert (tmp_path / "out.st").read_bytes() == whole.read_bytes()

    def test_task_on_a_machine_that_does_not_see_the_file_is_an_error(
        self, base: Path, tmp_path: Path
    ) -> None:
        error = self.failure(self.order(work(base), tmp_path / "nowhere"))
        assert isinstance(error, ResourceError)
        assert "nowhere" in error.message
        assert not (tmp_path / "nowhere").exists()

    def test_task_on_another_source_is_an_error(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "partial").write_bytes(b"untouched")
        order = self.order(work(base), tmp_path / "partial")
        os.utime(base, ns=(1, 1))
        assert isinstance(self.failure(order), PlanError)
        assert (tmp_path / "partial").read_bytes() == b"untouched"

    def test_error_of_a_task_comes_back_as_it_was(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "partial").write_bytes(b"")
        order = self.order(work(base), tmp_path / "partial")
        base.unlink()
        error = self.failure(order)
        assert isinstance(error, InputError)
        assert (error.code, error.where) == ("input.missing", str(base))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes on this machine."""
    ray = importlib.import_module("ray")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=80 << 20,
    )
    yield ray
    ray.shutdown()


def running_tasks() -> list[int]:
    """Process ids of Ray's workers that are at a task of ours."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::fill_batch"):
                found.append(int(entry.name))
    return found


def bigger(tmp_path: Path) -> Path:
    return make.save(
        tmp_path / "base.safetensors",
        {f"blocks.{i}.linear.weight": make.weight(1024, 1024, seed=i) for i in range(24)},
    )


@needs_ray
@pytest.mark.slow
def test_ray_gives_the_bytes_of_threads_though_a_worker_is_killed(
    cluster: Any, tmp_path: Path
) -> None:
    base = bigger(tmp_path)
    write(work(base), tmp_path / "whole.st")
    killed: list[int] = []
    seen: list[Progress] = []

    def kill_one(event: Progress) -> None:
        seen.append(event)
        for pid in [] if killed else running_tasks()[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    write(work(base), tmp_path / "out.st", engine="ray", on_progress=kill_one)
    assert killed
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "whole.st").read_bytes()
    assert [e.done for e in seen] == sorted({e.done for e in seen})
    assert (seen[-1].done, seen[-1].parts_done) == (seen[-1].total, seen[-1].parts)


@needs_ray
@pytest.mark.slow
def test_ray_keeps_finished_parts_when_it_is_interrupted(cluster: Any, tmp_path: Path) -> None:
    base = bigger(tmp_path)
    write(work(base), tmp_path / "whole.st")

    def interrupt(event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(work(base), tmp_path / "out.st", engine="ray", on_progress=interrupt)
    assert running_tasks() == []
    written = write(work(base), tmp_path / "out.st")
    assert 0 < written.parts_resumed < written.parts
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "whole.st").read_bytes()


@needs_ray
@pytest.mark.slow
def test_ray_writes_shards_as_threads_do(cluster: Any, tmp_path: Path) -> None:
    base = bigger(tmp_path)
    files = {}
    for kind in ("local", "ray"):
        (tmp_path / kind).mkdir()
        out = tmp_path / kind / "out.safetensors"
        shards.write_shards(work(base), out, max_bytes=4_000_000, engine=kind)
        files[kind] = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
    assert len(files["ray"]) > 3
    assert files["local"] == files["ray"]


@needs_ray
@pytest.mark.slow
def test_ray_counts_portions_as_threads_do(cluster: Any, tmp_path: Path) -> None:
    base = bigger(tmp_path)
    write(work(base), tmp_path / "whole.st")
    wide = Checkpointed(256, 4)
    write(
        work(base),
        tmp_path / "out.st",
        engine="ray",
        device="auto",
        streaming_mode="aggressive",
        quip_checkpointed=wide,
    )
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "whole.st").read_bytes()


@needs_ray
@pytest.mark.slow
def test_ray_without_gpus_says_so(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no machine of the Ray cluster offers a GPU"):
        write(work(bigger(tmp_path)), tmp_path / "out.st", engine="ray", device="cuda")
    assert not list(tmp_path.glob("out.st*"))


@needs_ray
@pytest.mark.slow
def test_ray_fails_as_threads_fail(cluster: Any, tmp_path: Path) -> None:
    tensors = make.model(dim=128)
    tensors["blocks.1.mlp.0.weight"][3, 5] = float("nan")
    base = make.save(tmp_path / "base.safetensors", tensors)
    found = []
    for kind in ("local", "ray"):
        with pytest.raises(CqError) as caught:
            write(work(base), tmp_path / "out.st", engine=kind)
        found.append(caught.value.to_dict())
        assert not list(tmp_path.glob("out.st*"))
    assert found[0] == found[1]
