"""Pipes, streams and terminals, with real processes: what an in-process runner cannot show."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.processes import (
    BASE,
    CQ,
    STYLE,
    TIMEOUT,
    at_terminal,
    big_model,
    cq,
    environment,
    shell,
)

__all__ = ["big_model"]  # a fixture, used by its name
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the digits pipeline's output, made by the fused pipe of the README."""
    folder = tmp_path_factory.mktemp("made")
    done = shell(f"cq merge {BASE} {STYLE}:0.8 | cq quant --optimizer quip -o fused.st", folder)
    assert (done.code, (folder / "fused.st").is_file()) == (0, True), done.err
    return folder


def test_pipe_fused_equals_staged_byte_for_byte(made: Path, tmp_path: Path) -> None:
    done = shell(
        f"cq merge {BASE} {STYLE}:0.8 -o merged.st | cq quant --optimizer quip -o staged.st",
        tmp_path,
    )
    assert done.code == 0, done.err
    assert (made / "fused.st").read_bytes() == (tmp_path / "staged.st").read_bytes()


def test_pipe_leaves_nothing_but_the_output(made: Path) -> None:
    assert [p.name for p in made.iterdir()] == ["fused.st"]


def test_merge_in_a_pipe_prints_one_manifest_line_and_writes_nothing(tmp_path: Path) -> None:
    done = cq("merge", BASE, f"{STYLE}:0.8", cwd=tmp_path)
    assert done.code == 0
    assert done.out.count("\n") == 1
    manifest = json.loads(done.out)
    assert (
        manifest["cq"],
        manifest["kind"],
        manifest["stages"][0]["op"],
    ) == (1, "checkpoint", "merge")
    assert "nothing was written" in done.err
    assert list(tmp_path.iterdir()) == []


