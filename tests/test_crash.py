"""Killed processes: whatever the moment, the final name holds a whole file or nothing."""

from __future__ import annotations

import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import BASE, CQ, STYLE, TIMEOUT, big_model, cq, environment, shell

__all__ = ["big_model"]  # a fixture, used by its name
pytestmark = pytest.mark.slow


def start(*args: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*CQ, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )


def wait_for(journal: Path, process: subprocess.Popen[bytes], parts: int = 0) -> None:
    """Wait until `journal` is there and names at least `parts` finished parts."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"done ") >= parts:
            return
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("optimizer", ["rtn", "quip"])
def test_kill_at_random_moments_then_resume_gives_equal_bytes(
    optimizer: str, big_model: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.st", tmp_path / "out.st"
    command = ("quant", big_model, "--optimizer", optimizer)
    assert cq(*command, "-q", "-o", whole, "--workers", "2").code == 0
    moments = random.Random(optimizer)
    killed = 0
    for _ in range(2):
        process = start(*command, "-o", out, "--workers", "1")
        wait_for(tmp_path / "out.st.partial.journal", process, parts=moments.choice([0, 1, 9, 30]))
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        killed += process.wait(TIMEOUT) == -signal.SIGKILL
        if out.exists():
            break
    assert killed > 0
    if not out.exists():
        again = cq(*command, "-o", out)
        assert again.code == 0, again.err
        assert "parts were ready" in again.err
    assert whole.read_bytes() == out.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.st", "whole.st"]


def test_kill_of_a_whole_pipeline_then_resume_gives_equal_bytes(tmp_path: Path) -> None:
    line = f"cq merge {BASE} {STYLE} | cq quant -o {{}} -q > /dev/null"
    assert shell(line.format("whole.st"), tmp_path).code == 0
    start_cq = " ".join(shlex.quote(part) for part in CQ)
    process = subprocess.Popen(
        ["bash", "-c", f'cq() {{ {start_cq} "$@"; }}\n{line.format("out.st")}'],
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
    )
    wait_for(tmp_path / "out.st.partial.journal", process)
    subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
    process.wait(TIMEOUT)
    assert shell(line.format("out.st"), tmp_path).code == 0
    assert (tmp_path / "whole.st").read_bytes() == (tmp_path / "out.st").read_bytes()


def test_other_work_on_the_same_output_asks_for_restart(big_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    process = start("quant", big_model, "-o", out, "--workers", "1")
    wait_for(tmp_path / "out.st.partial.journal", process, parts=1)  # before, nothing is lost
    process.kill()
    process.wait(TIMEOUT)
    assert not out.exists()
    other = cq("quant", big_model, "--optimizer", "rtn", "-o", out)
    assert other.code == 4
    assert "`--restart`" in other.err
    assert cq("quant", big_model, "--optimizer", "rtn", "-o", out, "--restart").code == 0


def test_two_runs_on_one_output_do_not_mix(big_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    first = start("quant", big_model, "-o", out, "--workers", "1")
    wait_for(tmp_path / "out.st.partial.journal", first)
    first.send_signal(signal.SIGSTOP)
    second = cq("quant", big_model, "-o", out)
    first.send_signal(signal.SIGCONT)
    assert second.code == 4
    assert "another run is writing" in second.err
    assert first.wait(TIMEOUT) == 0
    assert out.exists()
