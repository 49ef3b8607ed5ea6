"""Components: the models of a checkpoint that holds several."""

from __future__ import annotations

import pytest
from test_families import KNOWN, SHARED, Specs, ltx_vae, read, sd_vae, under, wan_vae

from cq.core.components import Component, Place, component_of, components
from cq.core.dtypes import TensorSpec
from cq.core.families import PREFIXES


def summary(found: tuple[Component, ...]) -> list[tuple[str, str, str | None]]:
    return [(c.kind, c.prefix, c.family.name if c.family else None) for c in found]


def open_clip_g() -> Specs:
    """CLIP-G under OpenCLIP's names, as SDXL checkpoints have it."""
    names = [f"transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(32)]
    wide = dict.fromkeys(names, TensorSpec("F16", (5120, 1280)))
    return wide | {
        "token_embedding.weight": TensorSpec("F16", (49408, 1280)),
        "positional_embedding": TensorSpec("F16", (77, 1280)),
        "ln_final.weight": TensorSpec("F16", (1280,)),
    }


def sdxl_checkpoint() -> Specs:
    return (
        under("model.diffusion_model.", read("sdxl-unet"))
        | under("conditioner.embedders.0.transformer.", read("te-clip-l"))
        | under("conditioner.embedders.1.model.", open_clip_g())
        | under("first_stage_model.", sd_vae())
        | {"denoiser.sigmas": TensorSpec("F32", (1000,))}
        | under("model_ema.", {"decay": TensorSpec("F32", ())})
    )


def test_components_take_a_checkpoint_apart() -> None:
    specs = sdxl_checkpoint()
    found = components(specs)
    assert summary(found) == [
        ("diffusion model", "model.diffusion_model.", "sdxl"),
        ("text encoder", "conditioner.embedders.0.", "clip"),
        ("text encoder", "conditioner.embedders.1.", "clip"),
        ("VAE", "first_stage_model.", None),
        ("other", "", None),
        ("other", "model_ema.", None),
    ]
    variants = [c.detection.match.variant for c in found if c.detection.match]
    assert variants == ["sdxl-unet", "clip-l", "clip-g"]
    prefixes = [c.detection.match.prefix for c in found if c.detection.match]
    assert prefixes[2] == "conditioner.embedders.1.model."
    assert [c.tensors for c in found] == [1680, 196, 35, len(sd_vae()), 1, 1]
    assert sum(c.nbytes for c in found) == sum(spec.nbytes for spec in specs.values())


@pytest.mark.parametrize(
    ("parts", "summarized"),
    [
        (
            {
                "model.diffusion_model.": "sd3.5-large",
                "text_encoders.clip_l.transformer.": "te-clip-l",
                "text_encoders.t5xxl.transformer.": "te-t5xxl",
            },
            [
                ("diffusion model", "model.diffusion_model.", "sd3"),
                ("text encoder", "text_encoders.clip_l.", "clip"),
                ("text encoder", "text_encoders.t5xxl.", "t5"),
            ],
        ),
        (
            {"model.diffusion_model.": "sd15-unet", "cond_stage_model.transformer.": "te-clip-l"},
            [
                ("diffusion model", "model.diffusion_model.", "sd15"),
                ("text encoder", "cond_stage_model.", "clip"),
            ],
        ),
        (
            {
                "model.diffusion_model.": "z-image",
                "text_encoders.qwen3_4b.transformer.": "te-qwen3-4b",
            },
            [
                ("diffusion model", "model.diffusion_model.", "z-image"),
                ("text encoder", "text_encoders.qwen3_4b.", "llm"),
            ],
        ),
    ],
)
def test_components_find_the_family_of_each(
    parts: dict[str, str], summarized: list[tuple[str, str, str | None]]
) -> None:
    specs: Specs = {}
    for prefix, skeleton in parts.items():
        specs |= under(prefix, read(skeleton))
    assert summary(components(specs)) == summarized


def test_components_of_a_model_with_sound() -> None:
    specs = under("model.diffusion_model.", read("ltx-2-19b")) | under("vae.", ltx_vae())
    for name in ("audio_vae.decoder.conv_in.weight", "vocoder.conv_pre.weight"):
        specs[name] = TensorSpec("BF16", (64, 64, 3))
    specs["text_embedding_projection.aggregate_embed.weight"] = TensorSpec("BF16", (64, 64))
    assert summary(components(specs)) == [
        ("diffusion model", "model.diffusion_model.", "ltx2"),
        ("VAE", "vae.", None),
        ("VAE", "audio_vae.", None),
        ("VAE", "vocoder.", None),
        ("text encoder", "text_embedding_projection.", None),
    ]


@pytest.mark.parametrize("skeleton", KNOWN)
def test_a_file_of_one_model_is_one_component_of_its_kind(skeleton: str) -> None:
    family = KNOWN[skeleton][0]
    kind = "text encoder" if skeleton.startswith("te-") else "diffusion model"
    for prefix in PREFIXES:
        (component,) = components(under(prefix, read(skeleton)))
        if kind == "text encoder" and "diffusion_model" in prefix:
            # No family of text encoders stands there: the prefix says otherwise.
            assert (component.kind, component.family) == ("diffusion model", None)
            continue
        assert (component.kind, component.family and component.family.name) == (kind, family)
        match = component.detection.match
        assert match is not None
        assert match.variant == SHARED.get(skeleton, skeleton.removeprefix("te-"))
        assert match.prefix == prefix


@pytest.mark.parametrize("vae", [sd_vae, wan_vae, ltx_vae])
def test_a_vae_is_a_vae(vae: object) -> None:
    assert callable(vae)
    assert summary(components(vae())) == [("VAE", "", None)]
    assert summary(components(under("vae.", vae()))) == [("VAE", "vae.", None)]


def test_what_is_unknown_is_other() -> None:
    assert summary(components({"a.weight": TensorSpec("F32", (4, 4))})) == [("other", "", None)]
    assert components({}) == ()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.diffusion_model.img_in.weight", ("diffusion model", "model.diffusion_model.")),
        ("diffusion_model.img_in", ("diffusion model", "diffusion_model.")),
        ("first_stage_model.decoder.conv_in", ("VAE", "first_stage_model.")),
        ("audio_vae.decoder.conv_in", ("VAE", "audio_vae.")),
        ("cond_stage_model.clip_l.transformer.x", ("text encoder", "cond_stage_model.clip_l.")),
        ("text_encoder_2.x", ("text encoder", "text_encoder_2.")),
        ("text_embedding_projection.weight", ("text encoder", "text_embedding_projection.")),
        ("model.layers.0.mlp.up_proj", (None, "")),
        ("vaettir.weight", (None, "")),
        ("text_embedding.0.weight", (None, "")),
    ],
)
def test_component_of_tells_by_the_prefix(name: str, place: tuple[str | None, str]) -> None:
    assert component_of(name) == Place(*place)
