"""A checkpoint far larger than memory and disk: is it planned in seconds, and run in flat memory?

Owns a sparse sharded checkpoint of any size, with the tensor names and shapes of Flux.1 and more
blocks, which takes no room on the disk and reads as zeros; and the measure of what its plan and
shares of its work take. An output is reserved before the work: where the disk has no room for all
of it, the work is that of a few blocks of the same checkpoint, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.memory import Measured, measure

FLUX = (19, 38)  # double and single blocks of Flux.1-dev, 23.8 GB
SHARE_BYTES = 2 * 10**9  # of the source, so that all sizes are compared by equal work
LIMIT = "256MB"  # little, so that what torch keeps of freed memory does not hide what grows
SAMPLE = "double_blocks.0.*"
_SLACK_BYTES = 1 << 30  # of the disk, which the output leaves free


def make(
    directory: Path, *, blocks: tuple[int, int], hidden: int = 3072, shard_bytes: int = 5 * 10**9
) -> Path:
    """The index of a sparse checkpoint with so many double and single blocks, in `directory`."""
    from bench.make_model import Layout
    from cq.core.header import lay_out

    directory.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, Any]] = [{}]
    size = 0
    for name, spec in Layout(hidden, *blocks).specs().items():
        if size and size + spec.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    placed: dict[str, str] = {}
    for number, specs in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        head, header = lay_out(specs, {"format": "pt"})
        with (directory / shard).open("wb") as file:
            file.write(head)
            file.truncate(header.nbytes_file)
        placed |= dict.fromkeys(specs, shard)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index


def _made(directory: Path, times: int) -> Path:
    """As `make`, in another process: a child's peak begins with its parent's, torch and all."""
    blocks = tuple(times * count for count in FLUX) if times else (1, 1)
    words = f"Path({str(directory)!r}), blocks={blocks}"
    script = f"from pathlib import Path; from bench import large; large.make({words})"
    subprocess.run([sys.executable, "-c", script], check=True)
    return directory / "model.safetensors.index.json"


def _row(what: str, done: Measured, **more: Any) -> dict[str, Any]:
    if done.code:
        raise SystemExit(f"{what}: exit {done.code}\n{done.err}")
    return {"what": what, "seconds": round(done.seconds, 2), "rss_mb": done.rss // 10**6, **more}


def planned(index: Path, scratch: Path) -> list[dict[str, Any]]:
    """What looking at a checkpoint and planning its quantization take."""
    out = scratch / "plan.json"
    commands = {
        "analyze": ["analyze", str(index), "--json"],
        "quant --dry-run": ["quant", str(index), "--dry-run", "--json"],
        "template": ["template", str(index)],
        "quant --defer": ["quant", str(index), "--defer"],
    }
    return [_row(name, measure(words, out)) for name, words in commands.items()]


def ran(index: Path, nbytes: int, scratch: Path, shares: int) -> list[dict[str, Any]]:
    """What the first shares of the work take, on a source of `nbytes`."""
    plan, target = scratch / "plan.json", scratch / "out.safetensors"
    measure(["quant", str(index), "--dry-run", "--json"], plan)
    needed, whole = json.loads(plan.read_text())["nbytes"], True
    source = str(index)
    if needed + _SLACK_BYTES > shutil.disk_usage(scratch).free:
        whole, source = False, str(scratch / "sample.json")
        kept = measure(["edit", str(index), "--keep-keys", SAMPLE], Path(source))
        _row("edit --keep-keys", kept)
    _row("quant --defer", measure(["quant", source, "--defer"], plan))
    count = max(1, round(nbytes / SHARE_BYTES)) if whole else shares
    rows = []
    for number in range(1, min(shares, count) + 1):
        words = ["run", str(plan), "-o", str(target), "--shard", f"{number}/{count}"]
        done = measure([*words, "--memory-limit", LIMIT])
        rows.append(_row(f"run --shard {number}/{count}", done, whole_output=whole))
    shutil.rmtree(f"{target}.shares", ignore_errors=True)
    target.unlink(missing_ok=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print JSON, a line for each command."""
    parser = argparse.ArgumentParser(prog="bench.large", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("out/large"))
    parser.add_argument(
        "--out", type=Path, default=None, help="where outputs go; `--dir`, unless that is too small"
    )
    parser.add_argument("--times", default="0,1,8", help="Flux.1 so many times; 0 is two blocks")
    parser.add_argument("--shares", type=int, default=3, help="of which so many are run")
    asked = parser.parse_args(argv)
    scratch = asked.out or asked.dir
    scratch.mkdir(parents=True, exist_ok=True)
    for times in map(int, asked.times.split(",")):
        index = _made(asked.dir / f"times-{times}", times)
        nbytes = sum(p.stat().st_size for p in index.parent.glob("*.safetensors"))
        files = len(list(index.parent.glob("*.safetensors")))
        for row in (
            *planned(index, scratch),
            *ran(index, nbytes, scratch, asked.shares),
        ):
            print(json.dumps({"gb": round(nbytes / 1e9, 1), "files": files, **row}), flush=True)
        shutil.rmtree(index.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
