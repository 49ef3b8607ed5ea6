"""Every way in which ComfyUI computes nonsense without a word is found, by name; sound files of all
formats have no finding."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from test_families import read

from cq.core import catalog
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.errors import PlanError
from cq.core.families import Family
from cq.core.knowledge import know
from cq.core.packing import unswizzle
from cq.core.recipe import Rule
from cq_analyze import Report, findings, verify
from cq_edit import edit
from cq_quant import quantize

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]
ROOT = Path(__file__).resolve().parent.parent
STORING = [name for name in catalog.names("formats") if not catalog.load("formats", name).casts]
LAYER = "blocks.1.mlp.0"
PREFIX = "model.diffusion_model."
N, K = 128, 256


def held(tensors: Tensors, *, metadata: dict[str, str] | None = None) -> Checkpoint:
    """A checkpoint that never was a file."""
    parts = [make.part({name: tensor.contiguous()}) for name, tensor in tensors.items()]
    return make.checkpoint(*parts, metadata=metadata)


def names(report: Report) -> list[tuple[str, str | None]]:
    return [(found.name, found.layer) for found in report.findings]


def base(*, layer: str = "mlp.0", blocks: int = 5) -> Tensors:
    """A model whose layers every format takes."""
    tensors: Tensors = {"img_in.weight": make.weight(64, 64, dtype="BF16", seed="in")}
    for i in range(blocks):
        tensors[f"blocks.{i}.{layer}.weight"] = make.weight(N, K, dtype="BF16", seed=i)
        tensors[f"blocks.{i}.{layer}.bias"] = make.weight(N, dtype="BF16", seed=i)
    return tensors


def stored(format_name: str, tensors: Tensors | None = None, **asked: Any) -> Tensors:
    """`base`, or other tensors, in a format."""
    asked = {"optimizer": "rtn", "only": ["blocks.*.mlp.*"], **asked}
    source = held(base() if tensors is None else tensors)
    model = quantize(source, format=format_name, allow_custom_loader=True, **asked)
    return model.read_many(model.specs)


def marker(settings: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def settings_of(tensors: Tensors, layer: str = LAYER) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tensors[f"{layer}.comfy_quant"].numpy().tobytes())
    return found


def header(tensors: Tensors, prefix: str = "") -> dict[str, str]:
    """The header form of all markers, which are taken out of `tensors`."""
    layers = {}
    for name in [n for n in tensors if n.endswith(".comfy_quant")]:
        layer = name.removesuffix(".comfy_quant")
        layers[prefix + layer] = settings_of(tensors, layer)
        del tensors[name]
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


# The catalogue: what ComfyUI is silent about, and what the tools before this one write


def drop(*locals_: str) -> Change:
    def change(tensors: Tensors) -> None:
        for local in locals_:
            del tensors[f"{LAYER}.{local}"]

    return change


def become(local: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{local}"] = change(tensors[f"{LAYER}.{local}"]).clone()

    return apply


def say(**changes: Any) -> Change:
    """Other settings in the marker; None leaves one out."""

    def apply(tensors: Tensors) -> None:
        settings = {**settings_of(tensors), **changes}
        settings = {key: value for key, value in settings.items() if value is not None}
        tensors[f"{LAYER}.comfy_quant"] = marker(settings)

    return apply


def add(local: str, tensor: torch.Tensor) -> Change:
    def apply(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{local}"] = tensor

    return apply


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.contiguous().view(torch.uint8)
    return ((raw << 4) | (raw >> 4)).view(codes.dtype)


def by_rows(scales: torch.Tensor) -> torch.Tensor:
    return unswizzle(scales, 0, *scales.shape)


ROTATED = {"optimizer": "quip"}
# name of the case: format, options, what breaks it, what is found, whether only a reference tells
CASES: dict[str, tuple[str, dict[str, Any], Change, str, bool]] = {
    "int8 without a marker": (
        "int8_tensorwise",
        {},
        drop("comfy_quant"),
        "marker.missing",
        False,
    ),
    "the weight is missing": ("int8_tensorwise", {}, drop("weight"), "weight.missing", False),
    "the bias is missing": ("int8_tensorwise", {}, drop("bias"), "bias.missing", True),
    "fp8 as bytes": (
        "float8_e4m3fn",
        {},
        become("weight", lambda w: w.view(torch.uint8)),
        "fp8.container",
        False,
    ),
    "mxfp8 as bytes": (
        "mxfp8",
        {},
        become("weight", lambda w: w.view(torch.uint8)),
        "fp8.container",
        False,
    ),
    "e5m2 called e4m3": ("float8_e5m2", {}, say(format="float8_e4m3fn"), "weight.dtype", False),
    "an unknown format": (
        "int8_tensorwise",
        {},
        say(format="int8_lodewise"),
        "marker.format",
        False,
    ),
    "comfy-quants: no format": (
        "int8_tensorwise",
        ROTATED,
        say(format=None, per_row=True),
        "marker.format",
        False,
    ),
    "convert_to_quant: int8_axiswise": (
        "int8_tensorwise",
        {},
        say(format="int8_axiswise"),
        "marker.format",
        False,
    ),
    "convert_to_quant: rows of fp8": (
        "float8_e4m3fn",
        {},
        become("weight_scale", lambda s: s.reshape(1, 1).repeat(N, 1)),
        "scale.shape",
        False,
    ),
    "a scale [N]": (
        "int8_tensorwise",
        {},
        become("weight_scale", lambda s: s.reshape(-1)),
        "scale.shape",
        False,
    ),
    "a scale [1]": (
        "int8_tensorwise",
        {"scaling": "tensor"},
        become("weight_scale", lambda s: s.reshape(1)),
        "scale.shape",
        False,
    ),
    "a half scale": (
        "int8_tensorwise",
        {},
        become("weight_scale", lambda s: s.half()),
        "scale.dtype",
        False,
    ),
    "w4a4 with a column of scales": (
        "convrot_w4a4",
        {},
        become("weight_scale", lambda s: s.reshape(-1, 1)),
        "scale.shape",
        False,
    ),
    "a rotation group of 128": (
        "int8_tensorwise",
        ROTATED,
        say(convrot_groupsize=128),
        "convrot.group",
        False,
    ),
    "a rotation group over K": (
        "int8_tensorwise",
        ROTATED,
        say(convrot_groupsize=1024),
        "convrot.group",
        False,
    ),
    "a lost rotation": (
        "int8_tensorwise",
        ROTATED,
        say(convrot=None, convrot_groupsize=None),
        "convrot.lost",
        True,
    ),
    "a rotation that was never made": (
        "int8_tensorwise",
        {"rotate": "off"},
        say(convrot=True, convrot_groupsize=64),
        "convrot.lost",
        True,
    ),
    "another rotation": ("convrot_w4a4", {}, say(convrot_groupsize=16), "convrot.lost", True),
    "nvfp4 with swapped nibbles": ("nvfp4", {}, become("weight", nibbles), "codes.order", True),
    "nvfp4 with scales by rows": (
        "nvfp4",
        {},
        become("weight_scale", by_rows),
        "scale.order",
        True,
    ),
    "w4a4 with swapped nibbles": (
        "convrot_w4a4",
        {},
        become("weight", nibbles),
        "codes.order",
        True,
    ),
    "smoothing that int8 does not undo": (
        "int8_tensorwise",
        {},
        add("pre_quant_scale", torch.full((K,), 2.0)),
        "scale.ignored",
        False,
    ),
    "a correction that nobody reads": (
        "asym_w4a8_int8",
        {},
        add("weight_correction", torch.ones(N)),
        "scale.ignored",
        False,
    ),
    "a scale of NaN": (
        "int8_tensorwise",
        {},
        become("weight_scale", lambda s: s * torch.nan),
        "scale.value",
        False,
    ),
    "no scale": ("nvfp4", {}, drop("weight_scale_2"), "scale.missing", False),
    "a quantized convolution": (
        "int8_tensorwise",
        {},
        become("weight", lambda w: w.reshape(N, K // 4, 2, 2)),
        "weight.dtype",
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_verify_finds_a_broken_file_by_name(case: str) -> None:
    format_name, asked, breaks, expected, needs_reference = CASES[case]
    tensors = stored(format_name, **asked)
    sound, original = held(dict(tensors)), held(base())
    assert verify(sound, against=original).passed
    breaks(tensors)
    report = verify(held(tensors), against=original)
    assert (expected, LAYER) in names(report)
    assert {layer for _, layer in names(report)} == {LAYER}
    assert findings.KINDS[expected].mend == report.findings[0].mend or case.startswith("an unknown")
    if not needs_reference:
        assert (expected, LAYER) in names(verify(held(tensors)))


MENDS: dict[str, dict[str, Any]] = {
    **{
        case: {"migrate": "comfy_quant"}
        for case in (
            "int8 without a marker",
            "comfy-quants: no format",
            "convert_to_quant: int8_axiswise",
            "fp8 as bytes",
            "mxfp8 as bytes",
            "e5m2 called e4m3",
            "a scale [N]",
            "a scale [1]",
            "a half scale",
            "w4a4 with a column of scales",
        )
    },
    "a lost rotation": {
        "set_quant": [(LAYER, {"convrot": True, "convrot_groupsize": 256})],
        "allow_broken": True,
    },
    "a rotation that was never made": {
        "set_quant": [(LAYER, {"convrot": None, "convrot_groupsize": None})],
        "allow_broken": True,
    },
    "a rotation group of 128": {"set_quant": [(LAYER, {"convrot_groupsize": 256})]},
}


@pytest.mark.parametrize("case", MENDS)
def test_the_advice_of_a_finding_mends_it(case: str) -> None:
    format_name, asked, breaks, expected, _ = CASES[case]
    tensors = stored(format_name, **asked)
    breaks(tensors)
    for word in MENDS[case]:
        assert f"--{word.replace('_', '-')}" in findings.KINDS[expected].mend
    mended = edit(held(tensors), **MENDS[case])
    report = verify(mended, against=held(base()))
    assert report.passed, report.findings


def test_a_lost_rotation_is_at_least_a_note_without_a_reference() -> None:
    tensors = stored("int8_tensorwise", **ROTATED)
    say(convrot=None, convrot_groupsize=None)(tensors)
    report = verify(held(tensors))
    assert report.passed
    assert any(f"`{LAYER}` is not rotated, but 4 of 5" in note for note in report.notes)


def test_diagnosis_names_the_group_that_was_used() -> None:
    tensors = stored("int8_tensorwise", optimizer="quip", rotate="64")
    say(convrot_groupsize=16)(tensors)
    (found,) = verify(held(tensors), against=held(base())).findings
    assert "rotated in groups of 64" in found.sentence
    tensors = stored("int8_tensorwise", rotate="off")
    say(convrot=True, convrot_groupsize=16)(tensors)
    (found,) = verify(held(tensors), against=held(base())).findings
    assert "must have no `convrot`" in found.sentence


def test_what_no_usual_mistake_explains_stays_unlike() -> None:
    tensors = stored("nvfp4")
    become("weight", lambda w: w.flip(0))(tensors)
    report = verify(held(tensors), against=held(base()))
    assert names(report) == [("values.unlike", LAYER)]


# The header


def test_a_header_without_the_files_prefix_is_found() -> None:
    """ComfyUI's checkpoint loader would compute with raw codes, its UNet loader would not."""
    tensors = stored("int8_tensorwise")
    metadata = header(tensors)
    prefixed = {PREFIX + name: tensor for name, tensor in tensors.items()}
    original = held({PREFIX + name: tensor for name, tensor in base().items()})
    report = verify(held(prefixed, metadata=metadata), against=original)
    assert names(report) == [("header.prefix", f"{PREFIX}blocks.{i}.mlp.0") for i in range(5)]
    assert report.fidelity is not None and len(report.fidelity.layers) == 5
    whole = stored("int8_tensorwise")
    metadata = header(whole, prefix=PREFIX)
    assert verify(held(prefixed, metadata=metadata)).passed


