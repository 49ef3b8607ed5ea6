"""Draw digits with a checkpoint: the Euler sampler and the command that makes a contact sheet.

This file owns sampling.  Run as ``python -m examples.digits.sample MODEL.safetensors -o sheet.png``
from the root of the repository.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.digits.contact_sheet import contact_sheet
from examples.digits.data import CLASSES, conditioning
from examples.digits.lora import merge
from examples.digits.model import DigitsFlux, latent_to_image, load, load_weights

__all__ = ["load_weights", "main", "sample", "sheet_classes"]


@torch.no_grad()
def sample(
    model: DigitsFlux,
    classes: Sequence[int] | Tensor,
    seed: int,
    steps: int = 20,
) -> Tensor:
    """One image [32, 32] for each entry of `classes`, from noise that `seed` determines."""
    labels = torch.as_tensor(classes, dtype=torch.long)
    context, vector = conditioning(labels)
    generator = torch.Generator().manual_seed(seed)
    # One draw for each image, so that an image does not depend on how many follow it.
    x = torch.stack([torch.randn(16, 8, 8, generator=generator) for _ in labels])
    times = torch.linspace(1, 0, steps + 1)
    for now, after in pairwise(times):
        velocity = model(x, now.expand(len(labels)), context, vector)
        x = x + (after - now) * velocity
    return latent_to_image(x)


def sheet_classes(per_class: int = 2) -> list[int]:
    """0, 0, 1, 1, ... 9, 9: the columns of a contact sheet."""
    return [label for label in range(CLASSES) for _ in range(per_class)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits.sample", description=__doc__)
    parser.add_argument("model", nargs="+", type=Path, help="checkpoints, one row each")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG to write")
    parser.add_argument(
        "--lora", type=Path, help="LoRA merged into every checkpoint, which must not be quantized"
    )
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)

    rows: dict[str, Tensor] = {}
    for path in args.model:
        if args.lora is not None:
            model = load(merge(load_weights(path), load_file(args.lora), args.strength))
        else:
            model = load(path)
        start = time.perf_counter()
        images = sample(model, sheet_classes(), args.seed, args.steps)
        seconds = time.perf_counter() - start
        print(f"{path}: {len(images)} images in {seconds:.2f} s, mean {images.mean():+.3f}")
        rows[str(path)] = images
    contact_sheet(rows, args.output)


if __name__ == "__main__":
    main()
