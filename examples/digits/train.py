"""Train the digits model, then the LoRA that changes its style.

This file owns the training recipe and the two files it writes.  Run as
``python -m examples.digits.train`` from the root of the repository.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.digits import data, lora
from examples.digits.model import DigitsFlux, image_to_latent, load

HERE = Path(__file__).parent
BASE_FILE = HERE / "digits.safetensors"
LORA_FILE = HERE / "style.safetensors"
WARMUP = 100

BASE_METADATA = {
    "modelspec.title": "cq digits",
    "modelspec.architecture": "flux-1-schnell",
    "modelspec.description": "Toy Flux.1-architecture model of handwritten digits, 32x32 grey",
    "modelspec.license": "CC0-1.0",
}
LORA_METADATA = {
    "modelspec.title": "cq digits: slanted, dark on bright",
    "modelspec.architecture": "flux-1-schnell/lora",
    "modelspec.license": "CC0-1.0",
    "ss_network_module": "networks.lora_flux",
    "ss_network_dim": str(lora.RANK),
    "ss_network_alpha": str(lora.ALPHA),
}


def initialise(model: DigitsFlux) -> None:
    """Gates and output start at zero, so that each block begins as the identity."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            if name.endswith(("mod.lin", "modulation.lin", "modulation.1", "final_layer.linear")):
                nn.init.zeros_(layer.weight)


def flow_loss(
    model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, bf16: bool
) -> Tensor:
    """Rectified flow: x_t = (1 - t) * x + t * noise, and the velocity to predict is noise - x."""
    x = image_to_latent(images)
    noise = torch.randn(x.shape, generator=generator)
    # Logit-normal times: the middle of the path is where the digit takes shape.
    t = torch.sigmoid(torch.randn(len(x), generator=generator))
    mix = t[:, None, None, None]
    context, vector = data.conditioning(labels)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        velocity = model((1 - mix) * x + mix * noise, t, context, vector)
    loss: Tensor = (velocity.float() - (noise - x)).square().mean()
    return loss


def fit(
    loss_of: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    steps: int,
    rate: float,
    decay: float,
    label: str,
    weight_decay: float = 0.01,
    every: Callable[[int], None] | None = None,
) -> None:
    """AdamW with warm-up and cosine decay; the parameters end as their moving average."""
    trained = list(parameters)
    average = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(
        trained, lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    start, recent = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / WARMUP) * cosine
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # A short memory at first, so that the random start does not linger in the average.
        keep = min(decay, step / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - keep)
        recent += loss.item()
        if step % 100 == 0 or step == steps:
            minutes = (time.perf_counter() - start) / 60
            count = (step - 1) % 100 + 1
            print(
                f"{label} step {step}/{steps}  loss {recent / count:.4f}  {minutes:.1f} min",
                flush=True,
            )
            recent = 0.0
        if every is not None and (step % 500 == 0 or step == steps):
            current = [p.detach().clone() for p in trained]
            overwrite(trained, average)
            every(step)
            if step != steps:
                overwrite(trained, current)


@torch.no_grad()
def overwrite(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def batches(batch: int, generator: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws augmented images, each class equally often on average."""
    images, labels = data.load_images()
    weights = 1 / torch.bincount(labels).float()[labels]

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.multinomial(weights, batch, replacement=True, generator=generator)
        return data.augment(images[rows], generator), labels[rows]

    return draw


def train_base(path: Path, steps: int, batch: int, rate: float, seed: int, bf16: bool) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitsFlux()
    initialise(model)
    draw = batches(batch, generator)

    def save(step: int) -> None:
        state = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
        save_file(state, path, BASE_METADATA | {"cq.steps": str(step)})

    fit(
        lambda: flow_loss(model, *draw(), generator, bf16),
        model.parameters(),
        steps,
        rate,
        decay=0.998,
        label="base",
        every=save,
    )


def train_lora(
    base: Path, path: Path, steps: int, batch: int, rate: float, seed: int, bf16: bool
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = load(base).train()
    wrapped = lora.wrap(model)
    draw = batches(batch, generator)

    def loss() -> Tensor:
        images, labels = draw()
        return flow_loss(model, data.stylize(images), labels, generator, bf16)

    def save(step: int) -> None:
        state = lora.kohya_state(wrapped, torch.float16)
        save_file(state, path, LORA_METADATA | {"cq.steps": str(step)})

    trained = [p for layer in wrapped.values() for p in (layer.down, layer.up)]
    fit(loss, trained, steps, rate, decay=0.99, label="lora", weight_decay=0.0, every=save)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.digits.train", description=__doc__)
    parser.add_argument("--base", type=Path, default=BASE_FILE, help="base checkpoint to write")
    parser.add_argument("--lora", type=Path, default=LORA_FILE, help="LoRA to write")
    parser.add_argument("--steps", type=int, default=4000, help="base steps; 0 keeps the file")
    parser.add_argument("--lora-steps", type=int, default=1200, help="LoRA steps; 0 for none")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--lora-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bfloat16 autocast; about twice as fast on CPUs that have it",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.steps:
        train_base(args.base, args.steps, args.batch, args.rate, args.seed, args.bf16)
    if args.lora_steps:
        train_lora(
            args.base,
            args.lora,
            args.lora_steps,
            args.batch,
            args.lora_rate,
            args.seed + 1,
            args.bf16,
        )


if __name__ == "__main__":
    main()