def test_a_header_under_another_prefix_beside_equal_markers_is_nothing() -> None:
    tensors = {PREFIX + name: tensor for name, tensor in stored("int8_tensorwise").items()}
    metadata = header(stored("int8_tensorwise"))
    assert verify(held(tensors, metadata=metadata)).passed


# Where a format may stand


def test_an_embedding_rotated_inside_params_is_found() -> None:
    tensors = stored("int8_tensorwise", optimizer="quip", rotate="64")
    inside = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}
    embedding = {
        name.replace(LAYER, "model.embed_tokens"): tensor
        for name, tensor in tensors.items()
        if name.startswith(LAYER) and not name.endswith("bias")
    }
    assert verify(held(embedding)).passed
    embedding["model.embed_tokens.comfy_quant"] = marker(inside)
    report = verify(held(embedding))
    assert names(report) == [("convrot.params", "model.embed_tokens")]


def specs_of(skeleton: str, quantized: str, layer_changes: Callable[[dict[str, Any]], None]) -> Any:
    """A checkpoint with the names and shapes of a released model, all its layers of the family in
    8 bits; for `--header-only` alone."""
    specs = dict(read(skeleton))
    family: Family = know(specs).matches[0].family
    for name in [n for n in specs if n.endswith(".weight")]:
        layer = name.removesuffix(".weight")
        spec = specs[name]
        if len(spec.shape) == 2 and family.role(layer) is None:
            specs[name] = TensorSpec("F8_E4M3", spec.shape)
            specs[f"{layer}.weight_scale"] = TensorSpec("F32", ())
            specs[f"{layer}.comfy_quant"] = TensorSpec(
                "U8", (len(json.dumps({"format": quantized})),)
            )
    layer_changes(specs)
    raw = json.dumps({"format": quantized}).encode()
    return _Headed(specs, raw)


