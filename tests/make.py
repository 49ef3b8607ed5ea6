"""Inputs for the tests, built from a seed: tensors, files, shards, checkpoints and small stages.

Files are written by safetensors' own writer, so that every test that reads one also checks that cq
reads what others write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import safe_open

from cq.core.checkpoint import Checkpoint, Part, Piece, Stage
from cq.core.dtypes import DTYPES, TensorSpec, spec_of, torch_dtype
from cq.core.source import cuts

TORCH_DTYPES = tuple(
    name for name, d in DTYPES.items() if d.torch_name and getattr(torch, d.torch_name, None)
)
FLOAT_DTYPES = tuple(name for name, d in DTYPES.items() if d.is_float)


def generator(*seed: object) -> torch.Generator:
    """A generator whose seed depends on every word of `seed`, and on nothing else."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def weight(*shape: int, dtype: str = "F32", seed: object = 0) -> torch.Tensor:
    """Normal numbers with a few outliers, about as large as a model's weights."""
    rng = generator("weight", shape, seed)
    values = torch.randn(shape, generator=rng) * 0.02
    spikes = torch.rand(shape, generator=rng) < 0.001
    return torch.where(spikes, values * 20, values).to(torch_dtype(dtype))


def noise(dtype: str, shape: tuple[int, ...], seed: object = 0) -> torch.Tensor:
    """Any bit patterns of `dtype`, NaN among them; compare with `same`."""
    spec = TensorSpec(dtype, shape)
    high = 2 if dtype == "BOOL" else 256
    raw = torch.randint(0, high, (spec.nbytes,), generator=generator("noise", dtype, shape, seed))
    raw = raw.to(torch.uint8)
    kind = torch_dtype(dtype)
    return raw.view(kind).view(shape) if spec.nbytes else torch.empty(shape, dtype=kind)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes as a file stores them."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; unlike `torch.equal` it calls equal NaNs equal."""
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def model(
    *, blocks: int = 2, dim: int = 64, dtype: str = "BF16", prefix: str = "", seed: object = 0
) -> dict[str, torch.Tensor]:
    """A small transformer's state dict: blocks with biases and norms, projections around them."""
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (dim, 16),
        "img_in.bias": (dim,),
        "time_in.in_layer.weight": (dim, dim),
        "pos_embed": (1, 8, dim),
        "step": (),
        "final_layer.linear.weight": (16, dim),
    }
    for i in range(blocks):
        block = f"blocks.{i}."
        shapes |= {
            block + "attn.qkv.weight": (3 * dim, dim),
            block + "attn.qkv.bias": (3 * dim,),
            block + "attn.proj.weight": (dim, dim),
            block + "attn.norm_q.weight": (dim,),
            block + "norm1.weight": (dim,),
            block + "mlp.0.weight": (4 * dim, dim),
            block + "mlp.0.bias": (4 * dim,),
            block + "mlp.2.weight": (dim, 4 * dim),
        }
    return {
        prefix + name: weight(*shape, dtype=dtype, seed=(seed, name))
        for name, shape in shapes.items()
    }


def quantized_names(prefix: str = "", blocks: int = 2) -> list[str]:
    """The layers of `model` that a recipe without patterns quantizes."""
    return [
        f"{prefix}blocks.{i}.{name}"
        for i in range(blocks)
        for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ]


def save(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `tensors` with safetensors' own writer; the path."""
    path.write_bytes(
        safetensors.torch.save(dict(tensors), metadata=dict(metadata) if metadata else None)
    )
    return path


def save_shards(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    count: int = 2,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `tensors` as `count` shards with an index; the index's path."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(count):
        shard = f"model-{i + 1:05}-of-{count:05}.safetensors"
        mine = names[i::count]
        save(directory / shard, {name: tensors[name] for name in mine}, metadata)
        weight_map |= dict.fromkeys(mine, shard)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def file_bytes(header: bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A file with any header, valid or not: length, header, data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    """A header's entry, valid or not."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, read by safetensors."""
    return safetensors.torch.load(path.read_bytes())


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, read by safetensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def part(
    tensors: Mapping[str, torch.Tensor] | Mapping[str, Any],
    *,
    nbytes_peak: int = 1,
    hook: Callable[[], None] | None = None,
) -> Part:
    """A part that yields `tensors` in their canonical cuts and calls `hook` before it does."""
    held = dict(tensors)

    def produce() -> Iterator[Piece]:
        if hook is not None:
            hook()
        for name, tensor in held.items():
            for start, stop in cuts(spec_of(tensor)):
                yield Piece(name, start, tensor[start:stop] if tensor.shape else tensor)

    return Part(
        tensors={name: spec_of(tensor) for name, tensor in held.items()},
        nbytes_peak=nbytes_peak,
        produce=produce,
    )


def checkpoint(*parts: Part, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    """A checkpoint of `parts` that comes from nowhere."""
    return Checkpoint(parts=parts, metadata=metadata or {}, sources=())


class NothingStage:
    """A stage that changes nothing; its arguments hold a path, as adapters' do."""

    name: ClassVar[str] = "nothing"

    def __init__(self, path: str = "/somewhere/else/adapter.safetensors") -> None:
        self._path = path

    def arguments(self) -> dict[str, Any]:
        return {"adapters": [{"path": self._path, "strength": 0.5}]}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Stage:
        return cls(arguments["adapters"][0]["path"])

    def apply(self, source: Checkpoint) -> Checkpoint:
        return source.after(self)
