"""What `--quip-checkpointed` saves: one wide layer, rounded by a calibration, however it is cut.

Owns the layer, 4096 x 16 384 in bfloat16 with 1 024 directions of its inputs, and the measure: the
peak RSS of whole `cq quant` processes, their seconds, and whether the files are equal. The N x N
matrix of explicit GPTQ is computed, not measured: it, its inverse and the factor of that are three
times N x N float32 numbers, before any weight.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.memory import measure
from bench.rendering import number, table

ROWS, COLUMNS, RANK = 4096, 16_384, 1024
FORMS: dict[str, tuple[str, ...]] = {
    "--streaming-mode off": ("--streaming-mode", "off"),
    "default": (),
    "--quip-checkpointed": ("--quip-checkpointed",),
    "--quip-checkpointed-segments 4": ("--quip-checkpointed-segments", "4"),
    "--streaming-mode aggressive": ("--streaming-mode", "aggressive"),
}
_MIB = 1 << 20
_EXPLICIT = 3 * COLUMNS * COLUMNS * 4

_PREPARE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from cq.core import calibration
from cq.core.calibration import Statistics
place, rows, columns, rank = Path(sys.argv[1]), *map(int, sys.argv[2:])
rng = torch.Generator().manual_seed(5)
weight = torch.randn(rows, columns, generator=rng).bfloat16() * 0.02
save_file({"blocks.0.linear.weight": weight}, place / "wide.safetensors")
save_file({"blocks.0.linear.weight": weight[:128, :256].clone()}, place / "tiny.safetensors")
def noted(columns, rank):
    x = torch.randn(4 * rank, columns, generator=rng)
    return dict(diag=x.square().mean(0), sketch=x[:rank] / (4 * rank) ** 0.5, rows=4 * rank)
for name, columns, rank in (("wide", columns, rank), ("tiny", 256, 64)):
    first, held = noted(columns, rank), noted(columns, min(rank, 256))
    found = Statistics(**first, mean=torch.zeros(columns), absmax=torch.ones(columns) * 4,
                       held_diag=held["diag"], held_sketch=held["sketch"], held_rows=held["rows"])
    calibration.save(place / f"{name}.calib.safetensors", {"blocks.0.linear": found}, force=True)
"""


def to_markdown(found: Sequence[tuple[str, int, float, bool]], library: int) -> str:
    """The page."""
    rows = [
        (
            f"`{form}`" if form.startswith("-") else form,
            number(rss / _MIB, 0),
            number((rss - library) / _MIB, 0),
            f"{(rss - library) / _EXPLICIT:.0%}",
            number(seconds, 1),
            "yes" if equal else "**no**",
        )
        for form, rss, seconds, equal in found
    ]
    titles = (
        "",
        "MiB of the process",
        "beyond torch",
        "of explicit GPTQ",
        "seconds",
        "equal bytes",
    )
    return "\n".join(
        [
            "# What checkpointed LDLQ saves",
            "",
            f"Written by `python -m bench.checkpointed`: `cq quant --optimizer gptq --workers 1` on"
            f" a layer of {ROWS} x {COLUMNS} in bfloat16, int8 rows, with a calibration of {RANK}"
            " directions and 256 held back. Beyond torch: less the same command on a layer of"
            f" nothing, {library / _MIB:.0f} MiB. Of explicit GPTQ: of the {_EXPLICIT / _MIB:.0f}"
            " MiB that the N x N matrix, its inverse and the factor of that take, before any"
            " weight.",
            "",
            *table(titles, rows),
            "",
        ]
    )


def main() -> int:
    """Measure and report; 1 if the files are not equal."""
    parser = argparse.ArgumentParser(prog="bench.checkpointed", description=main.__doc__)
    parser.add_argument("--dir", type=Path, default=Path("out/memory"))
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    asked = parser.parse_args()
    place: Path = asked.dir
    place.mkdir(parents=True, exist_ok=True)
    shape = map(str, (ROWS, COLUMNS, RANK))
    subprocess.run([sys.executable, "-c", _PREPARE, str(place), *shape], check=True)
    out = place / "out.safetensors"

    def quant(model: str, *more: str) -> list[str]:
        return [
            *("quant", str(place / f"{model}.safetensors"), "--only", "*", "--family", "none"),
            *("--optimizer", "gptq", "--calibration", str(place / f"{model}.calib.safetensors")),
            *("--workers", "1", "-o", str(out), "--force", "--restart", *more),
        ]

    library = measure(quant("tiny")).rss
    found, hashes = [], set[str]()
    for form, more in FORMS.items():
        done = measure(quant("wide", *more))
        if done.code:
            sys.stderr.write(done.err)
            return 1
        hashes.add(hashlib.sha256(out.read_bytes()).hexdigest())
        found.append((form, done.rss, done.seconds, len(hashes) == 1))
    page = to_markdown(found, library)
    if asked.markdown is not None:
        asked.markdown.write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)
    return 0 if len(hashes) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
