"""What a second worker is worth: `cq quant` with one and with two, in turn, on the bench's model.

Owns the measure: wall time beyond that of the same command on a model of next to nothing, the best
of several runs, since whatever else the machine does only makes a run longer. Leave the machine
alone meanwhile: with two cores, a third process halves what there is to gain.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.memory import Measured, measure

RANK, ROWS = 256, 1024  # what the recorder keeps of a layer, of so many inputs

_CALIBRATE = """
import sys, torch
from cq.core import calibration, manifest
source, target, rank, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = torch.Generator().manual_seed(5)
found = {}
for name, spec in manifest.open_checkpoint(source).specs.items():
    if not name.endswith(".weight") or "_blocks." not in name:
        continue
    size = 0.5 + torch.rand(spec.shape[1], generator=rng)
    def noted(rank):
        x = torch.randn(rank, spec.shape[1], generator=rng) * size
        return x.square().mean(0), x / rank**0.5
    (diag, sketch), (held_diag, held_sketch) = noted(rank), noted(rank // 2)
    found[name.removesuffix(".weight")] = calibration.Statistics(
        diag=diag, sketch=sketch, mean=torch.zeros_like(diag), absmax=4 * diag.sqrt(), rows=rows,
        held_diag=held_diag, held_sketch=held_sketch, held_rows=rows // 4)
calibration.save(target, found, force=True)
"""


def prepare(directory: Path, size: float) -> dict[str, Path]:
    """A model of `size` GB and a tiny one, with calibrations beside them, unless they are there."""
    models = {"tiny": ("0.003", "128"), "large": (str(size), "3072")}
    found = {}
    for name, (gigabytes, hidden) in models.items():
        model = found[name] = directory / f"{name}-{gigabytes}.safetensors"
        calibration = model.with_suffix(".calib.safetensors")
        make = [sys.executable, "-m", "bench.make_model", str(model)]
        if not model.exists():
            subprocess.run([*make, "--size", gigabytes, "--hidden", hidden], check=True)
        if not calibration.exists():
            words = [str(model), str(calibration), str(RANK), str(ROWS)]
            subprocess.run([sys.executable, "-c", _CALIBRATE, *words], check=True)
    return found


def timed(model: Path, optimizer: str, workers: int, out: Path) -> Measured:
    """One run."""
    given = ["--calibration", str(model.with_suffix(".calib.safetensors"))]
    done = measure(
        [
            *("quant", str(model), "--optimizer", optimizer, "--workers", str(workers)),
            *(given if optimizer != "rtn" else ()),
            *("-o", str(out), "--force", "--restart", "-q"),
        ]
    )
    if done.code:
        raise SystemExit(done.err)
    out.unlink()
    return done


def compare(found: dict[str, Path], optimizer: str, runs: int) -> dict[str, Any]:
    """One worker against two, one after the other, `runs` times: wall and CPU seconds of each."""
    out = found["large"].with_name("out.safetensors")
    taken: dict[int, list[Measured]] = {1: [], 2: []}
    start = min(timed(found["tiny"], optimizer, 1, out).seconds for _ in range(runs))
    for _ in range(runs):
        for workers, done in taken.items():
            done.append(timed(found["large"], optimizer, workers, out))
    one, two = (min(each.seconds for each in done) - start for done in taken.values())
    return {
        "optimizer": optimizer,
        "load": round(os.getloadavg()[0], 2),
        "start_up": round(start, 2),
        "one_worker": [[round(each.seconds, 2), round(each.cpu, 2)] for each in taken[1]],
        "two_workers": [[round(each.seconds, 2), round(each.cpu, 2)] for each in taken[2]],
        "scaling": round(one / two, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print JSON, a line for each optimizer."""
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("out/scaling"))
    parser.add_argument("--size", type=float, default=2.0, metavar="GB")
    parser.add_argument("--optimizers", default="rtn,quip")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args(argv)
    asked.dir.mkdir(parents=True, exist_ok=True)
    found = prepare(asked.dir, asked.size)
    for optimizer in asked.optimizers.split(","):
        print(json.dumps(compare(found, optimizer, asked.runs)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
