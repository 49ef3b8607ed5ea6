"""Sinks: no name shows an unfinished file, work is resumed, refusals leave everything as it was."""

from __future__ import annotations

import errno
import io
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make
import pytest
import torch

import cq
import cq_quant
from cq.core import files, laid_out
from cq.core.checkpoint import Checkpoint
from cq.core.engine.local import Progress, Settings
from cq.core.errors import CqError, InputError, InternalError, PlanError, ResourceError
from cq.core.journal import Journal, read_journal
from cq.core.sink import FileSink, StreamSink, nbytes_file
from cq.core.write import fill, stream


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory / "out.safetensors"


def left(out: Path) -> list[str]:
    """What lies in the output's directory."""
    return sorted(path.name for path in out.parent.iterdir())


class Work:
    """Six parts of two tensors each that count how often they are produced."""

    def __init__(self, count: int = 6, metadata: dict[str, str] | None = None) -> None:
        self.produced = [0] * count
        self.tensors = {
            f"part.{i}.{name}": make.weight(i + 2, 3, seed=(i, name))
            for i in range(count)
            for name in "ab"
        }
        parts = []
        for i in range(count):
            mine = {name: self.tensors[name] for name in (f"part.{i}.a", f"part.{i}.b")}
            parts.append(make.part(mine, hook=self._counter(i)))
        self.checkpoint = make.checkpoint(*parts, metadata=metadata)

    def _counter(self, index: int) -> Callable[[], None]:
        def count() -> None:
            self.produced[index] += 1

        return count

    @property
    def expected(self) -> bytes:
        buffer = io.BytesIO()
        stream(Work(len(self.produced)).checkpoint, buffer, Settings(workers=1))
        return buffer.getvalue()


def put(opened: FileSink | StreamSink, checkpoint: Checkpoint, *indexes: int) -> None:
    """Finish some parts of a sink by hand."""
    for index in indexes:
        for piece in checkpoint.parts[index].produce():
            opened.write(piece)
        opened.part_done(index)


def killed(checkpoint: Checkpoint, out: Path, *indexes: int) -> None:
    """Finish some parts and vanish, as a process does that is killed."""
    opened = FileSink(checkpoint, out).__enter__()
    put(opened, checkpoint, *indexes)
    opened.close()


def stop_after(count: int) -> Callable[[Progress], None]:
    """A progress function that presses Ctrl-C in the piece after `count` others."""
    seen = iter(range(count))

    def on_progress(event: Progress) -> None:
        if next(seen, None) is None:
            raise KeyboardInterrupt

    return on_progress


# Commit -----------------------------------------------------------------------------------------


def test_sink_hides_output_until_commit(out: Path) -> None:
    work = Work()
    seen: list[list[str]] = []
    cq.write(work.checkpoint, out, workers=1, on_progress=lambda _: seen.append(left(out)))
    assert seen == [["out.safetensors.partial", "out.safetensors.partial.journal"]] * 12
    assert left(out) == ["out.safetensors"]
    assert work.expected == out.read_bytes()


def test_sink_writes_what_safetensors_reads(out: Path) -> None:
    work = Work(metadata={"format": "pt", "ключ": '"\n'})
    written = cq.write(work.checkpoint, out)
    assert work.checkpoint.metadata == make.metadata(out)
    found = make.load(out)
    assert work.tensors.keys() == found.keys()
    assert all(make.same(work.tensors[name], found[name]) for name in found)
    assert (written.parts, written.parts_resumed) == (6, 0)
    assert out.stat().st_size == written.nbytes == nbytes_file(work.checkpoint)


