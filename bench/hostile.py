"""What cq reads from outside, each as a function of bytes: the doors that the fuzzer knocks at.

Owns the targets, what each begins with, and what may come of a case: nothing, or a `CqError` that
is no bug. `bench.fuzz` knocks a million times, the test suite a few thousand times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cq.core.errors import CqError, InternalError

DATA_BYTES = 1 << 16  # the most that a target puts behind a header

Run = Callable[[bytes, Path], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A door: its name, seeds, and what a case does in a directory of its own."""

    name: str
    run: Run
    seeds: tuple[bytes, ...]

    def knock(self, raw: bytes, place: Path) -> CqError | None:
        """One case: the error that it ends in, or None. Raises: whatever else comes, which is a
        finding; InternalError, which says that it is a bug, is one, too."""
        try:
            self.run(raw, place)
        except InternalError:
            raise
        except CqError as error:
            assert error.message, "an error without a message"
            json.dumps(error.to_dict())
            return error
        return None


def as_file(header: bytes) -> bytes:
    """A safetensors file around any header: its length, the header, and as much data as its
    offsets ask for, up to 64 KiB, made of the header's own bytes."""
    wanted = 0
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for entry in entries.values() if "data_offsets" in entry]
        wanted = min(DATA_BYTES, max((end for end in ends if type(end) is int), default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass
    wanted = max(0, wanted)
    # Of even headers the bytes are tamed, so that whatever dtype they have, they are small numbers.
    pattern = header if len(header) % 2 else bytes(byte & 0x3B for byte in header)
    data = (pattern * (wanted // max(1, len(pattern)) + 1))[:wanted] if pattern else bytes(wanted)
    return len(header).to_bytes(8, "little") + header + data


def _put(place: Path, name: str, raw: bytes) -> Path:
    path = place / name
    path.write_bytes(raw)
    return path


def header_of(tensors: Mapping[str, tuple[str, Iterable[int]]], **metadata: str) -> bytes:
    """A header of tensors, one behind the other."""
    from cq.core.dtypes import TensorSpec

    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        spec = TensorSpec(dtype, tuple(shape))
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    return json.dumps(entries).encode()


MODEL = header_of(
    {
        "blocks.0.attn.weight": ("BF16", (64, 64)),
        "blocks.0.attn.bias": ("F32", (64,)),
        "blocks.1.attn.weight": ("F16", (64, 64)),
        "norm.weight": ("F32", ()),
    },
    format="pt",
)
_SETTINGS = json.dumps(
    {"format_version": "1.0", "layers": {"blocks.0": {"format": "int8_tensorwise"}}}
)
STORED = (
    header_of(
        {
            "blocks.0.weight": ("I8", (32, 32)),
            "blocks.0.weight_scale": ("F32", (32, 1)),
            "blocks.0.comfy_quant": ("U8", (32,)),
            "blocks.1.weight": ("F8_E4M3", (32, 32)),
            "blocks.1.scale_weight": ("F32", ()),
            "scaled_fp8": ("F8_E4M3", (0,)),
        },
        _quantization_metadata=_SETTINGS,
    ),
    header_of(
        {
            "blocks.0.weight": ("U8", (32, 16)),
            "blocks.0.weight_scale": ("F8_E4M3", (128, 4)),
            "blocks.0.weight_scale_2": ("F32", ()),
            "blocks.0.input_scale": ("F32", ()),
        },
        _quantization_metadata=_SETTINGS.replace("int8_tensorwise", "nvfp4"),
    ),
)


def _header(raw: bytes, place: Path) -> None:
    from cq.core import header

    nbytes = 8 + len(raw) + min(DATA_BYTES, 4096)
    header.header_length(len(raw).to_bytes(8, "little"), where="x", nbytes_file=nbytes)
    for size in (nbytes, len(as_file(raw))):
        header.parse(raw, where="x", nbytes_file=size)


def _whole_file(raw: bytes, place: Path) -> None:
    import cq

    cq.open(_put(place, "any.safetensors", raw))


def _analyze(raw: bytes, place: Path) -> None:
    import cq
    from cq.core import stored
    from cq_analyze import analyze, structure

    checkpoint = cq.open(_put(place, "model.safetensors", as_file(raw)))
    structure.examine(checkpoint)
    analyze(checkpoint).to_dict()
    stored.describe(checkpoint)
    stored.stored_layers(checkpoint)


def _convert(raw: bytes, place: Path) -> None:
    import cq
    import cq_quant
    from cq.core.sink import nbytes_file

    checkpoint = cq.open(_put(place, "model.safetensors", as_file(raw)))
    made = cq_quant.quantize(checkpoint, format="bf16")
    nbytes_file(made)
    for part in made.parts[:4]:
        for piece in part.produce():
            del piece


def _marker(raw: bytes, place: Path) -> None:
    from cq.core import comfy

    comfy.parse_marker(raw, layer="blocks.0")


def _layers(raw: bytes, place: Path) -> None:
    import cq
    from cq.core import comfy, stored
    from cq_analyze import structure

    text = raw.decode("utf-8", "replace")
    entries = json.loads(STORED[0])
    entries["__metadata__"] = {"_quantization_metadata": text}
    path = _put(place, "stored.safetensors", as_file(json.dumps(entries).encode()))
    checkpoint = cq.open(path)
    structure.examine(checkpoint)
    comfy.header_layers(checkpoint.metadata)
    stored.stored_layers(checkpoint)


def _manifest(raw: bytes, place: Path) -> None:
    from cq.core import manifest
    from cq.core.sink import nbytes_file

    model = place / "base.safetensors"
    if not model.exists():
        model.write_bytes(as_file(MODEL))
    made = manifest.load(raw.replace(b"MODEL", str(model).encode()), where="plan.json")
    nbytes_file(made)
    made.manifest()


def _recipe(raw: bytes, place: Path) -> None:
    import cq
    import cq_quant

    model = place / "base.safetensors"
    if not model.exists():
        model.write_bytes(as_file(MODEL))
    cq_quant.quantize(cq.open(model), recipe=_put(place, "layers.json", raw))


def _adapter(raw: bytes, place: Path) -> None:
    import cq
    import cq_merge

    model = place / "base.safetensors"
    if not model.exists():
        model.write_bytes(as_file(MODEL))
    path = _put(place, "adapter.safetensors", as_file(raw))
    made = cq_merge.merge(cq.open(model), [str(path)], allow_unmatched=True)
    for part in made.parts[:3]:
        for piece in part.produce():
            del piece


def _adapter_config(raw: bytes, place: Path) -> None:
    import cq
    import cq_merge

    directory = place / "peft"
    directory.mkdir(exist_ok=True)
    model = place / "base.safetensors"
    if not model.exists():
        model.write_bytes(as_file(MODEL))
    path = directory / "adapter_model.safetensors"
    if not path.exists():
        path.write_bytes(as_file(LORAS[0]))
    _put(directory, "adapter_config.json", raw)
    cq_merge.merge(cq.open(model), [str(path)], allow_unmatched=True).manifest()


def _map(raw: bytes, place: Path) -> None:
    from cq.core.names import parse_map

    parse_map(raw, "map.json")


def _calibration(raw: bytes, place: Path) -> None:
    from cq.core.calibration import Calibration

    found = Calibration.open(_put(place, "model.calib.safetensors", as_file(raw)))
    for layer in list(found.layers)[:3]:
        found.moment(layer)
        found.held(layer)
        found.statistics(layer)
    found.matched(["blocks.0", "model.blocks.0"])


def _index(raw: bytes, place: Path) -> None:
    import cq

    for name in ("a.safetensors", "b.safetensors"):
        if not (place / name).exists():
            tensor = {f"blocks.{name[0]}.weight": ("F32", (4, 4))}
            (place / name).write_bytes(as_file(header_of(tensor)))
    checkpoint = cq.open(_put(place, "model.safetensors.index.json", raw))
    for file in checkpoint.inputs:
        assert file.path.parent == place, f"{file.path} lies elsewhere"


def _edit(raw: bytes, place: Path) -> None:
    import cq
    import cq_edit
    import cq_quant
    from cq.core.write import write

    try:
        asked = json.loads(raw)
    except (ValueError, RecursionError):
        return
    if not isinstance(asked, dict):
        return
    stored = place / "marked.safetensors"
    if not stored.exists():
        model = _put(place, "base.safetensors", as_file(MODEL))
        write(cq_quant.quantize(cq.open(model), format="nvfp4", optimizer="rtn"), stored)
    words = {
        key: [str(word) for word in value] if isinstance(value, list) else []
        for key, value in asked.items()
        if key in {"keep_keys", "remove_keys", "rename", "cast", "set_meta", "quant_filter"}
    }
    pairs = asked.get("set_quant")
    cq_edit.edit(
        cq.open(stored),
        **words,
        set_quant=[(str(k), json.dumps(v)) for k, v in pairs.items()]
        if isinstance(pairs, dict)
        else (),
        allow_broken=True,
    ).manifest()


LORAS = (
    header_of(
        {
            "lora_unet_blocks_0_attn.lora_down.weight": ("F16", (4, 64)),
            "lora_unet_blocks_0_attn.lora_up.weight": ("F16", (64, 4)),
            "lora_unet_blocks_0_attn.alpha": ("F32", ()),
            "lora_unet_blocks_0_attn.dora_scale": ("F32", (64, 1)),
        }
    ),
    header_of(
        {
            "blocks.0.attn.lora_A.weight": ("BF16", (4, 64)),
            "blocks.0.attn.lora_B.weight": ("BF16", (64, 4)),
            "blocks.1.attn.hada_w1_a": ("F32", (64, 2)),
            "blocks.1.attn.hada_w1_b": ("F32", (2, 64)),
            "blocks.1.attn.hada_w2_a": ("F32", (64, 2)),
            "blocks.1.attn.hada_w2_b": ("F32", (2, 64)),
        }
    ),
    header_of(
        {
            "blocks.0.attn.lokr_w1": ("F32", (4, 4)),
            "blocks.0.attn.lokr_w2_a": ("F32", (16, 2)),
            "blocks.0.attn.lokr_w2_b": ("F32", (2, 16)),
            "blocks.0.attn.alpha": ("F32", ()),
            "blocks.1.attn.oft_blocks": ("F32", (8, 8, 8)),
            "blocks.0.attn.diff_b": ("F32", (64,)),
        }
    ),
    header_of(
        {"blocks.0.attn.diff": ("F32", (64, 64)), "blocks.1.attn.set_weight": ("F16", (64, 64))}
    ),
)
_PLANS: tuple[Mapping[str, Any], ...] = (
    {"op": "quant", "format": "int8_tensorwise", "optimizer": "rtn"},
    {"op": "quant", "format": "nvfp4", "optimizer": "rtn", "skip": ["re:blocks"], "only": []},
    {"op": "merge", "adapters": [{"path": "MODEL", "strength": 1.0}]},
    {"op": "edit", "remove_keys": ["norm*"], "rename": [["a", "b"]]},
    {"op": "dequantize"},
    {"op": "native"},
)


def _json(*documents: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(document).encode() for document in documents)


def _full_plans(place: Path) -> Iterator[bytes]:
    """Manifests as cq writes them, of a model that lies in `place`."""
    import cq
    import cq_edit
    import cq_merge
    import cq_quant

    model = _put(place, "base.safetensors", as_file(MODEL))
    lora = _put(place, "lora.safetensors", as_file(LORAS[0]))
    base = cq.open(model)
    for made in (
        cq_quant.quantize(base, format="int8_tensorwise", optimizer="quip"),
        cq_merge.merge(base, [str(lora)]),
        cq_edit.edit(base, remove_keys=["norm*"], rename=["blocks.0=first"], cast=["*=fp32"]),
    ):
        document = made.manifest()
        document["source"] = [{"path": "MODEL"}]
        for stage in document["stages"]:
            for adapter in stage.get("adapters", []):  # of any contents
                for key in ("nbytes", "header", "sample"):
                    del adapter[key]
        yield json.dumps(document).replace(str(lora), "MODEL").encode()


def targets(place: Path) -> tuple[Target, ...]:
    """All doors; `place` is a directory for what the seeds are made of."""
    statistics = {
        f"blocks.0.{name}": ("F32", shape)
        for name, shape in {
            "diag": (8,),
            "sketch": (2, 8),
            "mean": (8,),
            "absmax": (8,),
        }.items()
    }
    said = {
        "version": 1,
        "layers": {"blocks.0": {"rows": 4, "held_rows": 0}},
        "same_as": {"blocks.1": "blocks.0"},
    }
    from cq.core import calibration

    plans = [
        {"cq": 1, "kind": "checkpoint", "source": [{"path": "MODEL"}], "stages": [stage]}
        for stage in _PLANS
    ]
    rules = [
        {"layers": "*.attn", "format": "nvfp4", "reason": "wide"},
        {"layers": "re:blocks\\.0\\.", "skip": True},
    ]
    return (
        Target("header", _header, (MODEL, *STORED)),
        Target("file", _whole_file, (as_file(MODEL), as_file(STORED[0]))),
        Target("analyze", _analyze, (MODEL, *STORED, *LORAS)),
        Target("convert", _convert, (MODEL, *STORED)),
        Target("marker", _marker, _json({"format": "nvfp4", "group_size": 16}, {"format": 1})),
        Target("layers", _layers, (_SETTINGS.encode(),)),
        Target("manifest", _manifest, (*_json(*plans), *_full_plans(place))),
        Target("recipe", _recipe, _json({"cq": 1, "kind": "recipe", "rules": rules})),
        Target("adapter", _adapter, LORAS),
        Target(
            "adapter config",
            _adapter_config,
            _json({"lora_alpha": 8, "r": 4, "use_rslora": True, "alpha_pattern": {"a.b": 2}}),
        ),
        Target("map", _map, _json({"lora_unet_a": "blocks.0.attn", "b": "c"})),
        Target(
            "calibration",
            _calibration,
            (header_of(statistics, **{calibration.KEY: json.dumps(said)}),),
        ),
        Target(
            "index",
            _index,
            _json(
                {
                    "metadata": {"total_size": 1},
                    "weight_map": {
                        "blocks.a.weight": "a.safetensors",
                        "blocks.b.weight": "b.safetensors",
                    },
                }
            ),
        ),
        Target(
            "edit",
            _edit,
            _json(
                {
                    "remove_keys": ["norm*"],
                    "rename": ["blocks.0=first"],
                    "set_quant": {"*": {"full_precision_matrix_mult": True}},
                    "cast": ["*bias=fp32"],
                    "set_meta": ["a=b"],
                }
            ),
        ),
    )