def test_quant_ends_a_pipeline_with_a_file_beside_the_source(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(BASE.read_bytes())
    done = shell(f"cq merge {source.name} {STYLE} | cq quant", tmp_path)
    assert done.code == 0, done.err
    written = tmp_path / "model-merged-int8_tensorwise.safetensors"
    assert str(written) == json.loads(done.out)["source"][0]["path"]
    again = shell(f"cq merge {source.name} {STYLE} | cq quant", tmp_path)
    assert again.code == 4
    assert "exists already" in again.err


def test_deferred_quantization_is_verified_without_a_file(tmp_path: Path) -> None:
    done = shell(
        f"cq quant {BASE} --defer | cq verify --against {BASE} --min-sqnr 30 --json", tmp_path
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["kind"] == "verify"
    assert list(tmp_path.iterdir()) == []


def test_verify_gate_exits_1_when_it_does_not_hold(tmp_path: Path) -> None:
    done = shell(f"cq quant {BASE} --defer | cq verify --against {BASE} --min-sqnr 90", tmp_path)
    assert done.code == 1


def test_bytes_on_stdout_equal_the_file(made: Path, tmp_path: Path) -> None:
    done = shell(f"cq merge {BASE} {STYLE}:0.8 | cq quant -o - > streamed.st", tmp_path)
    assert done.code == 0, done.err
    assert (made / "fused.st").read_bytes() == (tmp_path / "streamed.st").read_bytes()


def test_bytes_on_stdin_are_a_checkpoint(tmp_path: Path) -> None:
    done = shell(f"cat {BASE} | cq quant -o out.st && cq quant {BASE} -o direct.st", tmp_path)
    assert done.code == 0, done.err
    with (
        safe_open(tmp_path / "out.st", "pt") as piped,
        safe_open(tmp_path / "direct.st", "pt") as direct,
    ):
        assert sorted(piped.keys()) == sorted(direct.keys())
        for name in sorted(piped.keys()):
            assert piped.get_tensor(name).equal(direct.get_tensor(name))


def test_bytes_on_stdin_cannot_be_passed_on(tmp_path: Path) -> None:
    done = shell(f"cat {BASE} | cq quant --defer", tmp_path)
    assert done.code == 2
    assert done.out == ""
    assert "hint: add `-o FILE`" in done.err


def test_failed_upstream_fails_the_pipeline_without_pipefail(tmp_path: Path) -> None:
    done = shell(
        "cq merge missing.safetensors also-missing.safetensors | cq quant -o x.st", tmp_path
    )
    assert done.code == 3
    assert "`missing.safetensors` does not exist" in done.err
    assert "stdin is empty" in done.err
    assert list(tmp_path.iterdir()) == []


def test_missing_input_never_waits_on_a_terminal_or_dev_null(tmp_path: Path) -> None:
    assert at_terminal("quant", cwd=tmp_path).code == 2
    done = cq("quant", stdin=None)
    assert done.code == 2
    assert "missing argument `MODEL`" in done.err


@pytest.mark.parametrize("reader", ["head -c 0", "true"])
def test_reader_of_a_document_may_leave_early(reader: str, tmp_path: Path) -> None:
    done = shell(f"cq plugins --json | {reader}; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert done.out.strip() == "0"
    assert done.err == ""


def test_lost_reader_of_bytes_is_141(tmp_path: Path) -> None:
    done = shell(f"cq quant {BASE} -q -o - | head -c 100 > part; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert done.out.strip() == "141"
    assert done.err == ""


def test_quiet_says_nothing(tmp_path: Path) -> None:
    done = cq("quant", BASE, "-q", "-o", tmp_path / "x.st")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["source"][0]["path"] == str(tmp_path / "x.st")


def test_progress_in_a_pipe_is_lines_on_stderr(big_model: Path, tmp_path: Path) -> None:
    done = cq("quant", big_model, "-o", tmp_path / "x.st")
    assert "quant: 100 % (" in done.err
    assert "\x1b" not in done.err + done.out
    small = cq("quant", BASE, "-o", tmp_path / "y.st")
    assert " % (" not in small.err


def test_json_error_leaves_stdout_empty(tmp_path: Path) -> None:
    done = cq("quant", tmp_path / "none.safetensors", "--json")
    assert (done.code, done.out) == (3, "")
    error = json.loads(done.err)
    assert (error["kind"], error["exit"], error["code"]) == ("error", 3, "input.missing")


def test_merge_at_a_terminal_shows_the_plan_and_how_to_write_it(tmp_path: Path) -> None:
    done = at_terminal("merge", BASE, f"{STYLE}:0.8", cwd=tmp_path)
    assert done.code == 0
    assert "style.safetensors" in done.out
    assert "nothing was written" in done.out
    assert "hint: add `-o FILE` to write it" in done.out
    assert '"stages"' not in done.out


def test_bytes_are_refused_at_a_terminal(tmp_path: Path) -> None:
    done = at_terminal("quant", BASE, "-o", "-", cwd=tmp_path)
    assert done.code == 2
    assert "put tensors on the terminal" in done.out


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_is_off_when_asked(name: str, value: str, tmp_path: Path) -> None:
    plain = at_terminal("plugins", cwd=tmp_path, **{name: value})
    assert plain.code == 0
    assert "\x1b[3" not in plain.out


def test_manifest_from_a_pipe_is_run_from_a_file(made: Path, tmp_path: Path) -> None:
    line = (
        f"cq merge {BASE} {STYLE}:0.8 | cq quant --defer > plan.json"
        " && cq run plan.json -o ran.st && cat plan.json | cq run -o piped.st"
    )
    done = shell(line, tmp_path)
    assert done.code == 0, done.err
    fused = (made / "fused.st").read_bytes()
    assert fused == (tmp_path / "ran.st").read_bytes()
    assert fused == (tmp_path / "piped.st").read_bytes()


def test_interrupt_keeps_finished_work_and_says_how_to_go_on(
    big_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.st"
    process = subprocess.Popen(
        [*CQ, "quant", str(big_model), "-o", str(out), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        # A job started in the background by a shell would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if b" % (" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert not out.exists()
    assert (tmp_path / "out.st.partial").exists()
    again = cq("quant", big_model, "-o", out)
    assert again.code == 0
    assert "parts were ready" in again.err


def test_help_and_header_paths_import_no_torch(made: Path, tmp_path: Path) -> None:
    probe = (
        "import sys; from cq.cli.main import run; from cq.cli.output import Terminal;"
        "code = run(sys.argv[1:], Terminal());"
        "print('torch' in sys.modules, 'numpy' in sys.modules, code, file=sys.stderr)"
    )
    for argv in (
        ["--help"],
        ["quant", "--help"],
        ["completions", "bash"],
        ["plugins", "--json"],
        ["merge", str(BASE), str(STYLE), "--dry-run"],
        ["quant", str(BASE), "--dry-run", "--json"],
        ["quant", str(BASE), "--defer"],
        ["verify", str(made / "fused.st"), "--header-only"],
        ["verify", str(BASE), "--header-only", "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", probe, *argv],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=TIMEOUT,
            check=False,
        )
        assert done.stderr.split("\n")[-2] == "False False 0", (argv, done.stderr)


def test_unreadable_terminal_streams_do_not_crash(tmp_path: Path) -> None:
    """Closed stderr: the exit code still speaks."""
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m cq.cli.entry quant none.safetensors 2>&-'],
        capture_output=True,
        cwd=tmp_path,
        env=environment(),
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 3
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - names are all that matters


def test_fused_equals_staged_through_a_linked_base(tmp_path: Path) -> None:
    """As in a cache whose names are links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc123").write_bytes(BASE.read_bytes())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc123")
    line = f"""cq merge model.safetensors {STYLE} | cq quant -q > /dev/null
cq merge model.safetensors {STYLE} -q -o merged.st | cq quant -q -o staged.st > /dev/null"""
    done = shell(line, tmp_path)
    assert done.code == 0, done.err
    fused = tmp_path / "model-merged-int8_tensorwise.safetensors"
    assert fused.read_bytes() == (tmp_path / "staged.st").read_bytes()
    assert ["abc123"] == [p.name for p in (tmp_path / "blobs").iterdir()]


@pytest.mark.parametrize(
    "line",
    ["cq plugins", "cq plugins --json", f"cq quant {BASE} -q -o -", f"cq quant {BASE} --dry-run"],
)
def test_full_disk_behind_stdout_is_5(line: str, tmp_path: Path) -> None:
    done = shell(f"{line} > /dev/full", tmp_path)
    assert done.code == 5
    assert "cannot write" in done.err
    assert "no space left" in done.err
    assert "bug" not in done.err + done.out


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "there.st"),
        ("-o", "-"),
        ("--memory-limit", "abc"),
        ("--memory-limit", "1MB"),
        ("--skip", "nothing*"),
    ],
)
def test_json_errors_are_one_object(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "there.st").write_bytes(b"mine")
    done = cq("quant", BASE, "--json", *options, cwd=tmp_path)
    assert done.code in {2, 4, 5}
    assert done.out == ""
    assert json.loads(done.err)["kind"] == "error"


@pytest.mark.parametrize(
    "options",
    [("-o", "there.st"), ("--memory-limit", "1MB"), ("-o", "none/x.st"), ("-o", "-", "--force")],
)
def test_dry_run_fails_where_the_run_would(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "there.st").write_bytes(b"mine")
    dry = cq("quant", BASE, "--dry-run", *options, cwd=tmp_path)
    wet = cq("quant", BASE, *options, cwd=tmp_path)
    assert wet.code != 0
    assert (wet.code, wet.err) == (dry.code, dry.err)


def test_input_is_never_the_output_whatever_it_came_through(tmp_path: Path) -> None:
    model, plan = tmp_path / "model.st", tmp_path / "plan.json"
    model.write_bytes(BASE.read_bytes())
    assert shell("cq quant -q --force -o model.st < model.st", tmp_path).code == 4
    assert model.read_bytes() == BASE.read_bytes()
    assert shell("cq quant -q --defer model.st > plan.json", tmp_path).code == 0
    before = plan.read_bytes()
    assert shell("cq run -q --force plan.json -o plan.json", tmp_path).code == 4
    assert plan.read_bytes() == before


def test_interrupt_at_any_moment_is_quiet(tmp_path: Path) -> None:
    """Before the first line, while planning, while computing, and after the end."""
    moments = random.Random(7)
    for _ in range(4):
        process = subprocess.Popen(
            [*CQ, "verify", "-q", str(BASE)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        time.sleep(moments.uniform(0, 2.5))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode in {0, 130, -signal.SIGINT}, err
        assert b"Traceback" not in err
        assert b"bug" not in err


def test_interrupt_that_python_drops_comes_again() -> None:
    """Python drops exceptions of finalizers and of its import locks' callbacks: a Ctrl-C too."""
    script = """
import sys, time
from cq.cli import main

class Finalized:
    def __del__(self):
        raise KeyboardInterrupt

sys.unraisablehook = main._unraisable
try:
    Finalized()
    time.sleep(20)
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (130, b"")


def test_lost_reader_of_talk_does_not_change_the_exit_code(tmp_path: Path) -> None:
    line = f"cq quant {BASE} -o out.st 2> >(head -c 1 > /dev/null) > /dev/null; echo $?"
    assert shell(line, tmp_path).out.strip() == "0"
    line = "cq quant missing.st 2> >(true); echo $?"
    assert shell(line, tmp_path).out.strip() == "3"
