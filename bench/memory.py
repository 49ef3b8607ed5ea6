"""Whether `--memory-limit` holds: peak memory of real processes over optimizers, formats, limits.

Owns the measure: the peak RSS of `cq quant` on a model of wide layers, less that of the same
command on a model of nothing, which is the library. It may pass the limit by 10 %. A limit that one
layer alone exceeds must be refused before any work, with the figure that is needed, and that figure
must do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOWED = 1.10
_MB = 1_000_000
_NEEDS = re.compile(r"needs ([0-9.]+) MB")
CALIBRATED = frozenset({"gptq", "learned"})

_PREPARE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from cq.core import calibration
from cq.core.calibration import Statistics
place, blocks, rows, columns = Path(sys.argv[1]), *map(int, sys.argv[2:])
rng = torch.Generator().manual_seed(3)
def made(rows, columns, count, name):
    layers = {f"blocks.{i}.linear": torch.randn(rows, columns, generator=rng).bfloat16() * 0.02
              for i in range(count)}
    save_file({f"{n}.weight": w for n, w in layers.items()}, place / f"{name}.safetensors")
    def noted():
        x = torch.randn(128, columns, generator=rng)
        return dict(diag=x.square().mean(0), sketch=x[:64] / 12, rows=128)
    found = {}
    for n in layers:
        first, held = noted(), noted()
        found[n] = Statistics(**first, mean=torch.zeros(columns), absmax=torch.ones(columns) * 4,
                              held_diag=held["diag"], held_sketch=held["sketch"], held_rows=128)
    calibration.save(place / f"{name}.calib.safetensors", found, force=True)
made(64, 256, 1, "tiny")
made(rows, columns, blocks, "wide")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One command: its exit code, what it said, and its peak resident bytes."""

    code: int
    err: str
    rss: int


def prepare(place: Path, *, blocks: int, rows: int, columns: int) -> None:
    """Write the models and their calibrations; in a process of its own, as torch would count."""
    words = [str(place), str(blocks), str(rows), str(columns)]
    subprocess.run([sys.executable, "-c", _PREPARE, *words], check=True)


def measure(argv: Sequence[str]) -> Measured:
    """Run `cq ARGV` as a process. Call it from one without torch: a child's peak begins with its
    parent's."""
    with tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "cq.cli.entry", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=err,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        told = err.read().decode(errors="replace")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(code=process.returncode, err=told, rss=usage.ru_maxrss * unit)


def growth(first: Sequence[str], then: Sequence[str]) -> int:
    """By how many bytes the peak of a process passes what it holds after the command line `first`,
    while it runs `then`: a quick measure on Linux, without starting torch anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cq.cli.main", "cq_quant.stage", "torch"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_grow, args=(list(first), list(then), there))
    process.start()
    there.close()
    try:
        found: int = here.recv()
    finally:
        process.join()
    return found


def _grow(first: Sequence[str], then: Sequence[str], told: Any) -> None:
    from cq.cli.main import run
    from cq.cli.output import Terminal
    from cq.core.engine import memory

    memory.keep_freed()
    assert run(first, Terminal()) == 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    assert run(then, Terminal()) == 0
    told.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def quant(place: Path, model: str, optimizer: str, format_name: str) -> list[str]:
    """The command line that is measured, less its limit."""
    given = ["--calibration", str(place / f"{model}.calib.safetensors")]
    return [
        *("quant", str(place / f"{model}.safetensors"), "--only", f"*={format_name}"),
        *("--optimizer", optimizer, "--family", "none", "--allow-custom-loader"),
        *(given if optimizer in CALIBRATED else ()),
        *("-o", str(place / "out.safetensors"), "--force", "--restart", "--workers", "8"),
    ]


def case(place: Path, optimizer: str, format_name: str, limit: int) -> dict[str, Any]:
    """Measure one optimizer, format and limit in bytes. `ok` says whether it holds."""
    found: dict[str, Any] = {"optimizer": optimizer, "format": format_name, "limit": limit}
    library = measure(quant(place, "tiny", optimizer, format_name))
    if library.code:
        told = [line for line in library.err.splitlines() if line.startswith("error:")]
        return {**found, "refused": told, "ok": library.code == 4}  # not a pair that can be
    wide = quant(place, "wide", optimizer, format_name)
    done = measure([*wide, "--memory-limit", f"{limit}B"])
    if done.code == 5:
        needs = _NEEDS.search(done.err)
        if needs is None:
            return {**found, "ok": False, "error": done.err}
        limit = int(float(needs[1]) * _MB) + _MB // 10
        found |= {"refused_at": found["limit"], "limit": limit}
        done = measure([*wide, "--memory-limit", f"{limit}B"])
    if done.code:
        return {**found, "ok": False, "error": done.err}
    taken = done.rss - library.rss
    share = taken / limit
    return {**found, "taken": taken, "share": round(share, 3), "ok": share <= ALLOWED}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all of them and print JSON; 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(prog="bench.memory", description=main.__doc__)
    parser.add_argument("--dir", type=Path, default=Path("out/memory"))
    parser.add_argument("--optimizers", default="rtn,quip,gptq,learned")
    parser.add_argument("--formats", default="")
    parser.add_argument("--limits", default="128,256,512", help="in MB, beyond the library")
    parser.add_argument("--shape", default="12x4096x4096", help="layers x rows x columns")
    asked = parser.parse_args(argv)
    from cq.core import catalog

    asked.dir.mkdir(parents=True, exist_ok=True)
    blocks, rows, columns = map(int, asked.shape.split("x"))
    prepare(asked.dir, blocks=blocks, rows=rows, columns=columns)
    rows_found = []
    for optimizer in asked.optimizers.split(","):
        for format_name in asked.formats.split(",") if asked.formats else catalog.names("formats"):
            for limit in asked.limits.split(","):
                rows_found.append(case(asked.dir, optimizer, format_name, int(limit) * _MB))
                print(json.dumps(rows_found[-1]), flush=True)
                if "refused" in rows_found[-1]:
                    break
    return 0 if all(row["ok"] for row in rows_found) else 1


if __name__ == "__main__":
    sys.exit(main())