class _Headed:
    """What `examine` asks of a checkpoint, without data."""

    def __init__(self, specs: dict[str, TensorSpec], raw: bytes) -> None:
        self.specs, self.metadata, self._raw = specs, {}, raw

    def read_bytes(self, name: str) -> bytes:
        return self._raw


def judged(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    from cq_analyze import structure

    # What is quantized without a marker is another question, and asks for parts.
    monkeypatch.setattr(structure, "_unmarked", lambda *_: ([], []))
    found = structure.examine(checkpoint)
    return [(f.name, f.layer) for f in found.findings]


@pytest.mark.parametrize(
    ("skeleton", "layer", "other"),
    [
        ("flux1-dev", "double_blocks.7.img_attn.qkv", "double_blocks.7.img_attn.qvk"),
        ("qwen-image", "transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.qq"),
        ("wan21-t2v-14b", "blocks.11.ffn.0", "blocks.11.ffn.9"),
        ("te-t5xxl", "encoder.block.4.layer.0.SelfAttention.q", "encoder.block.4.layer.0.q"),
    ],
)
def test_a_layer_that_other_blocks_have_is_missed_and_one_of_no_family_is_surplus(
    skeleton: str, layer: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(specs: dict[str, Any]) -> None:
        for name in [n for n in specs if n.startswith(f"{layer}.")]:
            del specs[name]

    def renamed(specs: dict[str, Any]) -> None:
        for name in [n for n in specs if n.startswith(f"{layer}.")]:
            specs[name.replace(layer, other)] = specs.pop(name)

    missing = [("layers.missing", layer)]
    assert judged(specs_of(skeleton, "float8_e4m3fn", gone), monkeypatch) == missing
    found = judged(specs_of(skeleton, "float8_e4m3fn", renamed), monkeypatch)
    assert ("layers.surplus", other) in found
    assert set(found) == {*missing, ("layers.surplus", other)}


def test_a_quantized_clip_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(specs_of("te-clip-l", "float8_e4m3fn", lambda _: None), monkeypatch)
    assert {name for name, _ in found} == {"layer.unloadable"}


# Sound files


def test_verify_finds_nothing_in_200_random_sound_files_of_all_formats() -> None:
    seen: dict[str, int] = {}
    seed = verified = 0
    while verified < 200:
        seed += 1
        chance = random.Random(seed)
        format_name = STORING[seed % len(STORING)]
        plug = catalog.load("formats", format_name)
        shapes = [(chance.choice([32, 100, 128, 300]), chance.choice([64, 128, 256, 320]))]
        shapes.append((256, 256))
        prefix = chance.choice(["", PREFIX])
        bias = chance.random() < 0.5
        tensors: Tensors = {}
        for i, shape in enumerate(shapes):
            kind = chance.choice(["BF16", "F16", "F32"])
            weight = make.weight(*shape, seed=(seed, i)) * chance.choice([1e-3, 1, 30])
            tensors[f"{prefix}blocks.{i}.mlp.0.weight"] = weight.to(torch_dtype(kind))
            if bias:
                tensors[f"{prefix}blocks.{i}.mlp.0.bias"] = make.weight(shape[0], seed=seed)
        source = held(tensors)
        only = [f"{prefix}blocks.*"]
        rules = ()
        if chance.random() < 0.3:
            other = chance.choice(STORING)
            rules = (Rule(pattern=f"{prefix}blocks.0.*", settings={"format": other}),)
        try:
            model = quantize(
                source,
                format=format_name,
                scaling=chance.choice(plug.scalings),
                optimizer="rtn",
                rotate=chance.choice(["auto", "auto", "off", "64"])
                if plug.rotation == "optional" and not rules
                else "auto",
                scale_search=chance.random() < 0.2,
                recipe=rules,
                only=() if rules else only,
                allow_custom_loader=True,
                save_quant_metadata=chance.random() < 0.3,
            )
        except PlanError as error:
            assert error.code == "plan.nothing", error  # the format takes none of the shapes
            continue
        made = model.read_many(model.specs)
        metadata = header(made) if chance.random() < 0.2 else dict(model.metadata)
        report = verify(held(made, metadata=metadata), against=source, workers=1)
        assert report.findings == (), (seed, report.findings)
        assert len(report.layers) == len(report.fidelity.layers if report.fidelity else ()) > 0
        for name in report.formats:
            seen[name] = seen.get(name, 0) + 1
        verified += 1
    assert set(seen) == set(STORING) and min(seen.values()) >= 10, seen


# The table of findings


def test_every_finding_that_the_code_names_is_in_the_table() -> None:
    used = set()
    for path in [*ROOT.glob("cq_analyze/*.py"), *ROOT.glob("cq/core/formats/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            first = node.args[0]
            if called in {"finding", "Fault", "_Mistake"} and isinstance(first, ast.Constant):
                used.add(first.value)
    assert used - set(findings.KINDS) == set()
    # `scale.shape` of stacked experts is told by a pair, which `finding` is made of.
    assert set(findings.KINDS) - used == set()


def test_the_page_of_findings_is_fresh() -> None:
    assert (ROOT / "docs" / "findings.md").read_text() == findings.markdown()


def test_every_case_of_the_catalogue_has_its_own_advice() -> None:
    for name, kind in findings.KINDS.items():
        assert kind.meaning and kind.mend
        assert kind.heard in {"silent", "fails", "-"}, name
