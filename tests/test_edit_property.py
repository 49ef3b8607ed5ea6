"""No sequence of accepted edits makes a file that `cq verify` calls broken, and what an edit does
not name keeps its bytes: with random small files of all formats and random edits."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cq
import cq_edit
from cq.core import catalog, comfy
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import InputError, PlanError
from cq.core.formats import Format
from cq_analyze import verify

FORMATS = [name for name in catalog.names("formats") if not catalog.load("formats", name).casts]
SIDE = 128


def stored(name: str, seed: object) -> dict[str, torch.Tensor]:
    """A small weight in the format, its marker beside it."""
    plug: Format = catalog.load("formats", name)
    spec = TensorSpec("BF16", (SIDE, SIDE))
    group = 16 if plug.rotation == "always" else None
    weight = make.weight(SIDE, SIDE, seed=seed)
    scaling = plug.scalings[0]
    grid = plug.grid(spec, scaling)
    assert grid is not None
    shared = grid.survey([weight])
    scales = {**shared, **grid.scales(weight, shared)}
    tensors = {"weight": plug.pack(grid.nearest(weight, scales)), **plug.pack_scales(scales)}
    assert {k: spec_of(t) for k, t in tensors.items()} == plug.tensors(spec, scaling)
    marker = comfy.marker_bytes(plug.marker(spec, scaling, group))
    return {**tensors, "comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}


_STORED = {(name, i): stored(name, (name, i)) for name in FORMATS for i in range(2)}
LAYERS = ("a.0.up", "a.1.up", "a.1.down", "b.mlp")


@dataclass(frozen=True)
class Plan:
    """A sound file: for each layer a format, `plain` or `float8`, and which of two weights; where
    its markers stand; and which layers have a bias and a static scale of the activations."""

    prefix: str
    kinds: tuple[tuple[str, int], ...]
    form: str
    extras: frozenset[int]

    def save(self, path: Path) -> Path:
        """Write the file; the path."""
        tensors: dict[str, torch.Tensor] = {f"{self.prefix}norm.scale": make.weight(8)}
        entries: dict[str, Any] = {}
        for i, (layer, (kind, seed)) in enumerate(zip(LAYERS, self.kinds, strict=True)):
            own = self._layer(kind, seed)
            if "comfy_quant" in own:
                entries[self.prefix + layer] = json.loads(own["comfy_quant"].numpy().tobytes())
            if i in self.extras:
                own["bias"] = make.weight(own["weight"].shape[0], dtype="F16", seed=layer)
                if kind in {"nvfp4", "float8_e4m3fn"}:
                    own["input_scale"] = torch.tensor(0.5)
            tensors |= {f"{self.prefix}{layer}.{local}": t.clone() for local, t in own.items()}
        metadata = {"author": "nobody"}
        if self.form != "markers" and entries:
            metadata[comfy.HEADER_KEY] = comfy.header_value(entries)
            if self.form == "header":
                tensors = {n: t for n, t in tensors.items() if not n.endswith(".comfy_quant")}
        return make.save(path, tensors, metadata)

    def _layer(self, kind: str, seed: int) -> dict[str, torch.Tensor]:
        if kind == "plain":
            return {"weight": make.weight(8, 8, dtype="BF16", seed=seed)}
        if kind == "float8":
            return {"weight": make.weight(8, 8, seed=seed).to(torch.float8_e4m3fn)}
        return dict(_STORED[kind, seed])


PLANS = st.builds(
    Plan,
    st.sampled_from(["", "model.diffusion_model."]),
    st.tuples(
        *(
            st.tuples(st.sampled_from([*FORMATS, "plain", "float8"]), st.integers(0, 1))
            for _ in LAYERS
        )
    ),
    st.sampled_from(["markers", "both", "header"]),
    st.frozensets(st.integers(0, len(LAYERS) - 1)),
)
LOCALS = ("weight", "bias", "weight_scale", "comfy_quant", "input_scale", "*", "weight_codebook")
PATTERNS = st.one_of(
    st.builds("*{}.{}".format, st.sampled_from(LAYERS), st.sampled_from(LOCALS)),
    st.sampled_from(["*", "*.bias", "re:a[.]1", "*scale*", "re:weight$", "*norm*", "*.up", "zzz"]),
)
RULES = st.sampled_from(
    [
        "re:^a[.](\\d)=c.\\1",
        "re:^model[.]diffusion_model[.]=",
        "re:^=net.",
        "model.diffusion_model.=",
        "re:b[.]mlp=img_in",
        "re:a[.]0[.]up=x.embed_tokens",
        "b.mlp=b.mlp2",
        "re:[.]weight$=.w",
        "re:a[.]0=a.1",
        "re:up=experts",
        "a=q",
        "re:comfy_quant=marker",
        "norm.scale=norm.weight_scale",
        "norm.scale=a.0.up.input_scale",
    ]
)
SETTINGS = st.sampled_from(
    [
        {"full_precision_matrix_mult": True},
        {"full_precision_matrix_mult": None},
        {"convrot": True},
        {"format": "nvfp4"},
        {"format": None},
        {"linear_dtype": "int8"},
        {"group_size": 32},
        {"convrot_groupsize": 64},
        {"orig_dtype": "torch.float16"},
        {"nothing": 1},
    ]
)
EDITS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda p: {"remove_keys": [p]}, PATTERNS),
    st.builds(lambda p: {"keep_keys": [p]}, PATTERNS),
    st.builds(lambda r: {"rename": [r]}, RULES),
    st.builds(lambda p, s: {"set_quant": [(p, s)]}, st.sampled_from(["*", "*up", "b.*"]), SETTINGS),
    st.builds(lambda p, d: {"cast": [f"{p}={d}"]}, PATTERNS, st.sampled_from(["bf16", "fp32"])),
    st.sampled_from(
        [
            {"save_quant_metadata": True},
            {"drop_quant_metadata": True},
            {"migrate": "comfy_quant"},
            {"migrate": "comfy_quant", "save_quant_metadata": True},
            {"set_meta": {"k": "v"}},
            {"remove_meta": ["author"]},
            {"extract_component": "diffusion-model"},
        ]
    ),
)


def _findings(checkpoint: Checkpoint) -> list[str]:
    return [f"{found.name}: {found}" for found in verify(checkpoint).findings]


@settings(max_examples=80)
@given(PLANS, PLANS, st.lists(EDITS, min_size=1, max_size=4), PATTERNS, st.booleans())
def test_no_sequence_of_accepted_edits_makes_what_verify_calls_broken(
    plan: Plan, other: Plan, edits: list[dict[str, Any]], pattern: str, replace: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = cq.open(plan.save(directory / "m.safetensors"))
        path = other.save(directory / "o.safetensors")
        assert _findings(model) == []
        adding = {"add_keys": [f"{path}:{pattern}"], "replace": replace}
        for edit in [*edits, adding]:
            try:
                model = cq_edit.edit(model, **edit)
            except (PlanError, InputError):
                continue
        if model.stages:
            assert _findings(model) == []
            out = directory / "out.safetensors"
            cq.write(model, out)
            assert _findings(cq.open(out)) == []


@settings(max_examples=60)
@given(PLANS, EDITS)
def test_what_an_edit_does_not_name_keeps_its_bytes(plan: Plan, edit: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path, out = Path(name, "m.safetensors"), Path(name, "out.safetensors")
        try:
            edited = cq_edit.edit(cq.open(plan.save(path)), **edit)
        except (PlanError, InputError):
            return
        cq.write(edited, out)
        before, after = make.load(path), make.load(out)
        renamed = {n["name"]: n["to"] for n in edited.notes if n["change"] == "rename"}
        changed = {note["name"] for note in edited.notes} - set(renamed)
        for key, tensor in before.items():
            if key not in changed:
                assert make.same(tensor, after[renamed.get(key, key)])
        added = {n["name"] for n in edited.notes if n["change"] in {"add", "marker"}}
        assert set(after) <= set(before) | added | set(renamed.values())


def test_verify_would_tell_of_a_broken_edit(tmp_path: Path) -> None:
    """The property can fail: without the last look at an edit, a lone marker goes."""
    tensors = {f"{LAYERS[0]}.{k}": t for k, t in _STORED["int8_tensorwise", 0].items()}
    model = cq.open(make.save(tmp_path / "m.safetensors", {**tensors, "x": torch.ones(2)}))
    broken = cq_edit.edit(model, remove_keys=["*.comfy_quant"], allow_broken=True)
    assert [found.partition(":")[0] for found in _findings(broken)] == ["marker.missing"]
