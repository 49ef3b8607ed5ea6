"""Adapter files, such as LoRAs, by their names, shapes and alphas: what they are and what they fit.

Owns the endings by which kinds of adapter and the tools that write them are told. Says nothing of
whether an adapter can be merged: that is asked of the catalogue. Never imports torch.

Source: ComfyUI `comfy/lora.py:load_lora` and `comfy/weight_adapter/*.py` (endings and keys).
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cq.core import catalog, families, text
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec

_USO = "USO"  # whose names of Flux's layers are those of attention processors
_PROCESSORS = (
    (".processor.qkv_lora1", ".img_attn.qkv"),
    (".processor.qkv_lora2", ".txt_attn.qkv"),
    (".processor.proj_lora1", ".img_attn.proj"),
    (".processor.proj_lora2", ".txt_attn.proj"),
    (".processor.qkv", ".linear1"),
    (".processor.proj", ".linear2"),
)
# Ending of a target's tensor: kind, spelling, and the axis that has the rank, None without one.
# The first ending that fits decides. `down` factors have the rank in front, `up` factors behind.
_ENDINGS: tuple[tuple[str, str, str, int | None], ...] = (
    (".lora_down.weight", "LoRA", "kohya", 0),
    (".lora_up.weight", "LoRA", "kohya", None),
    (".lora_mid.weight", "LoRA", "kohya", None),
    ("_lora.down.weight", "LoRA", "diffusers", 0),
    ("_lora.up.weight", "LoRA", "diffusers", None),
    ("_lora1.down.weight", "LoRA", _USO, 0),
    ("_lora1.up.weight", "LoRA", _USO, None),
    ("_lora2.down.weight", "LoRA", _USO, 0),
    ("_lora2.up.weight", "LoRA", _USO, None),
    (".lora.down.weight", "LoRA", "diffusers", 0),
    (".lora.up.weight", "LoRA", "diffusers", None),
    (".lora_linear_layer.down.weight", "LoRA", "diffusers", 0),
    (".lora_linear_layer.up.weight", "LoRA", "diffusers", None),
    (".lora_A.default.weight", "LoRA", "PEFT", 0),
    (".lora_B.default.weight", "LoRA", "PEFT", None),
    (".lora_A.weight", "LoRA", "PEFT", 0),
    (".lora_B.weight", "LoRA", "PEFT", None),
    (".lora_A", "LoRA", "PEFT", 0),
    (".lora_B", "LoRA", "PEFT", None),
    (".lora_magnitude_vector.weight", "DoRA", "PEFT", None),
    (".lora_magnitude_vector", "DoRA", "PEFT", None),
    (".lora_magnitude_vector.default.weight", "DoRA", "PEFT", None),
    (".lora_magnitude_vector.default", "DoRA", "PEFT", None),
    (".dora_scale", "DoRA", "LyCORIS", None),
    (".hada_w1_a", "LoHa", "LyCORIS", None),
    (".hada_w1_b", "LoHa", "LyCORIS", 0),
    (".hada_w2_a", "LoHa", "LyCORIS", None),
    (".hada_w2_b", "LoHa", "LyCORIS", None),
    (".hada_t1", "LoHa", "LyCORIS", None),
    (".hada_t2", "LoHa", "LyCORIS", None),
    (".lokr_w1", "LoKr", "LyCORIS", None),
    (".lokr_w1_a", "LoKr", "LyCORIS", None),
    (".lokr_w1_b", "LoKr", "LyCORIS", 0),
    (".lokr_w2", "LoKr", "LyCORIS", None),
    (".lokr_w2_a", "LoKr", "LyCORIS", None),
    (".lokr_w2_b", "LoKr", "LyCORIS", 0),
    (".lokr_t2", "LoKr", "LyCORIS", None),
    (".a1.weight", "GLoRA", "LyCORIS", 0),
    (".a2.weight", "GLoRA", "LyCORIS", None),
    (".b1.weight", "GLoRA", "LyCORIS", None),
    (".b2.weight", "GLoRA", "LyCORIS", None),
    (".oft_blocks", "OFT", "LyCORIS", None),
    (".oft_diag", "diagonal OFT", "LyCORIS", None),
    (".oft_R.weight", "PEFT's OFT", "PEFT", None),
    (".w_norm", "norm", "LyCORIS", None),
    (".b_norm", "norm", "LyCORIS", None),
    (".diff_b", "diff", "LyCORIS", None),
    (".diff", "diff", "LyCORIS", None),
    (".set_weight", "set_weight", "LyCORIS", None),
)
_ALPHA = ".alpha"
_BESIDE = (_ALPHA, ".rescale", ".reshape_weight", ".lora_B.bias", ".lora_B.default.bias")
_DIFFERENCES = {"diff", "norm", "set_weight"}
_OFT_BLOCKS, _BUTTERFLY = ".oft_blocks", "BOFT"  # which has blocks in stages: four dimensions
# Black Forest Labs' control adapters: the names by which they are told, and the gains they bring.
_CONTROL = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")
_GAIN = "_norm.scale"
_ENDING = re.compile("(?:" + "|".join(re.escape(ending) for ending, *_ in _ENDINGS) + ")$")
_ANY_ENDING = tuple(ending for ending, *_ in _ENDINGS)
_KINDS = {ending: (kind, spelling, axis) for ending, kind, spelling, axis in _ENDINGS}
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?_|lora_prior_te_|text_encoders?(?:_\d)?\.|te\d?\."
    r"|clip_[lgh]\.|t5xxl\.|conditioner\.|cond_stage_model\.)"
)
_UNDERSCORED = re.compile(r"lora_unet__?|oft_unet_|lora_transformer_|lora_prior_unet_|lycoris_")
_DOTTED = re.compile(
    r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer|unet|net)\.)+"
)
_LAYER = re.compile(r"\.(?:weight|bias|scale)$")
_UNDERSCORED_NUMBER = re.compile(r"(^|_)\d+(?=_)")
# Models that are no family here, by names of the diffusers library.
_OTHERS = ((re.compile(r"joint_transformer_blocks[._]\d+[._]"), "AuraFlow"),)
# U-Nets have the same names; what their cross attention reads tells them apart.
_CROSS_ATTENTION = re.compile(r"attn2[._]to_k$")
_UNETS = {"sd15": 768, "sdxl": 2048}
_NO_FAMILY = {1024: "Stable Diffusion 2"}
_SCALARS = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A family of which most of an adapter's targets are layers: `known` of `targets` are."""

    family: str
    title: str
    known: int
    targets: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "family": self.family,
            "title": self.title,
            "known": self.known,
            "targets": self.targets,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter file.

    `kinds` counts its targets by kind, `spellings` by who writes such names, `prefixes` by what
    stands before a layer's name. `ranks` and `alphas` count targets by rank and alpha; `scales` are
    the least and greatest alpha / rank, None without an alpha. `fits` are the families that most
    targets of the model itself are layers of, by any of the layers' names, the best first; where
    one knows all targets, those that do not are left out. If there is none, `names_of` may be a
    model that is no family whose layers have such names. `unrecognized` are tensors of no known
    kind, `merges` the kinds that this cq merges.
    """

    kinds: Mapping[str, int]
    spellings: Mapping[str, int]
    prefixes: Mapping[str, int]
    targets: int
    text_encoder_targets: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    scales: tuple[float, float] | None
    fits: tuple[Fit, ...]
    names_of: str | None
    unrecognized: tuple[str, ...]
    merges: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "kinds": dict(self.kinds),
            "spellings": dict(self.spellings),
            "prefixes": dict(self.prefixes),
            "targets": self.targets,
            "text_encoder_targets": self.text_encoder_targets,
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "alphas": {f"{alpha:g}": count for alpha, count in self.alphas.items()},
            "scales": None if self.scales is None else list(self.scales),
            "fits": [fit.to_dict() for fit in self.fits],
            "names_of": self.names_of,
            "unrecognized": list(self.unrecognized),
            "merges": list(self.merges),
        }


def describe(checkpoint: Checkpoint) -> AdapterFile | None:
    """What the adapter file is; None if most of its tensors are no adapter's."""
    found = _Found(control=all(name in checkpoint.specs for name in _CONTROL))
    for name, spec in checkpoint.specs.items():
        found.add(name, spec)
    if 2 * found.tensors <= len(checkpoint.specs):
        return None
    alphas = {key: _scalar(checkpoint, name) for key, name in found.alphas.items()}
    known = {key: alpha for key, alpha in alphas.items() if alpha is not None}
    scales = [known[key] / rank for key, rank in found.ranks.items() if key in known and rank]
    kinds = Counter(_kind(own) for own in found.kinds.values())
    targets = {key: _Target.of(key) for key in found.kinds}
    model = [target for target in targets.values() if not target.text_encoder]
    width = _width(model, found.columns)
    # Differences are also of norms and single tensors, which families do not list as layers.
    layers = [target for target in model if found.kinds[target.key] - _DIFFERENCES]
    fits = tuple(_fits(layers or model, width))
    return AdapterFile(
        kinds=dict(kinds.most_common()),
        spellings=dict(Counter(found.spelling.values()).most_common()),
        prefixes=dict(Counter(target.prefix for target in targets.values()).most_common()),
        targets=len(targets),
        text_encoder_targets=len(targets) - len(model),
        ranks=dict(sorted(Counter(found.ranks.values()).items())),
        alphas=dict(sorted(Counter(known.values()).items())),
        scales=(min(scales), max(scales)) if scales else None,
        fits=fits,
        names_of=None if fits else _names_of(model, width),
        unrecognized=tuple(sorted(found.unrecognized)),
        merges=tuple(kind for kind in kinds if kind.lower() in catalog.names("adapters")),
    )


