"""Shares: several processes fill one output, die, come again; its bytes are those of one run."""

from __future__ import annotations

import os
import random
import time
from itertools import pairwise
from pathlib import Path

import make
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cq
import cq_quant
from bench import faults
from cq.core import files, shares
from cq.core.checkpoint import Checkpoint
from cq.core.errors import CqError, InputError, PlanError, ResourceError, UsageError
from cq.core.journal import read_journal
from cq.core.shares import Share, ShareSink, divide, parse_share, write_share
from cq.core.write import fill, write
from tests.processes import TIMEOUT, big_model
from tests.processes import cq as run_cq

__all__ = ["big_model"]  # a fixture, used by its name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make.save(tmp_path / "base.safetensors", make.model(blocks=3))


def work(base: Path) -> Checkpoint:
    """Parts of all kinds: computed, copied and constant ones."""
    return cq_quant.quantize(cq.open(base), format="int8_tensorwise", optimizer="rtn")


@pytest.fixture
def whole(base: Path, tmp_path: Path) -> bytes:
    write(work(base), tmp_path / "whole.st")
    return (tmp_path / "whole.st").read_bytes()


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def cut_off(base: Path, out: Path, share: Share, parts: int) -> None:
    """Begin a share and leave it as a kill does, with `parts` of its parts finished."""
    sink = ShareSink(work(base), out, share)
    sink.__enter__()
    fill(sink, work(base), shares.local.Settings(workers=1), only=sink.own[:parts])
    sink.close()


@given(
    sizes=st.lists(st.integers(1, 1 << 20), max_size=40),
    count=st.integers(1, 12),
)
def test_shares_have_each_part_once_and_about_equal_work(sizes: list[int], count: int) -> None:
    parts = [
        make.part({f"t{i}": make.torch.empty(size, dtype=make.torch.uint8)})
        for i, size in enumerate(sizes)
    ]
    found = divide(parts, count)
    assert len(found) == count
    assert sorted(index for share in found for index in share) == list(range(len(parts)))
    loads = [sum(parts[i].nbytes for i in share) for share in found]
    assert max(loads) - min(loads) <= max(sizes, default=0) + 1
    assert all(a < b for share in found for a, b in pairwise(share))


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1 /2", "²/3"])
def test_share_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_share(text)
    assert caught.value.code == "usage.shard"