@pytest.mark.parametrize("dtype", make.TORCH_DTYPES)
def test_sink_copies_any_tensor_of_a_file(dtype: str, tmp_path: Path, out: Path) -> None:
    tensors = {
        "a": make.noise(dtype, (5, 3)),
        "scalar": make.noise(dtype, ()),
        "empty": make.noise(dtype, (0, 4)),
        "five": make.noise(dtype, (2, 1, 3, 1, 2)),
    }
    base = make.save(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    cq.write(cq.open(base), out)
    assert base.read_bytes() == out.read_bytes()


def test_sink_writes_a_checkpoint_of_nothing(out: Path) -> None:
    cq.write(make.checkpoint(metadata={"note": "empty"}), out)
    assert (make.load(out), make.metadata(out)) == ({}, {"note": "empty"})


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_sink_honours_the_umask(mask: int, out: Path) -> None:
    before = os.umask(mask)
    try:
        cq.write(Work().checkpoint, out)
    finally:
        os.umask(before)
    assert 0o666 & ~mask == stat.S_IMODE(out.stat().st_mode)


def test_sink_refuses_to_commit_before_all_parts_are_done(out: Path) -> None:
    work = Work()
    with (
        pytest.raises(InternalError, match="2 parts were never written"),
        FileSink(work.checkpoint, out) as opened,
    ):
        put(opened, work.checkpoint, 0, 1, 2, 3)
    assert left(out) == []


# Outputs that exist -----------------------------------------------------------------------------


def refused(checkpoint: Checkpoint, out: Path, **settings: Any) -> CqError:
    with pytest.raises(CqError) as caught:
        cq.write(checkpoint, out, **settings)
    assert str(out) in caught.value.message or str(out.parent) in caught.value.message
    return caught.value


def test_sink_refuses_an_existing_output_before_any_work(out: Path) -> None:
    out.write_bytes(b"precious")
    work = Work()
    error = refused(work.checkpoint, out)
    assert (error.exit_code, error.code) == (4, "plan.output_exists")
    assert "--force" in (error.hint or "")
    assert out.read_bytes() == b"precious"
    assert work.produced == [0] * 6
    assert left(out) == ["out.safetensors"]


def test_sink_with_force_replaces_only_at_the_end(out: Path) -> None:
    out.write_bytes(b"precious")
    work = Work()
    seen = []
    cq.write(work.checkpoint, out, force=True, on_progress=lambda _: seen.append(out.read_bytes()))
    assert {b"precious"} == set(seen)
    assert work.expected == out.read_bytes()


def test_sink_with_force_keeps_the_old_file_when_the_work_fails(out: Path) -> None:
    out.write_bytes(b"precious")

    def fail() -> None:
        raise ResourceError("no more")

    with pytest.raises(ResourceError):
        cq.write(make.checkpoint(make.part({"a": torch.ones(2)}, hook=fail)), out, force=True)
    assert out.read_bytes() == b"precious"
    assert left(out) == ["out.safetensors"]


def test_sink_keeps_an_output_that_appears_meanwhile(out: Path) -> None:
    checkpoint = make.checkpoint(
        make.part({"a": torch.ones(2)}, hook=lambda: out.write_bytes(b"precious") and None)
    )
    assert refused(checkpoint, out).code == "plan.output_exists"
    assert out.read_bytes() == b"precious"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.save(tmp_path / "base.safetensors", make.model(), {"format": "pt"})


@pytest.mark.parametrize("how", ["path", "relative", "symlink", "hardlink"])
@pytest.mark.parametrize("force", [False, True])
def test_sink_refuses_the_input_as_output(
    how: str, force: bool, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = base.read_bytes()
    checkpoint = cq_quant.quantize(cq.open(base))
    if how == "path":
        out = base
    elif how == "relative":
        monkeypatch.chdir(base.parent)
        out = Path("out/../base.safetensors")
    elif how == "symlink":
        out.symlink_to(base)
    else:
        out.hardlink_to(base)
    assert refused(checkpoint, out, force=force).code == "plan.output_is_input"
    assert before == base.read_bytes()


def test_sink_refuses_a_shard_of_the_input_as_output(tmp_path: Path) -> None:
    index = make.save_shards(tmp_path / "model", make.model())
    shard = index.parent / "model-00002-of-00002.safetensors"
    assert refused(cq.open(index), shard, force=True).code == "plan.output_is_input"


def test_sink_refuses_the_index_of_the_input_as_output(tmp_path: Path) -> None:
    """Without its index the shards are no checkpoint any more."""
    index = make.save_shards(tmp_path / "model", make.model())
    before = index.read_bytes()
    with pytest.raises(PlanError):
        cq.write(cq.open(index), index, force=True)
    assert before == index.read_bytes()


@pytest.mark.parametrize("suffix", [".partial", ".partial.journal"])
def test_sink_refuses_an_input_that_its_partial_file_would_overwrite(
    suffix: str, tmp_path: Path
) -> None:
    """As after a download that left `model.safetensors.partial` behind."""
    base = make.save(tmp_path / f"model.safetensors{suffix}", make.model())
    before = base.read_bytes()
    with pytest.raises(PlanError):
        cq.write(cq.open(base), tmp_path / "model.safetensors")
    assert base.exists()
    assert before == base.read_bytes()


def test_sink_replaces_the_file_behind_a_link(tmp_path: Path, out: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    real = elsewhere / "real.safetensors"
    real.write_bytes(b"old")
    out.symlink_to(real)
    work = Work()
    cq.write(work.checkpoint, out, force=True)
    assert out.is_symlink()
    assert work.expected == real.read_bytes()
    assert left(out) == ["out.safetensors"]
    assert left(real) == ["real.safetensors"]


def test_sink_writes_through_a_link_to_nothing(tmp_path: Path, out: Path) -> None:
    real = tmp_path / "real.safetensors"
    out.symlink_to(real)
    work = Work()
    cq.write(work.checkpoint, out)
    assert out.is_symlink()
    assert work.expected == real.read_bytes()


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
@pytest.mark.parametrize("force", [False, True])
def test_sink_refuses_what_is_not_a_regular_file(kind: str, force: bool, out: Path) -> None:
    if kind == "directory":
        out.mkdir()
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out = Path("/dev/null")
    error = refused(Work().checkpoint, out, force=force)
    assert (error.exit_code, error.code) == (4, "plan.output_kind")
    assert out.exists()


def test_sink_says_that_the_directory_is_missing(tmp_path: Path) -> None:
    error = refused(Work().checkpoint, tmp_path / "none" / "out.safetensors")
    assert (error.exit_code, error.code) == (5, "resource.directory")
    assert list(tmp_path.iterdir()) == []


def test_sink_says_why_it_cannot_write(out: Path) -> None:
    (out.parent / "out.safetensors.partial").mkdir()
    error = refused(Work().checkpoint, out)
    assert (error.exit_code, error.code) == (4, "plan.other_partial")
    assert left(out) == ["out.safetensors.partial"]


# Failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bug"), ResourceError("full"), MemoryError()])
def test_sink_leaves_nothing_when_the_work_fails(error: Exception, out: Path) -> None:
    def fail() -> None:
        raise error

    parts = [make.part({f"t{i}": torch.ones(2)}) for i in range(4)]
    parts.append(make.part({"bad": torch.ones(2)}, hook=fail))
    with pytest.raises(type(error)) as caught:
        cq.write(make.checkpoint(*parts), out)
    assert error is caught.value
    assert left(out) == []


def test_sink_without_room_says_so_and_leaves_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "reserve", full)
    work = Work()
    error = refused(work.checkpoint, out)
    assert (error.exit_code, error.code) == (5, "resource.disk")
    assert "no space left on device" in error.message
    assert str(nbytes_file(work.checkpoint)) in error.message
    assert left(out) == []
    assert work.produced == [0] * 6


def test_sink_that_runs_out_of_room_leaves_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that cannot reserve space a later write may still fail."""
    write_at, calls = files.write_at, iter(range(7))

    def fills_up(fd: int, data: memoryview, offset: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(fd, data, offset)

    monkeypatch.setattr(files, "write_at", fills_up)
    assert refused(Work().checkpoint, out).code == "resource.disk"
    assert left(out) == []


def test_stream_sink_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "reserve", full)
    with pytest.raises(ResourceError, match="no space left"):
        stream(Work().checkpoint, io.BytesIO(), Settings())


# Resuming ---------------------------------------------------------------------------------------


def test_sink_resumes_after_ctrl_c(out: Path) -> None:
    work = Work()
    with pytest.raises(KeyboardInterrupt):
        cq.write(work.checkpoint, out, workers=1, on_progress=stop_after(7))
    assert left(out) == ["out.safetensors.partial", "out.safetensors.partial.journal"]
    assert work.produced == [1, 1, 1, 1, 0, 0]  # the fourth was cut off inside
    written = cq.write(work.checkpoint, out)
    assert written.parts_resumed == 3
    assert work.produced == [1, 1, 1, 2, 1, 1]
    assert work.expected == out.read_bytes()
    assert left(out) == ["out.safetensors"]


def test_sink_resumes_after_every_part(out: Path) -> None:
    work = Work()
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            cq.write(work.checkpoint, out, workers=1, on_progress=stop_after(2))
    written = cq.write(work.checkpoint, out)
    assert written.parts_resumed == 5
    assert work.produced == [1, 2, 2, 2, 2, 2]
    assert work.expected == out.read_bytes()


def test_sink_resumes_after_a_kill(out: Path) -> None:
    work = Work()
    killed(work.checkpoint, out, 4, 1)
    work.produced[:] = [0] * 6
    written = cq.write(work.checkpoint, out)
    assert written.parts_resumed == 2
    assert work.produced == [1, 0, 1, 1, 0, 1]
    assert work.expected == out.read_bytes()


def test_sink_resumes_quantization_to_equal_bytes(base: Path, tmp_path: Path, out: Path) -> None:
    model = cq_quant.quantize(cq.open(base))
    whole = cq.write(model, tmp_path / "whole.safetensors")
    for count in (1, 9, 20):
        with pytest.raises(KeyboardInterrupt):
            cq.write(model, out, on_progress=stop_after(count))
    again = cq.write(cq_quant.quantize(cq.open(base)), out)
    assert again.parts_resumed > 0
    assert whole.path.read_bytes() == out.read_bytes()


def test_sink_keeps_work_when_ctrl_c_comes_while_it_resumes(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work()
    killed(work.checkpoint, out, 0, 1, 2)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "begin", interrupt)
        cq.write(work.checkpoint, out)
    assert left(out) == ["out.safetensors.partial", "out.safetensors.partial.journal"]
    assert cq.write(work.checkpoint, out).parts_resumed == 3


def test_sink_repairs_the_header_when_it_resumes(out: Path) -> None:
    work = Work()
    killed(work.checkpoint, out, 0)
    partial = out.with_name(out.name + ".partial")
    raw = bytearray(partial.read_bytes())
    raw[:64] = bytes(64)
    partial.write_bytes(raw)
    cq.write(work.checkpoint, out)
    assert work.expected == out.read_bytes()


@pytest.mark.parametrize("other", ["metadata", "tensors"])
def test_sink_asks_before_it_discards_other_work(other: str, out: Path) -> None:
    killed(
        Work(6, {"other": "work"}).checkpoint if other == "metadata" else Work(5).checkpoint, out, 0
    )
    partial = out.with_name(out.name + ".partial")
    before = partial.read_bytes()
    work = Work()
    error = refused(work.checkpoint, out)
    assert (error.exit_code, error.code) == (4, "plan.other_partial")
    assert "--restart" in (error.hint or "")
    assert before == partial.read_bytes()
    written = cq.write(work.checkpoint, out, restart=True)
    assert written.parts_resumed == 0
    assert work.expected == out.read_bytes()
    assert left(out) == ["out.safetensors"]


def test_sink_starts_again_when_the_source_was_touched(base: Path, out: Path) -> None:
    killed(cq.open(base), out)
    stat = base.stat()
    os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert cq.write(cq.open(base), out).parts_resumed == 0
    assert base.read_bytes() == out.read_bytes()


def test_sink_refuses_what_was_made_of_a_source_that_changed_meanwhile(
    base: Path, out: Path
) -> None:
    """A file mixed from two versions of its source never gets the final name."""
    changed = pytest.raises(InputError, match="was changed while cq was reading it")
    with changed, FileSink(cq.open(base), out) as half:
        stat = base.stat()
        os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
        fill(half, cq.open(base), Settings())
    assert left(out) == []


@pytest.mark.parametrize("name", [".partial", ".partial.journal"])
def test_sink_follows_no_link_that_stands_for_its_own_files(
    name: str, base: Path, out: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    out.with_name(out.name + name).symlink_to(victim)
    for restart in (False, True):
        with pytest.raises(CqError):
            cq.write(cq.open(base), out, restart=restart)
    assert victim.read_bytes() == b"precious"
    assert not out.exists()


def test_sink_leaves_a_journal_that_is_not_its_own(base: Path, out: Path) -> None:
    foreign = out.with_name(out.name + ".partial.journal")
    foreign.write_bytes(b"dear diary")
    assert refused(cq.open(base), out).code == "plan.other_partial"
    assert foreign.read_bytes() == b"dear diary"


def test_sink_restarts_its_own_work_when_asked(out: Path) -> None:
    work = Work()
    killed(work.checkpoint, out, 0, 1, 2)
    assert cq.write(work.checkpoint, out, restart=True).parts_resumed == 0
    assert work.expected == out.read_bytes()


def test_sink_leaves_a_partial_file_that_is_not_its_own(out: Path) -> None:
    """Browsers name downloads so; ours has had a journal since before it had a byte."""
    work = Work()
    foreign = out.with_name(out.name + ".partial")
    foreign.write_bytes(b"half a download")
    with pytest.raises(PlanError, match="it is not cq's") as caught:
        cq.write(work.checkpoint, out)
    assert "--restart" in str(caught.value.hint)
    assert foreign.read_bytes() == b"half a download"
    assert cq.write(work.checkpoint, out, restart=True).parts_resumed == 0
    assert work.expected == out.read_bytes()


def test_sink_starts_again_with_a_journal_alone(out: Path) -> None:
    work = Work()
    killed(work.checkpoint, out, 0, 1, 2)
    out.with_name(out.name + ".partial").unlink()
    assert cq.write(work.checkpoint, out).parts_resumed == 0
    assert work.expected == out.read_bytes()


def test_sink_asks_when_the_partial_file_was_cut(out: Path) -> None:
    work = Work()
    killed(work.checkpoint, out, 0, 1, 2)
    os.truncate(out.with_name(out.name + ".partial"), 100)
    assert refused(work.checkpoint, out).code == "plan.other_partial"


def test_sink_resumes_after_any_cut_of_the_journal(out: Path) -> None:
    """Whatever a crash left of the journal, the file that comes out is right."""
    work = Work()
    killed(work.checkpoint, out, 3, 1, 5)
    partial, journal = (out.with_name(out.name + end) for end in (".partial", ".partial.journal"))
    image, record = partial.read_bytes(), journal.read_bytes()
    for length in range(0, len(record) + 1, 3):
        partial.write_bytes(image)
        journal.write_bytes(record[:length])
        cq.write(work.checkpoint, out, force=True)
        assert work.expected == out.read_bytes()


# Journals ---------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Reads a journal of the given bytes on a machine whose boot id is `now`."""

    def read(text: bytes, *, boot: str | None = "now") -> tuple[str, set[int]] | None:
        monkeypatch.setattr(files, "boot_id", lambda: boot)
        path = tmp_path / "journal"
        path.write_bytes(text)
        return read_journal(path)

    yield read


def head(boot: str, digest: str = "d") -> bytes:
    return b'\n{"cq":1,"digest":"%s","boot":"%s"}\n' % (digest.encode(), boot.encode())


def test_journal_of_this_boot_counts(journal: Callable[..., Any]) -> None:
    assert journal(head("now") + b"done 0\ndone 12\n") == ("d", {0, 12})


def test_journal_of_another_boot_counts_what_was_safe(journal: Callable[..., Any]) -> None:
    text = head("before") + b"done 0\ndone 1\nsafe 0\nsafe 1\ndone 2\n"
    assert journal(text) == ("d", {0, 1})
    assert journal(text + head("now") + b"done 3\n") == ("d", {0, 1, 3})
    assert journal(text + head("before") + b"done 3\nsafe 3\n") == ("d", {0, 1, 3})
    assert journal(head("now") + b"done 7\n" + head("before") + b"done 8\n") == ("d", set())


def test_journal_without_boot_ids_counts_what_was_safe(journal: Callable[..., Any]) -> None:
    text = b'\n{"cq":1,"digest":"d","boot":null}\ndone 0\nsafe 0\ndone 1\n'
    assert journal(text, boot=None) == ("d", {0})


@pytest.mark.parametrize(
    "line",
    [b"done 1", b"don", b"done ", b"done x\n", b"done -1\n", b'\n{"cq":\n', b"\xff\n", b"\n"],
)
def test_journal_ignores_torn_lines(line: bytes, journal: Callable[..., Any]) -> None:
    assert journal(head("now") + b"done 0\n" + line) == ("d", {0})
    if line.endswith(b"\n"):
        assert journal(head("now") + line + b"done 0\n") == ("d", {0})


def test_journal_ignores_a_torn_line_that_a_resumed_run_has_closed(
    journal: Callable[..., Any],
) -> None:
    """`done 12`, cut off after the 1, is not part 1."""
    assert journal(head("now") + b"done 0\ndone 1" + head("now")) == ("d", {0})


@pytest.mark.parametrize("text", [b"", b"\n", b"done 1\n", b"{}\n", b"[1]\n", b"\0" * 100])
def test_journal_without_a_head_says_nothing(text: bytes, journal: Callable[..., Any]) -> None:
    assert journal(text) is None


def test_journal_that_is_missing_says_nothing(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") is None


def test_sink_syncs_parts_now_and_then(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power loss may not take is said in the journal, and only after the data is safe."""
    monkeypatch.setattr(laid_out, "_SYNC_SECONDS", 0.01)
    work = Work()
    journal = out.with_name(out.name + ".partial.journal")
    with pytest.raises(KeyboardInterrupt), FileSink(work.checkpoint, out) as half:
        for index in (0, 1):
            put(half, work.checkpoint, index)
        deadline = time.monotonic() + 30
        while b"safe 1\n" not in journal.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt
    text = journal.read_bytes()
    assert [text.index(b"done %d\n" % i) < text.index(b"safe %d\n" % i) for i in (0, 1)]
    monkeypatch.setattr(files, "boot_id", lambda: "after the power came back")
    assert cq.write(work.checkpoint, out).parts_resumed == 2


def test_sink_after_a_reboot_redoes_what_was_not_synced(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work()
    killed(work.checkpoint, out, 0, 1, 2)
    monkeypatch.setattr(files, "boot_id", lambda: "after the power came back")
    assert cq.write(work.checkpoint, out).parts_resumed == 0
    assert work.expected == out.read_bytes()


# Two at once ------------------------------------------------------------------------------------


def test_sink_refuses_a_second_writer(out: Path) -> None:
    work, second = Work(), Work()
    with FileSink(work.checkpoint, out) as opened:
        put(opened, work.checkpoint, 0, 1)
        for restart in (False, True):
            error = refused(second.checkpoint, out, restart=restart)
            assert (error.exit_code, error.code) == (4, "plan.output_busy")
        put(opened, work.checkpoint, 2, 3, 4, 5)
    assert work.expected == out.read_bytes()
    assert second.produced == [0] * 6
    assert left(out) == ["out.safetensors"]


# Streams ----------------------------------------------------------------------------------------


def test_stream_sink_gives_the_bytes_of_the_file(base: Path, out: Path) -> None:
    for model in (cq.open(base), cq_quant.quantize(cq.open(base)), Work().checkpoint):
        cq.write(model, out, force=True)
        buffer = io.BytesIO()
        stream(model, buffer, Settings(workers=2))
        assert out.read_bytes() == buffer.getvalue()


def test_stream_sink_writes_nothing_when_the_work_fails() -> None:
    def fail() -> None:
        raise ResourceError("no more")

    buffer = io.BytesIO()
    checkpoint = make.checkpoint(make.part({"a": torch.ones(2)}, hook=fail))
    with pytest.raises(ResourceError):
        stream(checkpoint, buffer, Settings())
    assert buffer.getvalue() == b""


def test_sinks_take_parts_in_any_order(out: Path) -> None:
    work = Work()
    order = list(range(6))
    random.Random(7).shuffle(order)
    with FileSink(work.checkpoint, out) as opened:
        put(opened, work.checkpoint, *order)
    assert work.expected == out.read_bytes()


# System calls -----------------------------------------------------------------------------------


def test_seek_read_equals_the_positioned_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    fd = os.open(path, files.READ_FLAGS)
    try:
        for offset, count in [(0, 10), (100, 200), (256, 5), (300, 5), (7, 0)]:
            first, second = bytearray(count), bytearray(count)
            got = files.read_at(fd, memoryview(first), offset)
            assert got == files.seek_read(fd, memoryview(second), offset)
            assert first == second
    finally:
        os.close(fd)


def test_fallbacks_write_the_same_file(
    base: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: no positioned calls, no kernel copy, no reserving; with five workers."""
    model = cq_quant.quantize(cq.open(base))
    cq.write(model, tmp_path / "native.safetensors")
    for name in ("preadv", "pwrite", "copy_file_range", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(files, "fcntl", None)
    cq.write(cq_quant.quantize(cq.open(base)), out, workers=5)
    assert (tmp_path / "native.safetensors").read_bytes() == out.read_bytes()
    cq.write(cq.open(base), tmp_path / "copy.safetensors", workers=5)
    assert base.read_bytes() == (tmp_path / "copy.safetensors").read_bytes()


@pytest.mark.parametrize(
    "fault", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, None], ids=str
)
def test_sink_copies_by_hand_where_the_kernel_cannot(
    fault: int | None, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is a kernel that copies nothing and says nothing of it."""

    def cannot(*_: object) -> int:
        if fault is not None:
            raise OSError(fault, "cannot")
        return 0

    monkeypatch.setattr(os, "copy_file_range", cannot, raising=False)
    cq.write(cq.open(base), out)
    assert base.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(("fault", "free"), [(errno.EWOULDBLOCK, False), (errno.ENOLCK, True)])
def test_lock_takes_only_a_held_lock_for_held(
    fault: int, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system without locks is no other run."""

    def refuse(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    fd = os.open(tmp_path / "file", files.WRITE_FLAGS)
    try:
        assert files.lock(fd) is free
    finally:
        os.close(fd)


def test_write_at_writes_all_that_short_writes_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    fd = os.open(tmp_path / "file", files.WRITE_FLAGS)
    try:
        files.write_at(fd, memoryview(b"0123456789"), 2)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"\0\x000123456789"


def test_reserve_makes_the_file_as_long_as_it_will_be(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", files.WRITE_FLAGS)
    try:
        for nbytes in (0, 10_000, 300):
            files.reserve(fd, nbytes)
            assert nbytes == os.fstat(fd).st_size
    finally:
        os.close(fd)


def test_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    first = os.open(tmp_path / "file", files.WRITE_FLAGS)
    second = os.open(tmp_path / "file", files.WRITE_FLAGS)
    assert files.lock(first)
    assert not files.lock(second)
    os.close(first)
    assert files.lock(second)
    os.close(second)


def test_copy_stops_when_it_is_told_to(base: Path, out: Path) -> None:
    checkpoint = cq.open(base)
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt), FileSink(checkpoint, out) as opened:
        part = next(part for part in checkpoint.parts if part.name == "img_in.weight")
        assert part.extent is not None
        opened.copy(part.name, part.extent, stop)
        entry = opened.header.entries[part.name]
        raw = opened.partial.read_bytes()[opened.header.data_start :][entry.start : entry.end]
        assert raw == bytes(part.nbytes)
        raise KeyboardInterrupt


def test_fill_skips_what_the_sink_has(out: Path) -> None:
    work = Work()
    killed(work.checkpoint, out, 2)
    work.produced[:] = [0] * 6
    with FileSink(work.checkpoint, out) as opened:
        assert {2} == opened.finished
        fill(opened, work.checkpoint, Settings(workers=1))
    assert work.produced == [1, 1, 0, 1, 1, 1]
