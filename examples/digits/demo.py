"""The demo: the main job of cq on a real, trained model, and a picture to look at.

Runs the commands of the README on the digits model (merge | quant | verify) and draws the same
digits with the base, the merged, and the merged and quantized model. Run by `make demo`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.digits.contact_sheet import amplified_difference, contact_sheet, psnr
from examples.digits.model import load
from examples.digits.sample import sample, sheet_classes

HERE = Path(__file__).parent
GAIN = 8


def run_shell(line: str) -> None:
    """Show a command line and run it as a shell does; stop the demo if any step fails."""
    print(f"\n$ {line}", flush=True)
    cq = f'cq() {{ {shlex.quote(sys.executable)} -m cq.cli.entry "$@"; }}'
    script = f"set -euo pipefail; {cq}\n{line}"
    finished = subprocess.run(["bash", "-c", script], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the pipeline, draw, and print what the eye should find."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="directory for results")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    base, style = HERE / "digits.safetensors", HERE / "style.safetensors"
    merged, quantized = out / "merged.safetensors", out / "merged-int8.safetensors"
    b, s, m, q = (shlex.quote(os.path.relpath(p)) for p in (base, style, merged, quantized))
    run_shell(f"cq merge {b} {s} | cq quant --optimizer quip -o {q} --force > /dev/null")
    run_shell(f"cq merge {b} {s} -q -o {m} --force > /dev/null")
    run_shell(f"cq verify {q} --against {m} --min-sqnr 35")

    classes = sheet_classes()
    images = {
        "base": sample(load(base), classes, seed=0),
        "merged": sample(load(merged), classes, seed=0),
        "quantized": sample(load(quantized), classes, seed=0),
    }
    quality = psnr(images["quantized"], images["merged"])
    sheet = out / "digits.png"
    contact_sheet(
        {
            "base": images["base"],
            "base + style LoRA (merged)": images["merged"],
            f"merged and quantized to int8: PSNR {quality:.1f} dB": images["quantized"],
            f"difference of the last two, amplified {GAIN} times": amplified_difference(
                images["quantized"], images["merged"], GAIN
            ),
        },
        sheet,
    )
    sizes = base.stat().st_size, quantized.stat().st_size
    print(
        f"\n{sizes[0] / 1e6:.1f} MB of bf16 became {sizes[1] / 1e6:.1f} MB;"
        f" images of the quantized model match the merged one's at {quality:.1f} dB PSNR"
        f"\nlook at {sheet}"
    )


if __name__ == "__main__":
    main()