class _Found:
    """An adapter's targets by their keys, gathered tensor by tensor."""

    def __init__(self, *, control: bool) -> None:
        self.control = control
        self.tensors = 0
        self.kinds: dict[str, set[str]] = {}
        self.spelling: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.columns: dict[str, int] = {}
        self.alphas: dict[str, str] = {}
        self.unrecognized: list[str] = []

    def add(self, name: str, spec: TensorSpec) -> None:
        """Take a tensor into account."""
        # Most names are no adapter's, which their end tells faster than an expression does.
        match = _ENDING.search(name) if name.endswith(_ANY_ENDING) else None
        if match is None:
            if name.endswith(_ALPHA):
                self.alphas[name.removesuffix(_ALPHA)] = name
            if self.control and name.endswith(_GAIN):
                self.tensors += 1
                self.kinds.setdefault(name.removesuffix(".scale"), set()).add("set_weight")
            elif name.endswith(_BESIDE):
                self.tensors += 1
            else:
                self.unrecognized.append(name)
            return
        kind, spelling, axis = _KINDS[match[0]]
        key = name[: match.start()]
        if spelling == _USO:
            key += match[0].partition(".")[0]
        if match[0] == _OFT_BLOCKS and len(spec.shape) == 4:
            kind = _BUTTERFLY
        self.tensors += 1
        if kind != "DoRA" or key not in self.spelling:
            self.spelling[key] = spelling  # of the factors, rather than of their magnitude
        self.kinds.setdefault(key, set()).add(kind)
        if axis is not None and len(spec.shape) > 1:
            self.ranks[key], self.columns[key] = spec.shape[:2]