@pytest.mark.parametrize("count", [1, 3, 17])
def test_shares_in_any_order_give_the_bytes_of_one_run(
    count: int, base: Path, whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.st"
    order = [Share(i, count) for i in range(1, count + 1)]
    busy = [share for share in order if divide(work(base).parts, count)[share.number - 1]]
    random.Random(count).shuffle(busy)
    for at, share in enumerate(busy):
        assert not out.exists()
        done = write_share(work(base), out, share)
        assert set(done.missing) == set(busy[at + 1 :])
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["base.safetensors", "out.st", "whole.st"]
    for share in (order[0], order[-1]):  # whatever its number, a late one has nothing to do
        assert write_share(work(base), out, share).ready


def test_share_without_parts_does_no_harm(base: Path, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    count = len(work(base).parts) + 1
    for number in range(count, 0, -1):
        write_share(work(base), out, Share(number, count))
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["base.safetensors", "out.st", "whole.st"]


def test_died_share_does_only_what_is_missing(base: Path, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    cut_off(base, out, Share(1, 2), parts=3)
    assert write_share(work(base), out, Share(2, 2)).missing == (Share(1, 2),)
    assert not out.exists()
    done = write_share(work(base), out, Share(1, 2))
    assert (done.written.parts_resumed, done.missing) == (3, ())
    assert out.read_bytes() == whole


def test_share_killed_before_its_name_is_finished_by_any_other(
    base: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.st"
    write_share(work(base), out, Share(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_share(work(base), out, Share(2, 2))
    assert not out.exists()
    done = write_share(work(base), out, Share(1, 2))
    assert (done.written.parts_resumed, done.missing) == (done.written.parts, ())
    assert out.read_bytes() == whole


def test_two_shares_that_commit_at_once_agree(
    base: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.st"
    write_share(work(base), out, Share(1, 2))
    first = Path.replace

    def replaced_twice(self: Path, target: Path) -> Path:
        first(self, target)  # the other share, a moment earlier
        return first(self, target)

    monkeypatch.setattr(Path, "replace", replaced_twice)
    assert write_share(work(base), out, Share(2, 2)).missing == ()
    assert out.read_bytes() == whole


def test_unfinished_output_of_shares_is_no_safetensors_file(base: Path, tmp_path: Path) -> None:
    cut_off(base, tmp_path / "out.st", Share(1, 2), parts=2)
    with pytest.raises(InputError):
        cq.open(tmp_path / "out.st.shares" / "partial")


@pytest.mark.parametrize("other", ["format", "count"])
def test_shares_of_different_work_do_not_meet(other: str, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    write_share(work(base), out, Share(1, 2))
    before = names(tmp_path / "out.st.shares")
    different = work(base)
    if other == "format":
        different = cq_quant.quantize(cq.open(base), format="float8_e4m3fn", optimizer="rtn")
    with pytest.raises(PlanError) as caught:
        write_share(different, out, Share(2, 3 if other == "count" else 2))
    assert caught.value.code == "plan.other_partial"
    assert names(tmp_path / "out.st.shares") == before


def test_share_of_a_touched_source_is_done_anew_and_never_mixed(
    base: Path, whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.st"
    write_share(work(base), out, Share(1, 2))
    os.utime(base, ns=(1, time.time_ns()))
    with pytest.raises(PlanError) as caught:
        write_share(work(base), out, Share(2, 2))
    assert caught.value.code == "plan.source_changed"
    assert "share 1/2" in str(caught.value)
    assert write_share(work(base), out, Share(1, 2)).written.parts_resumed == 0
    assert out.read_bytes() == whole


def test_share_never_begins_over_what_a_finished_output_left(base: Path, tmp_path: Path) -> None:
    # Killed between the name and tidying up, and then somebody removed the output.
    out = tmp_path / "out.st"
    write_share(work(base), out, Share(1, 2))
    (tmp_path / "out.st.shares" / "partial").unlink()
    for number in (1, 2):
        with pytest.raises(PlanError) as caught:
            write_share(work(base), out, Share(number, 2))
        assert caught.value.code == "plan.other_partial"


def test_share_replaces_another_file_only_when_forced(
    base: Path, whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.st"
    out.write_bytes(b"another")
    with pytest.raises(PlanError) as caught:
        write_share(work(base), out, Share(1, 2))
    assert caught.value.code == "plan.output_exists"
    for number in (1, 2):
        assert out.read_bytes() == b"another"
        write_share(work(base), out, Share(number, 2), force=True)
    assert out.read_bytes() == whole


def test_copy_of_an_older_source_is_not_taken_for_the_output(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    plain = cq.open(base)  # without stages the head does not name the source
    for number in (1, 2):
        write_share(plain, out, Share(number, 2))
    assert write_share(plain, out, Share(1, 2)).ready
    os.utime(out, ns=(1, base.stat().st_mtime_ns - 1))
    with pytest.raises(PlanError) as caught:
        write_share(plain, out, Share(1, 2))
    assert caught.value.code == "plan.output_exists"


def test_share_of_a_source_that_was_rewritten_is_done_anew(base: Path, tmp_path: Path) -> None:
    """Whatever it is taken for: its head, and the manifest, may be the same."""
    out, whole = tmp_path / "out.st", tmp_path / "whole.st"
    write_share(work(base), out, Share(1, 1))
    tensors = make.load(base)
    tensors["blocks.1.mlp.0.weight"] = -tensors["blocks.1.mlp.0.weight"]
    make.save(base, tensors)
    with pytest.raises(PlanError, match="exists already"):
        write_share(work(base), out, Share(1, 1))
    assert not write_share(work(base), out, Share(1, 1), force=True).ready
    write(work(base), whole)
    assert out.read_bytes() == whole.read_bytes()
    assert write_share(work(base), out, Share(1, 1)).ready
    assert not write_share(work(base), out, Share(1, 1), force=True).ready, "it is not asked"


def test_another_file_of_the_same_names_and_shapes_is_not_taken_for_the_output(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.st"
    other = {name: tensor * 2 for name, tensor in make.load(base).items()}
    make.save(out, other)
    plain = cq.open(base)
    with pytest.raises(PlanError, match="exists already"):
        write_share(plain, out, Share(1, 1))
    assert make.same(cq.open(out).read("img_in.weight"), other["img_in.weight"])


def test_shares_that_begin_at_once_of_different_work_do_not_mix(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked before either has noted anything."""
    out, refuse, inside = tmp_path / "out.st", ShareSink._refuse_others, []

    def meanwhile(sink: ShareSink) -> None:
        refuse(sink)
        if not inside:
            inside.append(sink)
            cut_off(base, out, Share(1, 3), 1)

    monkeypatch.setattr(ShareSink, "_refuse_others", meanwhile)
    with pytest.raises(PlanError, match="holds unfinished work of another command"):
        write_share(work(base), out, Share(1, 2))
    assert not out.exists()


def test_share_is_written_by_one_process_at_a_time(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    with ShareSink(work(base), out, Share(1, 2)) as sink:
        with pytest.raises(PlanError) as caught:
            write_share(work(base), out, Share(1, 2))
        assert caught.value.code == "plan.output_busy"
        assert read_journal(sink.journal.path) is not None
        fill(sink, work(base), shares.local.Settings(), only=sink.own)
    assert write_share(work(base), out, Share(2, 2)).missing == ()


@pytest.mark.parametrize("begun", [False, True])
def test_share_without_room_leaves_only_what_others_have(
    begun: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.st"
    if begun:
        write_share(work(base), out, Share(2, 2))
    before = names(tmp_path), begun and names(tmp_path / "out.st.shares")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "extend", full)
    with pytest.raises(ResourceError) as caught:
        write_share(work(base), out, Share(1, 2))
    assert caught.value.code == "resource.disk"
    assert before == (names(tmp_path), begun and names(tmp_path / "out.st.shares"))


def test_holes_of_a_source_are_copied_over_what_was_there(tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.st"
    ones = make.torch.zeros(5_000_000)
    # Between two samples of the fingerprint, so that the work is the same, and where a copy looks
    # for holes, which is at every 16 MiB.
    ones[4_462_500:4_487_500] = 1
    make.save(base, {"a": ones, "b": make.torch.ones(8)})
    write_share(cq.open(base), out, Share(1, 2))
    nbytes = base.stat().st_size
    tail = base.read_bytes()[-32:]
    with base.open("r+b") as file:  # zeros that are a hole
        file.truncate(nbytes - 20_000_000)
        file.truncate(nbytes)
        file.seek(nbytes - 32)
        file.write(tail)
    for number in (1, 2):
        write_share(cq.open(base), out, Share(number, 2))
    assert not make.load(out)["a"].any()


@pytest.mark.parametrize(
    "options",
    [("--shard", "1/2"), ("--shard", "1/2", "-o", "-"), ("-o", "x", "--shard", "1/2", "--restart")],
)
def test_shard_without_a_file_of_its_own_is_a_usage_error(
    options: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    found = run_cq("run", base, *options, cwd=tmp_path)
    assert (found.code, found.out) == (2, "")
    assert "hint: " in found.err
    assert names(tmp_path) == ["base.safetensors"]


@pytest.mark.slow
def test_killed_share_of_a_job_array_comes_again_to_equal_bytes(tmp_path: Path) -> None:
    faults.prepare(tmp_path, blocks=24, width=512)
    words = ["run", "plan.json", "-o", "out.st", "--workers", "1", "--shard"]
    running = {i: faults.start([*words, f"{i}/3"], tmp_path) for i in (1, 2, 3)}
    journal = tmp_path / "out.st.shares" / "2-of-3.journal"
    deadline = time.monotonic() + TIMEOUT
    while not journal.exists() or not journal.read_bytes().count(b"done "):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    running[2][0].kill()
    told = {}
    for number, (process, said) in running.items():
        process.join(TIMEOUT)
        told[number] = ("", "") if number == 2 else said.recv()
    assert [running[number][0].exitcode for number in (1, 2, 3)] == [0, -9, 0]
    assert not (tmp_path / "out.st").exists()
    for number in (1, 3):
        out, err = told[number]
        assert out == ""  # nothing to pass on yet
        assert "2/3" in err
        assert "are done, too" in err
    code, out, err = faults.run([*words, "2/3"], tmp_path)
    assert code == 0, err
    assert "of them were ready; wrote `out.st`" in err
    assert '"kind":"checkpoint"' in out
    write(cq.open(tmp_path / "plan.json"), tmp_path / "whole.st")
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "whole.st").read_bytes()
    assert not (tmp_path / "out.st.shares").exists()


def test_errors_of_shares_are_errors_of_cq(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out.st.shares").write_bytes(b"")
    with pytest.raises(CqError) as caught:
        write_share(work(base), tmp_path / "out.st", Share(1, 2))
    assert caught.value.code == "resource.output"
