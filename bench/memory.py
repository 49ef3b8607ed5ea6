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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOWED = 1.10
_MB = 1_000_000
_NEEDS = re.compile(r"needs ([0-9.]+) MB")
CALIBRATED = frozenset({"quip+calibration", "gptq", "learned"})

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
made(128, 256, 1, "tiny")
made(rows, columns, blocks, "wide")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One command: its exit code, what it said, its peak resident bytes, and its seconds of time
    and of the cores."""

    code: int
    err: str
    rss: int
    seconds: float
    cpu: float


def prepare(place: Path, *, blocks: int, rows: int, columns: int) -> None:
    """Write the models and their calibrations; in a process of its own, as torch would count."""
    words = [str(place), str(blocks), str(rows), str(columns)]
    subprocess.run([sys.executable, "-c", _PREPARE, *words], check=True)


def measure(argv: Sequence[str], out: Path | None = None) -> Measured:
    """Run `cq ARGV` as a process, with what it prints in the file `out`. Call it from one without
    torch: a child's peak begins with its parent's."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as err, Path(out or os.devnull).open("wb") as data:
        process = subprocess.Popen(
            [sys.executable, "-m", "cq.cli.entry", *argv],
            stdin=subprocess.DEVNULL,
            stdout=data,
            stderr=err,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        told = err.read().decode(errors="replace")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(
        code=process.returncode,
        err=told,
        rss=usage.ru_maxrss * unit,
        seconds=seconds,
        cpu=usage.ru_utime + usage.ru_stime,
    )


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
        *("--optimizer", optimizer.partition("+")[0], "--family", "none", "--allow-custom-loader"),
        *(given if optimizer in CALIBRATED else ()),
        *("-o", str(place / "out.safetensors"), "--force", "--restart", "--workers", "8"),
    ]


def case(
    place: Path, optimizer: str, format_name: str, limit: int, library: Measured
) -> dict[str, Any]:
    """Measure one optimizer, format and limit in bytes, against the `library`: the same on a model
    of nothing. `ok` says whether it holds."""
    found: dict[str, Any] = {"optimizer": optimizer, "format": format_name, "limit": limit}
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


def to_markdown(rows: Sequence[Mapping[str, Any]], shape: str, said: str) -> str:
    """The page of a run on layers x rows x columns: a line for each optimizer and format."""
    limits = sorted({row.get("refused_at", row["limit"]) for row in rows})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        line = cells.setdefault((row["optimizer"], row["format"]), {})
        if "refused" in row:
            line.update(dict.fromkeys(limits, "no such pair"))
        elif "share" in row:
            told = f"{max(0, row['taken']) / _MB:.0f} MB, {max(0, row['share']):.0%}"
            cut = f" of the {row['limit'] / _MB:.0f} MB it asks for" if "refused_at" in row else ""
            line[row.get("refused_at", row["limit"])] = told + cut + ("" if row["ok"] else " **!**")
        else:
            line[row["limit"]] = "failed **!**"
    # What is no pair is told by its optimizer's other formats.
    shown = {pair: line for pair, line in cells.items() if "no such pair" not in line.values()}
    worst = max((row["share"] for row in rows if "share" in row), default=0)
    kept = sum(row["ok"] for row in rows if "share" in row)
    lines = [
        "# Does --memory-limit hold?",
        "",
        f"Written by `{said}`: peak memory of `cq quant --workers 8 --memory-limit LIMIT` on a"
        f" model of {shape} (layers x rows x columns), less that of the same command on a model of"
        " nothing, and its share of the limit. A peak may be 110 % of the limit;"
        f" {kept} of {sum('share' in row for row in rows)} keep to it, the largest is {worst:.0%}.",
        "",
        "| optimizer | format | " + " | ".join(f"{limit // _MB} MB" for limit in limits) + " |",
        "|---|---|" + "---|" * len(limits),
    ]
    for (optimizer, format_name), line in shown.items():
        told = " | ".join(line.get(limit, "") for limit in limits)
        lines.append(f"| `{optimizer}` | `{format_name}` | {told} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all of them and print JSON; 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(prog="bench.memory", description=main.__doc__)
    parser.add_argument("--dir", type=Path, default=Path("out/memory"))
    parser.add_argument("--optimizers", default="rtn,quip,quip+calibration,gptq,learned")
    parser.add_argument("--formats", default="")
    parser.add_argument("--limits", default="128,512", help="in MB, beyond the library")
    parser.add_argument("--shape", default="8x2048x4096", help="layers x rows x columns")
    parser.add_argument("--markdown", type=Path, help="write a page as well")
    asked = parser.parse_args(argv)
    from cq.core import catalog

    asked.dir.mkdir(parents=True, exist_ok=True)
    blocks, rows, columns = map(int, asked.shape.split("x"))
    prepare(asked.dir, blocks=blocks, rows=rows, columns=columns)
    rows_found = []
    for optimizer in asked.optimizers.split(","):
        for format_name in asked.formats.split(",") if asked.formats else catalog.names("formats"):
            library = measure(quant(asked.dir, "tiny", optimizer, format_name))
            for limit in asked.limits.split(","):
                nbytes = int(limit) * _MB
                rows_found.append(case(asked.dir, optimizer, format_name, nbytes, library))
                print(json.dumps(rows_found[-1]), flush=True)
                if "refused" in rows_found[-1]:
                    break
    if asked.markdown is not None:
        said = f"bench.memory --shape {asked.shape} --limits {asked.limits}"
        asked.markdown.write_text(to_markdown(rows_found, asked.shape, said), encoding="utf-8")
    return 0 if all(row["ok"] for row in rows_found) else 1


if __name__ == "__main__":
    sys.exit(main())
