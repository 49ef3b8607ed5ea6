"""Hard faults, at real processes: kills, full disks, sources that change, signals; and odd inputs.

What concerns one module alone is tested with it (`test_sink.py`, `test_shares.py`); what needs
hundreds of strikes is `make faults`.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import make
import pytest
import torch

import cq
import cq_quant
from bench import faults
from bench import memory as measured
from cq.cli import options
from cq.cli.main import run as run_line
from cq.cli.output import Terminal
from cq.core import shards
from cq.core.engine import memory
from cq.core.errors import PlanError, ResourceError
from tests.processes import CQ, TIMEOUT, big_model, environment
from tests.processes import cq as run_cq

__all__ = ["big_model"]  # a fixture, used by its name
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cq", "cq_analyze", "cq_edit", "cq_merge", "cq_quant")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / "inputs"
    directory.mkdir()
    return faults.prepare(directory, blocks=6, width=256)


@pytest.mark.slow
@pytest.mark.parametrize("command", faults.COMMANDS, ids=lambda command: command.name)
def test_killed_command_leaves_whole_files_and_comes_again_to_equal_bytes(
    command: faults.Command, inputs: Path
) -> None:
    whole, seconds = faults.undisturbed(inputs, command)
    moments = random.Random(command.name)
    faults.strike(inputs, command, whole, moments.uniform(0, seconds / 3), once_begun=True)
    assert faults.fill_disk(inputs, command, whole, moments.randrange(64))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_disk_that_fills_up_in_the_middle_leaves_nothing(share: float, inputs: Path) -> None:
    command = faults.COMMANDS[0]
    whole, _ = faults.undisturbed(inputs, command)
    limit = int(share * len(whole["out.safetensors"]))
    assert faults.fill_disk(inputs, command, whole, limit)


def test_strike_notices_a_broken_output(inputs: Path) -> None:
    command = faults.COMMANDS[0]
    whole, _ = faults.undisturbed(inputs, command)
    broken = {name: value[:-1] for name, value in whole.items()}
    with pytest.raises(AssertionError):
        faults.strike(inputs, command, broken, 0.0, once_begun=True)


def moments(monkeypatch: pytest.MonkeyPatch, at: Path, kept: Path) -> Callable[[], list[Path]]:
    """Keeps what lies in `at` around every call that changes a file or a name: what a kill at that
    moment would leave."""
    images: list[Path] = []

    def image() -> None:
        images.append(kept / str(len(images)))
        os.mkdir(images[-1])  # noqa: PTH102 - that of Path is watched
        for path in at.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, images[-1] / path.name)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **options: Any) -> Any:
            image()
            result = call(*args, **options)
            image()
            return result

        return around

    changes = ("replace", "unlink", "mkdir", "rmdir")
    for place, names in ((os, ("ftruncate", "pwrite")), (Path, changes)):
        for name in names:
            monkeypatch.setattr(place, name, watched(getattr(place, name)))
    return lambda: images


@pytest.mark.parametrize("force", [False, True])
def test_shards_killed_around_any_change_of_a_file_come_again(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cq.open(make.save(tmp_path / "base.safetensors", make.model(blocks=3)))
    for name in ("whole", "images"):
        (tmp_path / name).mkdir()

    resumed = 0

    def write(directory: Path) -> dict[str, bytes]:
        nonlocal resumed
        out = directory / "out.safetensors"
        done = shards.write_shards(model, out, max_bytes=100_000, workers=1, force=force)
        resumed += done.parts_resumed > 0
        return faults.contents(directory)

    if force:
        old = cq.open(make.save(tmp_path / "old.safetensors", make.model(blocks=3, seed=1)))
        shards.write_shards(old, tmp_path / "whole" / "out.safetensors", max_bytes=100_000)
    before = faults.contents(tmp_path / "whole")
    with monkeypatch.context() as patch:
        images = moments(patch, tmp_path / "whole", tmp_path / "images")
        whole = write(tmp_path / "whole")
    index = "out.safetensors.index.json"
    assert index in whole
    assert len(whole) > 3
    for directory in images():
        found = faults.contents(directory)
        named = {name: value for name, value in found.items() if ".partial" not in name}
        if index in named:  # it speaks of files of one work
            assert named in (before, whole)
        if named == whole and not (directory / f"{index}.partial" / "work.json").exists():
            continue
        assert write(directory) == whole
    assert resumed > 20


@pytest.fixture
def two_models(tmp_path: Path) -> tuple[Path, Path]:
    """Of one shape, and so of one layout, but other numbers."""
    first, second = (make.model(blocks=2, seed=seed) for seed in (0, 1))
    return make.save(tmp_path / "a.st", first), make.save(tmp_path / "b.st", second)


@contextmanager
def stopped_at(shard: int) -> Iterator[None]:
    """Within it a run is stopped when it begins with that shard, which must come to pass."""
    write, count = shards.write, 0

    def stopping(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == shard:
            raise KeyboardInterrupt
        return write(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write", stopping)
        yield


def test_shards_of_another_model_in_the_way_are_never_taken_for_finished(
    two_models: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = map(cq.open, two_models)
    size = 100_000
    for name in ("out", "whole"):
        (tmp_path / name).mkdir()
    out = tmp_path / "out" / "m.safetensors"
    shards.write_shards(new, tmp_path / "whole" / "m.safetensors", max_bytes=size)
    shards.write_shards(old, out, max_bytes=size)
    before = faults.contents(out.parent)
    with stopped_at(2):
        shards.write_shards(new, out, max_bytes=size, force=True)
    found = faults.contents(out.parent)
    assert {name: found[name] for name in before} == before, "all of the old one is there"
    shards.write_shards(new, out, max_bytes=size, force=True)
    assert faults.contents(out.parent) == faults.contents(tmp_path / "whole")


def test_shards_restart_from_the_command_line(
    two_models: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    with stopped_at(2):
        shards.write_shards(cq.open(two_models[0]), out, max_bytes=100_000)
    words = ["edit", str(two_models[1]), "--max-shard-size", "100kB", "-o", str(out)]
    done = run_cq(*words)
    assert (done.code, "`--restart`" in done.err) == (4, True)
    assert run_cq(*words, "--restart").code == 0
    written, source = cq.open(out.with_name("m.safetensors.index.json")), cq.open(two_models[1])
    assert all(make.same(written.read(n), source.read(n)) for n in source.specs)


def test_shards_whose_first_one_fails_leave_nothing(
    two_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise ResourceError("no room", code="resource.disk")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(ResourceError, match="no room"):
        shards.write_shards(cq.open(two_models[0]), tmp_path / "m.safetensors", max_bytes=100_000)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("restart", [False, True])
def test_shards_leave_foreign_files_alone_where_they_are_made(
    restart: bool, tmp_path: Path
) -> None:
    model = cq.open(make.save(tmp_path / "base.safetensors", make.model(blocks=1)))
    path = tmp_path / "out.safetensors.index.json.partial"

    def refused() -> None:
        with pytest.raises(PlanError, match="is not cq's"):
            shards.write_shards(
                model, tmp_path / "out.safetensors", max_bytes=100_000, restart=restart
            )

    path.write_bytes(b'{\n  "metadata": a download')
    refused()
    assert path.read_bytes() == b'{\n  "metadata": a download'
    path.unlink()
    os.mkfifo(path)
    refused()
    path.unlink()
    for inside in ("notes.txt", "x-00001-of-00002.safetensors"):
        path.mkdir()
        (path / inside).write_bytes(b"foreign")
        refused()
        assert (path / inside).read_bytes() == b"foreign"
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "note",
    [b"", b"{", b"[]", b'{"work":1}', b'{"work":"a","left":["\\u0000"]}', b"\x00" * 100],
)
def test_damaged_notes_of_shards_are_one_error_and_can_be_discarded(
    note: bytes, two_models: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    with stopped_at(2):
        shards.write_shards(cq.open(two_models[0]), out, max_bytes=100_000)
    (tmp_path / "m.safetensors.index.json.partial" / "work.json").write_bytes(note)
    with pytest.raises(PlanError):
        shards.write_shards(cq.open(two_models[0]), out, max_bytes=100_000)
    shards.write_shards(cq.open(two_models[0]), out, max_bytes=100_000, restart=True)
    assert not list(tmp_path.glob("*.partial"))


def test_shards_are_written_by_one_run_at_a_time(
    two_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.safetensors"
    write, errors = shards.write, []

    def meanwhile(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "write", write)
            for model in two_models:
                with pytest.raises(PlanError) as caught:
                    shards.write_shards(cq.open(model), out, max_bytes=100_000, restart=True)
                errors.append(caught.value.code)
        return write(*args, **options)

    monkeypatch.setattr(shards, "write", meanwhile)
    shards.write_shards(cq.open(two_models[0]), out, max_bytes=100_000)
    assert set(errors) == {"plan.output_busy"}
    written = cq.open(out.with_name("m.safetensors.index.json"))
    assert all(make.same(written.read(n), cq.open(two_models[0]).read(n)) for n in written.specs)


def test_shards_for_which_there_is_no_room_are_refused_before_any_work(
    two_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 100_000))
    monkeypatch.setattr(shards, "write", None)
    with pytest.raises(ResourceError, match="takes") as caught:
        shards.write_shards(cq.open(two_models[0]), tmp_path / "m.safetensors", max_bytes=100_000)
    assert caught.value.code == "resource.disk"
    assert sorted(tmp_path.iterdir()) == before


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize("name", ["out.st.partial", "out.st.partial.journal"])
def test_a_pipe_of_a_working_name_is_in_the_way(name: str, tmp_path: Path) -> None:
    base = make.save(tmp_path / "base.safetensors", make.model(blocks=1))
    os.mkfifo(tmp_path / name)
    for restart in (False, True):
        with pytest.raises(PlanError, match="not a regular file"):
            cq.write(cq.open(base), tmp_path / "out.st", restart=restart)
    assert stat.S_ISFIFO((tmp_path / name).lstat().st_mode)
    assert not (tmp_path / "out.st").exists()


@pytest.fixture
def stopped(big_model: Path, tmp_path: Path) -> Any:
    """A run that has begun to write and stands still, of a source that is its own."""
    source = tmp_path / "source.safetensors"
    source.write_bytes(big_model.read_bytes())
    yield from begun(source, tmp_path, tmp_path / "out.st.partial.journal", "-o", "out.st")


def begun(source: Path, place: Path, journal: Path, *words: str) -> Iterator[Any]:
    """A run in `place` that has noted two parts in `journal` and was stopped; and its source."""
    process = subprocess.Popen(
        [*CQ, "quant", str(source), "--workers", "1", *words],
        cwd=place,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT
    while not journal.exists() or journal.read_bytes().count(b"done ") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    yield process, source
    process.kill()
    process.communicate()


def cut(source: Path) -> None:
    os.truncate(source, source.stat().st_size // 2)


def rewrite(source: Path) -> None:
    with source.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


@pytest.mark.slow
@pytest.mark.parametrize(("harm", "word"), [(cut, "cut while"), (rewrite, "was changed while")])
def test_source_that_changes_under_a_run_is_one_error_and_leaves_nothing(
    harm: Callable[[Path], None], word: str, stopped: Any, tmp_path: Path
) -> None:
    process, source = stopped
    harm(source)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (3, ""), err
    assert err.count("error:") == 1
    assert word in err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_directory_that_is_removed_under_a_run_is_one_error(
    big_model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for process, _ in begun(big_model, place, place / "out.st.partial.journal", "-o", "out.st"):
        shutil.rmtree(place)
        process.send_signal(signal.SIGCONT)
        told, err = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, told) == (5, ""), err
        assert err.count("error:") == 1
        assert "error: cannot write `out.st`: no such file or directory" in err
        assert list(tmp_path.iterdir()) == []


# Places that take nothing -------------------------------------------------------------------------

# A real process for which a directory is read-only, as no permission is for root.
READ_ONLY = """
import errno, os, sys
place = os.path.realpath(sys.argv.pop(1)) + os.sep
opened = os.open
def refused(call):
    def around(path, *words, **more):
        writes = call is not opened or words[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and os.path.realpath(path).startswith(place):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return call(path, *words, **more)
    return around
for name in ("open", "mkdir", "unlink", "rename", "replace", "rmdir"):
    setattr(os, name, refused(getattr(os, name)))
from cq.cli.entry import main
main()
"""
OUTPUTS = {
    "quant": ("quant", "b.safetensors", "-o", "{}/o.st"),
    "merge": ("merge", "b.safetensors", "b.safetensors:0.5", "-o", "{}/o.st"),
    "edit": ("edit", "b.safetensors", "--remove-keys", "step", "-o", "{}/o.st"),
    "run": ("run", "plan.json", "-o", "{}/o.st"),
    "share": ("run", "plan.json", "-o", "{}/o.st", "--shard", "1/2"),
    "shards": ("run", "plan.json", "-o", "{}/o.safetensors", "--max-shard-size", "50kB"),
    "report": ("analyze", "b.safetensors", "--deep", "--report", "{}/r.html"),
    "junit": ("verify", "b.safetensors", "--junit", "{}/v.xml"),
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model and a plan."""
    monkeypatch.chdir(tmp_path)
    base = make.save(tmp_path / "b.safetensors", make.model(blocks=1))
    plan = cq_quant.quantize(cq.open(base), format="float8_e4m3fn").manifest()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("words", [OUTPUTS[name] for name in ("merge", "run", "share", "shards")])
def test_read_only_directory_is_one_error_and_is_left_as_it_was(
    words: tuple[str, ...], sources: Path
) -> None:
    place = sources / "place"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(place), *(word.format("place") for word in words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(PYTHONPATH=str(ROOT)),
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr.count("error:")) == (5, 1), done.stderr
    assert "read-only file system" in done.stderr
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "a file"])
@pytest.mark.parametrize("words", OUTPUTS.values(), ids=OUTPUTS)
def test_directory_that_is_none_is_one_error_before_any_work(
    words: tuple[str, ...], kind: str, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = sources / "place"
    if kind == "a file":
        place.write_text("not a directory")
    before = faults.contents(sources)
    assert quiet(*(word.format("place") for word in words)) == 5
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "place" in err
    assert faults.contents(sources) == before


@pytest.mark.slow
def test_current_directory_that_was_removed_is_one_error(sources: Path, tmp_path: Path) -> None:
    for words in (("analyze", "../b.safetensors"), ("quant", sources / "b.safetensors")):
        script = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *CQ, *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(PYTHONPATH=str(ROOT)),
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 5, done.stderr
        assert "error: the current directory does not exist any more" in done.stderr


@pytest.mark.slow
def test_sigterm_keeps_finished_work_and_exits_143(stopped: Any, tmp_path: Path) -> None:
    process, source = stopped
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (143, "")
    assert "error: terminated\n\nhint: run the same command again to go on" in err
    again = run_cq("quant", source, "-o", "out.st", cwd=tmp_path)
    assert again.code == 0
    assert "parts were ready" in again.err


def test_what_a_library_makes_of_a_signal_is_no_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "asked_to_stop", [options.Terminating()])

    def body() -> int:
        raise ImportError("cannot load module more than once per process")

    assert options.guard(Terminal(), body) == 143
    assert capsys.readouterr().err == "error: terminated\n"
    monkeypatch.setattr(options, "asked_to_stop", [])
    assert options.guard(Terminal(), body) == 70


