"""Writes `tests/golden/diffusers_names.json.gz` anew: what diffusers' own converters make of the
tensors of released models.

    python -m tests.golden.diffusers_names    (in an environment with `diffusers`)

Every native tensor of a skeleton goes in as a column of numbers that say which tensor and which row
it is, so that what comes out tells where each row of each diffusers tensor came from. Blocks are
folded: `{}` stands for the numbers from `first` to `last` in a name and in its sources.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
FILE = FOLDER / "diffusers_names.json.gz"
SKELETONS = FOLDER.parent / "skeletons"
_TENSOR = 1 << 32  # a tensor's number counts in it, a row's number lies below it
_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")

Sources = list[tuple[str, int, int]]  # native tensor, first row, rows
Converter = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def _converters() -> dict[str, Converter]:
    from diffusers.loaders import single_file_utils as own

    def unet(down: str, up: str, added: str | None) -> Converter:
        blocks = {"x": _CROSS, "-": _PLAIN}
        config = {
            "layers_per_block": 2,
            "down_block_types": [blocks[b].format("Down") for b in down],
            "up_block_types": [blocks[b].format("Up") for b in up],
            "class_embed_type": None,
            "addition_embed_type": added,
            "attention_head_dim": 8,
        }
        return lambda tensors: own.convert_ldm_unet_checkpoint(
            {f"model.diffusion_model.{name}": t for name, t in tensors.items()}, config=config
        )

    return {
        "chroma1-hd": own.convert_chroma_transformer_checkpoint_to_diffusers,
        "cosmos-predict2-2b-t2i": own.convert_cosmos_transformer_checkpoint_to_diffusers,
        "ernie-image": own.convert_ernie_image_transformer_checkpoint_to_diffusers,
        "flux1-dev": own.convert_flux_transformer_checkpoint_to_diffusers,
        "flux2-dev": own.convert_flux2_transformer_checkpoint_to_diffusers,
        "hidream-i1": own.convert_hidream_transformer_to_diffusers,
        "hunyuan-video-13b": own.convert_hunyuan_video_transformer_to_diffusers,
        "krea2": own.convert_krea2_transformer_checkpoint_to_diffusers,
        "ltx-2-19b": own.convert_ltx2_transformer_to_diffusers,
        "ltx-2.3-22b": own.convert_ltx2_transformer_to_diffusers,
        "ltxv-2b": own.convert_ltx_transformer_checkpoint_to_diffusers,
        "lumina2": own.convert_lumina2_to_diffusers,
        "minimax-h3": lambda t: own.convert_minimax_h3_transformer_checkpoint_to_diffusers(t, {}),
        "sd15-unet": unet("xxx-", "-xxx", None),
        "sd3.5-large": own.convert_sd3_transformer_checkpoint_to_diffusers,
        "sd3.5-medium": own.convert_sd3_transformer_checkpoint_to_diffusers,
        "sdxl-unet": unet("-xx", "xx-", "text_time"),
        "wan21-i2v-14b": own.convert_wan_transformer_to_diffusers,
        "wan21-vace-14b": own.convert_wan_transformer_to_diffusers,
        "wan22-animate-14b": own.convert_wan_transformer_to_diffusers,
        "z-image": own.convert_z_image_transformer_checkpoint_to_diffusers,
    }


def _converted(skeleton: str, converter: Converter) -> dict[str, Sources]:
    shapes = json.loads(gzip.decompress((SKELETONS / f"{skeleton}.json.gz").read_bytes()))
    names = list(shapes)
    tensors = {}
    for number, (_, shape) in enumerate(shapes.values()):
        rows = torch.arange(shape[0] if shape else 1) + number * _TENSOR
        tensors[names[number]] = rows.view(-1, *[1] * (len(shape) - 1)) if shape else rows[0]
    found = {}
    for name, tensor in converter(tensors).items():
        rows = tensor.reshape(tensor.shape[0], -1)[:, 0] if tensor.shape else tensor.view(1)
        runs: list[list[int]] = []
        for value in rows.tolist():
            if runs and sum(runs[-1]) == value:
                runs[-1][1] += 1
            else:
                runs.append([value, 1])
        found[name] = [(names[v // _TENSOR], v % _TENSOR, count) for v, count in runs]
    return found


def _folded(found: dict[str, Sources]) -> list[list[Any]]:
    """Entries `[name, sources, first, last]`; without the numbers where there is no block."""
    groups: dict[str, list[int]] = {}
    for name, sources in found.items():
        number = _NUMBER.search(name)
        text = json.dumps([name, sources])
        natives = {n[0] if (n := _NUMBER.search(source)) else None for source, _, _ in sources}
        if number is None or natives != {number[0]}:
            groups[text] = []
            continue
        folded = [_NUMBER.sub("{}", s, count=1) for s, _, _ in sources]
        entry = [[s, *rows] for s, (_, *rows) in zip(folded, sources, strict=True)]
        text = json.dumps([_NUMBER.sub("{}", name, count=1), entry])
        groups.setdefault(text, []).append(int(number[0]))
    entries: list[list[Any]] = []
    for text, numbers in groups.items():
        if not numbers:
            entries.append(json.loads(text))
        for first, last in _runs(sorted(numbers)):
            entries.append([*json.loads(text), first, last])
    return entries


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], numbers[i - 1]
            first = i


def read() -> dict[str, dict[str, Sources]]:
    """By skeleton: the tensors of diffusers, each with the native rows that it is, in order."""
    document = json.loads(gzip.decompress(FILE.read_bytes()))
    return {
        skeleton: {
            name.replace("{}", str(i)): [(s.replace("{}", str(i)), a, n) for s, a, n in sources]
            for name, sources, *span in entries
            for i in (range(span[0], span[1] + 1) if span else [0])
        }
        for skeleton, entries in document["models"].items()
    }


def main() -> None:
    """Write the file."""
    from diffusers import __version__

    models = {name: _folded(_converted(name, how)) for name, how in _converters().items()}
    text = json.dumps({"diffusers": __version__, "models": models}, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
