"""What is known of a model decides what is quantized: families, told or found, in the plan."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import make
import pytest

import cq
import cq_quant
from cq.core import knowledge
from cq.core.checkpoint import Checkpoint, Part
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError

SKELETONS = sorted(Path(__file__).parent.glob("skeletons/*.json.gz"))
NAMES = [path.name.removesuffix(".json.gz") for path in SKELETONS]


def skeleton(name: str, prefix: str = "") -> Checkpoint:
    """A released model without its weights."""
    path = Path(__file__).parent / "skeletons" / f"{name}.json.gz"
    tensors = json.loads(gzip.decompress(path.read_bytes()))
    return Checkpoint(
        parts=tuple(
            Part(
                tensors={prefix + key: TensorSpec(dtype, tuple(shape))},
                nbytes_peak=0,
                produce=lambda: iter(()),
            )
            for key, (dtype, shape) in tensors.items()
        ),
        metadata={},
        sources=(),
    )


def quantized(checkpoint: Checkpoint, **settings: str) -> set[str]:
    model = cq_quant.quantize(checkpoint, **settings)  # type: ignore[arg-type]
    return {note["layer"] for note in model.notes if note["action"] == "quantize"}


@pytest.mark.parametrize("name", NAMES)
def test_plan_keeps_what_the_family_keeps_and_nothing_else(name: str) -> None:
    """At 8 bits all but the `keep` groups, at 4 bits not the modulation either."""
    checkpoint = skeleton(name)
    (match,) = knowledge.know(checkpoint.specs).matches
    if match.family.unloadable is not None:
        with pytest.raises(PlanError, match="no layer to quantize") as caught:
            quantized(checkpoint)
        assert match.family.unloadable in (caught.value.hint or "")
        return
    roles = {
        key.removesuffix(".weight"): match.family.role(key.removesuffix(".weight"))
        for key, spec in checkpoint.specs.items()
        if key.endswith(".weight") and len(spec.shape) == 2 and min(spec.shape) >= 64
    }
    ordinary = {layer for layer, role in roles.items() if role is None or role.name != "keep"}
    modulation = {o for o in ordinary if (role := roles[o]) is not None and role[0] == "modulation"}
    assert quantized(checkpoint) == ordinary
    packed = quantized(checkpoint, format="nvfp4")
    read = {layer for layer in ordinary if match.family.reads_shape(layer)}
    assert packed == ordinary - modulation - read


@pytest.mark.parametrize("name", ["flux1-dev", "sdxl-unet", "wan21-t2v-14b", "te-qwen3-4b"])
def test_plan_is_the_same_under_a_prefix(name: str) -> None:
    prefix = "model.diffusion_model." if not name.startswith("te-") else "model."
    bare = quantized(skeleton(name))
    assert {prefix + layer for layer in bare} == quantized(skeleton(name, prefix))


def test_a_family_that_is_told_is_taken(tmp_path: Path) -> None:
    flux = skeleton("flux1-dev")
    assert quantized(flux, family="flux1") == quantized(flux)
    assert quantized(flux, family="none") == quantized(flux)  # general rules say the same of it


def test_an_old_preset_keeps_what_it_kept() -> None:
    z_image = skeleton("z-image")
    kept = quantized(z_image) - quantized(z_image, family="zimage_refiner")
    assert kept
    assert all(layer.startswith(("noise_refiner.", "context_refiner.")) for layer in kept)


def test_a_family_without_a_layer_in_common_is_refused() -> None:
    with pytest.raises(PlanError, match="no layer in common with the family `sdxl`") as caught:
        cq_quant.quantize(skeleton("flux1-dev"), family="sdxl")
    assert "found by itself" in (caught.value.hint or "")


def test_an_unknown_family_is_refused_with_near_names() -> None:
    with pytest.raises(PlanError, match="no family `fluxx`") as caught:
        cq_quant.quantize(skeleton("flux1-dev"), family="fluxx")
    assert "flux1" in (caught.value.hint or "")


def test_an_unknown_model_gets_general_rules(tmp_path: Path) -> None:
    path = make.save(tmp_path / "in.safetensors", make.model())
    checkpoint = cq.open(path)
    known = knowledge.know(checkpoint.specs)
    assert known.matches == ()
    assert known.described() is None
    assert "no family that cq knows" in known.remark()
    assert known.role("blocks.0.attn.qkv") is None
    assert known.reads_shape("img_in") is None
    assert quantized(checkpoint) == set(make.quantized_names())


def test_reasons_are_the_familys(tmp_path: Path) -> None:
    notes = {note["layer"]: note for note in cq_quant.quantize(skeleton("flux1-dev")).notes}
    assert "embeds time, guidance" in notes["guidance_in.in_layer"]["reason"]
    packed = cq_quant.quantize(skeleton("flux1-dev"), format="nvfp4").notes
    reasons = {note["layer"]: note["reason"] for note in packed}
    assert "8 bits are enough" in reasons["double_blocks.0.img_mod.lin"]
