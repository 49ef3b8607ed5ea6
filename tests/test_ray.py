"""The Ray engine: equal bytes, whatever dies; its planning is tested without Ray as well."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import make
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cq
import cq_quant
from cq.core import manifest
from cq.core.checkpoint import Checkpoint
from cq.core.engine import ray as engine
from cq.core.engine.local import Progress
from cq.core.errors import CqError, InputError, PlanError, ResourceError
from cq.core.laid_out import names_of
from cq.core.sink import FileSink
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
    assert "cq[ray]" in (caught.value.hint or "")
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
        ("edit", "-o", "x.st", "--max-shard-size", "1GB"),
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
        engine._check_memory(parts, range(len(parts)), nodes, None)
    assert caught.value.code == "resource.memory"
    nodes[0]["Resources"]["memory"] = float(4 << 30)
    engine._check_memory(parts, range(len(parts)), nodes, None)


class TestTask:
    """What a worker does, in this process."""

    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        yield
        engine._CACHED.clear()

    def order(self, checkpoint: Checkpoint, partial: Path) -> dict[str, Any]:
        sink = FileSink(checkpoint, partial.with_name("unused.st"))
        return {
            "manifest": orjson.dumps(manifest.document(checkpoint)),
            "work": names_of(checkpoint, sink.head)[2],
            "partial": str(partial),
        }

    def test_tasks_in_any_order_and_twice_fill_the_file(self, base: Path, tmp_path: Path) -> None:
        whole = tmp_path / "whole.st"
        write(work(base), whole)
        with FileSink(work(base), tmp_path / "out.st") as sink:
            order = self.order(work(base), sink.partial)
            indexes = range(len(work(base).parts))
            for task in (indexes[5:], indexes[:5], indexes[3:7]):
                assert engine.fill_batch(order, task) is None
            for index in indexes:
                sink.part_done(index)
        assert (tmp_path / "out.st").read_bytes() == whole.read_bytes()

    def test_task_on_a_machine_that_does_not_see_the_file_is_an_error(
        self, base: Path, tmp_path: Path
    ) -> None:
        failure = engine.fill_batch(self.order(work(base), tmp_path / "nowhere"), [0])
        assert failure is not None
        error = engine._error(failure)
        assert isinstance(error, ResourceError)
        assert "nowhere" in error.message
        assert not (tmp_path / "nowhere").exists()

    def test_task_on_another_source_is_an_error(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "partial").write_bytes(b"untouched")
        order = self.order(work(base), tmp_path / "partial")
        os.utime(base, ns=(1, 1))
        failure = engine.fill_batch(order, [0])
        assert failure is not None
        assert isinstance(engine._error(failure), PlanError)
        assert (tmp_path / "partial").read_bytes() == b"untouched"

    def test_error_of_a_task_comes_back_as_it_was(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "partial").write_bytes(b"")
        order = self.order(work(base), tmp_path / "partial")
        base.unlink()
        failure = engine.fill_batch(order, [0])
        assert failure is not None
        error = engine._error(failure)
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
