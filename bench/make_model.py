"""Make a Flux-like bf16 checkpoint of a requested size, and a kohya LoRA for it.

Names and shapes are those of Flux.1-dev, with fewer blocks. The values are synthetic but not easy:
Gaussian, with log-normal row scales, a few outlier input channels and rare outlier elements. Equal
arguments give equal values; a file that is already there is kept.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cq.core.dtypes import TensorSpec
from cq.core.header import lay_out, total_nbytes

HEAD = 128  # width of an attention head, which Flux's query and key norms have
CONTEXT, POOLED, LATENT, TIME = 4096, 768, 64, 256  # widths of what comes in
RANK, ALPHA = 16, 8.0  # not equal, so that a reader that forgets alpha / rank gets another result
CHUNK_NUMEL = 1 << 22

ROW_SIGMA = 0.3
OUTLIER_CHANNELS, CHANNEL_GAIN = 0.002, (3.0, 6.0)
OUTLIER_ELEMENTS, ELEMENT_GAIN = 1e-5, 6.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Width of the model and its blocks of each kind. Flux.1-dev is `Layout(3072, 19, 38)`."""

    hidden: int
    doubles: int
    singles: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear layer and its shape `(N out, K in)`."""
        return {**self.ends(), **self.block_linears()}

    def ends(self) -> dict[str, tuple[int, int]]:
        """The linear layers outside the blocks."""
        h = self.hidden
        return {
            "img_in": (h, LATENT),
            "txt_in": (h, CONTEXT),
            "time_in.in_layer": (h, TIME),
            "time_in.out_layer": (h, h),
            "guidance_in.in_layer": (h, TIME),
            "guidance_in.out_layer": (h, h),
            "vector_in.in_layer": (h, POOLED),
            "vector_in.out_layer": (h, h),
            "final_layer.adaLN_modulation.1": (2 * h, h),
            "final_layer.linear": (LATENT, h),
        }

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of the blocks: what is quantized, and what the LoRA covers."""
        h, mlp = self.hidden, 4 * self.hidden
        found = {}
        for block in range(self.doubles):
            for stream in ("img", "txt"):
                prefix = f"double_blocks.{block}.{stream}"
                found[f"{prefix}_attn.qkv"] = (3 * h, h)
                found[f"{prefix}_attn.proj"] = (h, h)
                found[f"{prefix}_mlp.0"] = (mlp, h)
                found[f"{prefix}_mlp.2"] = (h, mlp)
                found[f"{prefix}_mod.lin"] = (6 * h, h)
        for block in range(self.singles):
            prefix = f"single_blocks.{block}"
            found[f"{prefix}.linear1"] = (3 * h + mlp, h)
            found[f"{prefix}.linear2"] = (h, h + mlp)
            found[f"{prefix}.modulation.lin"] = (3 * h, h)
        return found

    def norms(self) -> list[str]:
        """The query and key norms of the blocks."""
        streams = [
            f"double_blocks.{block}.{stream}_attn"
            for block in range(self.doubles)
            for stream in ("img", "txt")
        ]
        blocks = streams + [f"single_blocks.{block}" for block in range(self.singles)]
        return [f"{b}.norm.{which}_norm.scale" for b in blocks for which in ("query", "key")]

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the checkpoint."""
        specs = {name: TensorSpec("BF16", (HEAD,)) for name in self.norms()}
        for layer, shape in self.linears().items():
            specs[f"{layer}.weight"] = TensorSpec("BF16", shape)
            specs[f"{layer}.bias"] = TensorSpec("BF16", shape[:1])
        return specs

    def lora_specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the LoRA, by its kohya name."""
        specs = {}
        for layer, (rows, columns) in self.block_linears().items():
            name = "lora_unet_" + layer.replace(".", "_")
            specs[f"{name}.lora_down.weight"] = TensorSpec("BF16", (RANK, columns))
            specs[f"{name}.lora_up.weight"] = TensorSpec("BF16", (rows, RANK))
            specs[f"{name}.alpha"] = TensorSpec("BF16", ())
        return specs