def test_sigterm_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    script = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "sys.argv = ['cq', '--version']; from cq.cli.entry import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def quiet(*argv: object) -> int:
    return run_line([str(word) for word in argv], Terminal())


ODD = {
    "blocks.0.linear.weight": make.weight(64, 128, dtype="BF16"),
    "blocks.0.conv.weight": make.weight(8, 4, 3, 3, 3, dtype="F16"),
    "scalar": make.weight(dtype="F32"),
    "empty": torch.empty(0, 7),
    "hollow": torch.empty(3, 0, 2, dtype=torch.int8),
    "one.weight": make.weight(1, 1),
    "слой.重み 🎨": make.weight(3),
    "blocks.0." + "n" * 3000: make.weight(2),
}


@pytest.mark.parametrize(
    "words",
    [
        ("quant", "--optimizer", "rtn"),
        ("quant", "--format", "fp32"),
        ("quant", "--format", "nvfp4"),
        ("merge",),
        ("edit", "--set-meta", "a=b"),
        ("edit", "--cast", "*=fp16"),
        ("run",),
    ],
    ids=" ".join,
)
def test_tensors_of_odd_shapes_and_names_pass_every_command(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make.save(tmp_path / "größe 模型.safetensors", ODD)
    lora = {
        "blocks.0.linear.lora_A.weight": make.weight(4, 128),
        "blocks.0.linear.lora_B.weight": make.weight(64, 4),
    }
    adapters = [make.save(tmp_path / "l.safetensors", lora)] if words == ("merge",) else []
    out = tmp_path / "aus gabe\n💾.safetensors"
    assert quiet(words[0], model, *adapters, *words[1:], "-o", out) == 0, capsys.readouterr().err
    made = make.load(out)
    assert {name: tuple(t.shape) for name, t in made.items() if name in ODD} == {
        name: tuple(t.shape)
        for name, t in ODD.items()
        if name in made and not (words[-1] == "nvfp4" and name == "blocks.0.linear.weight")
    } | ({"blocks.0.linear.weight": (64, 64)} if words[-1] == "nvfp4" else {})
    assert set(ODD) <= set(made)
    for command in ("verify", "analyze"):
        assert quiet(command, out) in {0, 1}, capsys.readouterr().err


@pytest.mark.parametrize("length", [240, 250, 255, 256, 5000])
def test_output_name_of_any_length_is_written_or_one_error(
    length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make.save(tmp_path / "b.safetensors", make.model(blocks=1))
    name = "o" * (length - len(".safetensors")) + ".safetensors"
    for shard in ((), ("--shard", "1/1")):
        code = quiet("run", base, "-o", tmp_path / name, "--force", *shard)
        err = capsys.readouterr().err
        left = sorted(p.name for p in tmp_path.iterdir())
        if code:
            assert (code, err.count("error:"), left) == (5, 1, ["b.safetensors"]), err
        else:
            assert left == sorted(["b.safetensors", name])
            (tmp_path / name).unlink()
    assert code == (0 if length == 240 else 5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a peak that begins anew")
@pytest.mark.parametrize("limit", [40, 100])
def test_memory_limit_holds_in_a_real_process(limit: int, tmp_path: Path) -> None:
    """Eight workers, of whom a small limit lets few run."""
    for name, layers in (("tiny", 8), ("wide", 24)):
        columns = 64 if name == "tiny" else 2048
        tensors = {f"blocks.{i}.linear.weight": make.weight(64, columns) for i in range(layers)}
        if name == "wide":
            tensors = {n: w.repeat(16, 1).bfloat16() for n, w in tensors.items()}
        make.save(tmp_path / f"{name}.safetensors", tensors)
    tiny, wide = (
        measured.quant(tmp_path, name, "quip", "int8_tensorwise") for name in ("tiny", "wide")
    )
    taken = measured.growth(tiny, [*wide, "--memory-limit", f"{limit}MB", "-q"])
    assert 8_000_000 < taken < measured.ALLOWED * limit * 1_000_000


def test_freed_memory_is_kept_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(memory, "_set_thresholds", kept.append)
    monkeypatch.setattr(memory, "_may_keep", False)
    memory.fit(1 << 40, 1)
    assert kept == []  # in a library's host nothing is touched
    monkeypatch.setattr(memory, "_may_keep", True)
    memory.fit(400 << 20, 100 << 20)
    memory.fit(200 << 20, 100 << 20)
    assert kept[0] > 1 << 20 > kept[1]


def test_no_clock_that_can_jump_decides_anything() -> None:
    asked = {"time.time", "datetime.now", "datetime.utcnow", "date.today", "time.localtime"}
    found = []
    for path in (p for name in PACKAGES for p in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in asked:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_source_from_the_future_is_resumed_as_any_other(tmp_path: Path) -> None:
    base = make.save(tmp_path / "base.safetensors", make.model(blocks=1))
    os.utime(base, ns=(1 << 61, 1 << 61))
    cq.write(cq.open(base), tmp_path / "out.st")
    assert make.load(tmp_path / "out.st").keys() == make.load(base).keys()


def test_no_output_replaces_what_the_command_reads(tmp_path: Path) -> None:
    base = str(make.save(tmp_path / "base.safetensors", make.model(blocks=1)))
    plan, recipe = tmp_path / "plan.json", tmp_path / "layers.json"
    plan.write_text(json.dumps(cq.open(base).manifest()))
    recipe.write_text('{"cq": 1, "kind": "recipe", "rules": [{"layers": "*", "skip": true}]}')
    before = faults.contents(tmp_path)
    for words in (
        ("quant", base, "--recipe", str(recipe), "-o", str(recipe), "--force"),
        ("run", str(plan), "-o", str(plan), "--force"),
        ("run", str(plan), "-o", str(plan), "--force", "--shard", "1/1"),
        ("run", str(plan), "-o", "/", "--force"),
        ("run", str(plan), "-o", "/", "--shard", "1/2"),
        ("run", str(plan), "-o", "/proc/self/fd/1", "--force"),
    ):
        assert quiet(*words) == 4, words
    assert faults.contents(tmp_path) == before


def test_documents_beyond_all_measure_are_refused_unread(tmp_path: Path) -> None:
    for name in ("model.safetensors.index.json", "layers.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
    base = str(make.save(tmp_path / "base.safetensors", make.model(blocks=1)))
    assert quiet("analyze", str(tmp_path / "model.safetensors.index.json")) == 3
    assert quiet("quant", base, "--recipe", str(tmp_path / "layers.json"), "--dry-run") == 3