class _Target(NamedTuple):
    """A layer that an adapter changes: its key, what stands before its name there, its name with
    underscores and folded block numbers, and whether it is part of a text encoder."""

    key: str
    prefix: str
    folded: str
    text_encoder: bool

    @classmethod
    def of(cls, key: str) -> _Target:
        """The target that has that key in the file."""
        text_encoder = _TEXT_ENCODER.match(key)
        prefix = text_encoder or _UNDERSCORED.match(key) or _DOTTED.match(key)
        before = prefix[0] if prefix else ""
        own = key[len(before) :]
        for other, native in _PROCESSORS:
            if own.endswith(other):
                own = own.removesuffix(other) + native
        own = own.replace(".processor.", ".").replace("_processor_to_", "_to_")
        folded = _underscored(text.folded(own))
        return cls(key, before, folded, text_encoder is not None)


def _underscored(folded: str) -> str:
    return _UNDERSCORED_NUMBER.sub(r"\1*", folded.replace(".", "_"))


def _kind(own: set[str]) -> str:
    """A layer's kind; a bias or a magnitude beside factors only extends theirs."""
    if "DoRA" in own:
        return "DoRA"
    return min(own - _DIFFERENCES, default=min(own))


def _scalar(checkpoint: Checkpoint, name: str) -> float | None:
    """The one number that a tensor holds; None if it is no finite number."""
    spec = checkpoint.specs[name]
    if spec.numel != 1 or (spec.dtype != "BF16" and spec.dtype not in _SCALARS):
        return None
    raw = checkpoint.read_bytes(name)
    if spec.dtype == "BF16":  # the upper half of a float32
        value = float(struct.unpack("<f", b"\0\0" + raw)[0])
    else:
        value = float(struct.unpack(_SCALARS[spec.dtype], raw)[0])
    return value if math.isfinite(value) else None


def _fits(targets: Sequence[_Target], width: int | None) -> list[Fit]:
    counts = Counter(target.folded for target in targets)
    fits = []
    for name in families.names():
        family = families.load(name)
        if family.kind != "diffusion" or (width is not None and width != _UNETS.get(name, width)):
            continue
        layers = _layers(family)
        known = sum(
            count
            for folded, count in counts.items()
            if folded in layers or (folded.endswith("_to_out") and folded + "_0" in layers)
        )
        if 2 * known > len(targets):
            fits.append(Fit(family=name, title=family.title, known=known, targets=len(targets)))
    best = max((fit.known for fit in fits), default=0)
    if best == len(targets):
        fits = [fit for fit in fits if fit.known == best]
    return sorted(fits, key=lambda fit: (-fit.known, fit.family))


def _layers(family: families.Family) -> set[str]:
    """The family's layers by all of their names, folded as those of targets are."""
    natives = {_underscored(layer) for layer in family.layers}
    # A family that is written as another one inherits names of layers that it has not.
    lines = (line for line in family.dialect.lines if _plain(line.native) in natives)
    others = {_plain(name.pattern) for line in lines for c in line.choices for name in c}
    return natives | others


def _plain(name: str) -> str:
    return _underscored(_LAYER.sub("", text.folded(name)))


def _width(targets: Sequence[_Target], columns: Mapping[str, int]) -> int | None:
    """What a U-Net's cross attention reads; None if no target tells."""
    widths = {
        columns[t.key] for t in targets if _CROSS_ATTENTION.search(t.key) and t.key in columns
    }
    return widths.pop() if len(widths) == 1 else None


def _names_of(targets: Sequence[_Target], width: int | None) -> str | None:
    """A model that is no family and has such names."""
    for pattern, model in _OTHERS:
        if any(pattern.match(t.key[len(t.prefix) :]) for t in targets):
            return model
    return None if width is None else _NO_FAMILY.get(width)
