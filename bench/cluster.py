"""What a Ray cluster costs: the same work by two workers of a cluster and by two threads.

Owns the measure: seconds of `cq.write` in turns, on a cluster of this machine that is up and whose
workers have torch already, and whether the bytes are equal. Needs `pip install ray`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

import cq
import cq_quant
from cq.core.write import Engine


def seconds(source: Path, out: Path, optimizer: str, engine: Engine) -> tuple[float, str]:
    """One run of two workers, and the hash of what it wrote."""
    out.unlink(missing_ok=True)
    checkpoint = cq_quant.quantize(cq.open(source), optimizer=optimizer)
    began = time.monotonic()
    cq.write(checkpoint, out, workers=2, engine=engine)
    taken = time.monotonic() - began
    with out.open("rb") as file:
        return taken, hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Measure in turns and print JSON; 1 if bytes differ."""
    parser = argparse.ArgumentParser(prog="bench.cluster", description=main.__doc__)
    parser.add_argument("model", type=Path, help="such as out/bench/flux-1gb-3072.safetensors")
    parser.add_argument("--dir", type=Path, default=Path("out/cluster"))
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    import ray  # type: ignore[import-not-found]

    asked.dir.mkdir(parents=True, exist_ok=True)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=80 << 20,
    )
    equal = True
    for optimizer in ("rtn", "quip"):
        taken: dict[str, list[float]] = {"local": [], "ray": []}
        hashes = set()
        seconds(asked.model, asked.dir / "out.safetensors", optimizer, "ray")  # workers get torch
        for _ in range(asked.runs):
            for engine in ("local", "ray"):
                done, hashed = seconds(
                    asked.model, asked.dir / "out.safetensors", optimizer, engine
                )
                taken[engine].append(done)
                hashes.add(hashed)
        equal &= len(hashes) == 1
        local, there = (statistics.median(taken[engine]) for engine in ("local", "ray"))
        found = {"optimizer": optimizer, "local": local, "ray": there, "ratio": there / local}
        print(json.dumps({**found, "equal": len(hashes) == 1}), flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
