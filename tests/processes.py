"""Running `cq` as real processes: alone, in pipes, at a terminal, and killed."""

from __future__ import annotations

import os
import pty
import select
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import faults

CQ = [sys.executable, "-m", "cq.cli.entry"]
DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
BASE = DIGITS / "digits.safetensors"
STYLE = DIGITS / "style.safetensors"
TIMEOUT = 120


@dataclass(frozen=True)
class Result:
    """How a process ended."""

    code: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what changes output, and with `changes`. Comfy-kitchen,
    whose import takes longer than most commands, is left out unless they say otherwise."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in {"NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "CQ_DEBUG", "TMPDIR"}
    }
    return {**clean, "TERM": "xterm-256color", "CQ_KITCHEN": "0", **changes}


def cq(*args: object, stdin: bytes | None = b"", cwd: Path | None = None, **env: str) -> Result:
    """Run one command with pipes for all streams; `stdin` None is /dev/null."""
    done = subprocess.run(
        [*CQ, *map(str, args)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        cwd=cwd,
        env=environment(**env),
        timeout=TIMEOUT,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def quick(*args: object, cwd: Path | None = None) -> Result:
    """Run one command in a process that has begun with torch; where only what it does matters, not
    how it begins. Not for `verify`, which would import comfy-kitchen."""
    return Result(*faults.run([*map(str, args)], cwd or Path.cwd()))


def shell(line: str, cwd: Path, *, pipefail: bool = False) -> Result:
    """Run a shell line in which `cq` is this cq."""
    start = " ".join(shlex.quote(part) for part in CQ)
    script = f'{"set -o pipefail;" if pipefail else ""} cq() {{ {start} "$@"; }}\n{line}'
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        cwd=cwd,
        env=environment(),
        timeout=TIMEOUT,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode())


def at_terminal(*args: object, cwd: Path, **env: str) -> Result:
    """Run one command with a terminal for stdin, stdout and stderr; all output is in `out`."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*CQ, *map(str, args)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=cwd,
        env=environment(**env),
    )
    os.close(slave)
    seen = b""
    while True:
        ready, _, _ = select.select([master], [], [], TIMEOUT)
        if not ready:
            process.kill()
            raise TimeoutError(seen.decode())
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the last writer has closed it
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    return Result(process.wait(), seen.decode(), "")


@pytest.fixture(scope="session")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB in 40 layers: work that lasts long enough to be cut off in the middle."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1024, 1280, generator=generator)
    layers = {f"blocks.{i}.linear.weight": (rows * (1 + i / 40)).bfloat16() for i in range(40)}
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    save_file(layers, path)
    return path