def nearest_layout(nbytes: float, hidden: int) -> Layout:
    """The layout, with at least one block of each kind, whose file is nearest to `nbytes`.

    >>> nearest_layout(1e9, 3072), nearest_layout(2e9, 3072)
    (Layout(hidden=3072, doubles=1, singles=1), Layout(hidden=3072, doubles=2, singles=2))
    """
    fixed, double, single = (
        total_nbytes(Layout(hidden, *blocks).specs().values())
        for blocks in ((0, 0), (1, 0), (0, 1))
    )
    double, single = double - fixed, single - fixed
    candidates = []
    for doubles in range(1, max(2, int((nbytes - fixed) // double) + 2)):
        left = nbytes - fixed - doubles * double
        singles = max(1, round(left / single))
        candidates.append((abs(left - singles * single), Layout(hidden, doubles, singles)))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def chunks(name: str, spec: TensorSpec, seed: int) -> Iterator[Tensor]:
    """The values of one tensor in float32, a few rows at a time.

    Each tensor has random numbers of its own, so it does not matter which others there are.
    """
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    if name.endswith(".alpha"):
        yield torch.full(spec.shape, ALPHA)
    elif len(spec.shape) != 2:
        center = 1.0 if name.endswith(".scale") else 0.0
        yield center + 0.02 * torch.randn(spec.shape, generator=generator)
    elif ".lora_" in name:
        # Together they change a weight by about a tenth of its size.
        size = spec.shape[1] ** -0.5 if ".lora_down." in name else 0.05
        yield size * torch.randn(spec.shape, generator=generator)
    else:
        yield from _weight_chunks(spec, generator)


def _weight_chunks(spec: TensorSpec, generator: torch.Generator) -> Iterator[Tensor]:
    rows, columns = spec.shape
    gains = torch.ones(columns)
    low, high = CHANNEL_GAIN
    chosen = torch.randperm(columns, generator=generator)[: round(OUTLIER_CHANNELS * columns)]
    gains[chosen] = low + (high - low) * torch.rand(len(chosen), generator=generator)
    gains *= columns**-0.5
    step = max(1, CHUNK_NUMEL // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = torch.randn((count, columns), generator=generator)
        values *= torch.exp(ROW_SIGMA * torch.randn((count, 1), generator=generator))
        values *= gains
        rare = round(OUTLIER_ELEMENTS * values.numel())
        where = torch.randint(values.numel(), (rare,), generator=generator)
        values.view(-1)[where] *= ELEMENT_GAIN
        yield values


def write(
    path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], seed: int
) -> bool:
    """Write a checkpoint in file order, a chunk at a time; False if it was there already."""
    head, header = lay_out(specs, metadata)
    if path.exists() and path.stat().st_size == header.nbytes_file:
        with path.open("rb") as file:
            if file.read(len(head)) == head:  # the metadata name the recipe and the seed
                return False
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".making")
    with unfinished.open("wb") as file:
        file.write(head)
        for name, entry in header.entries.items():
            for values in chunks(name, entry.spec, seed):
                file.write(values.to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy().data)
    unfinished.replace(path)
    return True


def main() -> None:
    """Make the files that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the checkpoint to make")
    parser.add_argument("--size", type=float, default=1.0, metavar="GB", help="default 1")
    parser.add_argument("--hidden", type=int, default=3072, help="default 3072, as Flux.1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path, metavar="FILE", help="make a rank-16 LoRA as well")
    args = parser.parse_args()
    layout = nearest_layout(args.size * 1e9, args.hidden)
    recipe = f"cq bench v1, {layout}, seed {args.seed}"
    wanted = [(args.output, layout.specs(), {"format": "pt", "modelspec.title": recipe})]
    if args.lora is not None:
        lora_metadata = {"ss_network_dim": str(RANK), "modelspec.title": f"LoRA of {recipe}"}
        wanted.append((args.lora, layout.lora_specs(), lora_metadata))
    for path, specs, metadata in wanted:
        made = write(path, specs, metadata, args.seed)
        print(f"{path}: {path.stat().st_size / 1e9:.3f} GB, {'made' if made else 'kept'}")


if __name__ == "__main__":
    main()
