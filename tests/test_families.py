"""Families: told from names and shapes alone, on the tensor lists of released models."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cq.core import catalog, families
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError
from cq.core.families import PREFIXES, Detection, Family
from cq.core.rotation import GROUPS

Specs = dict[str, TensorSpec]

# skeleton: family; layers kept, of modulation, optional; all layers less the kept. Counted over
# weights of two dimensions by those who made the skeletons, with patterns of their own.
KNOWN: dict[str, tuple[str, int, int, int, int]] = {
    "flux1-dev": ("flux1", 10, 76, 0, 304),
    "flux1-schnell": ("flux1", 8, 76, 0, 304),
    "flux1-fill-dev": ("flux1", 10, 76, 0, 304),
    "flux2-dev": ("flux2", 11, 0, 0, 160),
    "flux2-klein-4b": ("flux2", 9, 0, 0, 80),
    "flux2-klein-9b": ("flux2", 9, 0, 0, 112),
    "chroma1-hd": ("chroma", 15, 0, 0, 228),
    "chroma-radiance": ("chroma-radiance", 18, 0, 0, 228),
    "chroma-radiance-x0": ("chroma-radiance", 18, 0, 0, 228),
    "qwen-image": ("qwen-image", 6, 120, 0, 840),
    "qwen-image-edit": ("qwen-image", 6, 120, 0, 840),
    "qwen-image-layered": ("qwen-image", 7, 120, 0, 840),
    "z-image": ("z-image", 6, 32, 20, 202),
    "lumina2": ("lumina2", 6, 28, 20, 178),
    "wan21-t2v-1.3b": ("wan", 6, 0, 0, 300),
    "wan21-t2v-14b": ("wan", 6, 0, 0, 400),
    "wan21-i2v-14b": ("wan", 8, 0, 0, 480),
    "wan22-i2v-14b": ("wan", 6, 0, 0, 400),
    "wan22-ti2v-5b": ("wan", 6, 0, 0, 300),
    "wan21-vace-14b": ("wan", 6, 0, 9, 489),
    "wan22-animate-14b": ("wan", 15, 0, 24, 504),
    "wan22-s2v-14b": ("wan", 8, 0, 60, 460),
    "hunyuan-video-13b": ("hunyuan-video", 23, 80, 0, 320),
    "hunyuan-video-1.5": ("hunyuan-video", 25, 108, 0, 540),
    "ltxv-2b": ("ltxv", 7, 0, 0, 280),
    "ltxv-13b": ("ltxv", 7, 0, 0, 480),
    "ltx-2-19b": ("ltx2", 26, 0, 136, 1368),
    "ltx-2.3-22b": ("ltx2", 332, 0, 208, 1440),
    "ltx-2.5-22b": ("ltx2", 332, 0, 208, 1440),
    "sd3.5-large": ("sd3", 7, 76, 0, 377),
    "sd3.5-medium": ("sd3", 7, 48, 0, 263),
    "sdxl-unet": ("sdxl", 4, 17, 0, 739),
    "sd15-unet": ("sd15", 2, 22, 0, 182),
    "hidream-i1": ("hidream", 104, 48, 0, 1072),
    "cosmos-predict2-2b-t2i": ("cosmos2", 6, 168, 10, 448),
    "cosmos-predict2-14b-t2i": ("cosmos2", 6, 216, 10, 576),
    "anima-2b": ("anima", 68, 168, 10, 448),
    "krea2": ("krea2", 40, 0, 0, 224),
    "ideogram4": ("ideogram4", 8, 34, 0, 204),
    "minimax-h3": ("minimax-h3", 16, 50, 0, 250),
    "boogu-image": ("boogu", 7, 76, 42, 494),
    "ernie-image": ("ernie", 6, 0, 0, 252),
    "te-t5xxl": ("t5", 3, 0, 24, 168),
    "te-umt5-xxl": ("t5", 25, 0, 24, 168),
    "te-clip-l": ("clip", 2, 0, 0, 72),
    "te-clip-g": ("clip", 3, 0, 0, 192),
    "te-qwen3-4b": ("llm", 1, 0, 7, 252),
    "te-qwen3-8b": ("llm", 2, 0, 7, 252),
    "te-qwen3-0.6b": ("llm", 1, 0, 7, 196),
    "te-qwen2.5-vl-7b": ("llm", 164, 0, 7, 196),
    "te-mistral-small-24b": ("llm", 173, 0, 7, 280),
    "te-gemma2-2b": ("llm", 1, 0, 7, 182),
    "te-gemma3-12b": ("llm", 164, 0, 7, 336),
    "te-llama3.1-8b": ("llm", 2, 0, 7, 224),
    "te-gemma3-12b-comfy": ("llm", 164, 0, 7, 336),
    "te-mistral-24b-flux2-comfy": ("llm", 1, 0, 7, 210),
    "te-mistral-24b-comfy": ("llm", 1, 0, 7, 280),
}
# Models that no header tells apart share a variant, which names them all.
SHARED = {
    "qwen-image": "qwen-image, qwen-image-edit",
    "qwen-image-edit": "qwen-image, qwen-image-edit",
    "wan21-t2v-14b": "wan21-t2v-14b, wan22-t2v-14b",
}
DIRECTORY = Path(__file__).parent / "skeletons"
PACKED = [n for n in catalog.names("formats") if not catalog.load("formats", n).casts]
each_skeleton = pytest.mark.parametrize("skeleton", KNOWN)
each_family = pytest.mark.parametrize("family", families.names())


@cache
def read(skeleton: str) -> Specs:
    found = json.loads(gzip.decompress((DIRECTORY / f"{skeleton}.json.gz").read_bytes()))
    return {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in found.items()}


def under(prefix: str, specs: Mapping[str, TensorSpec]) -> Specs:
    return {prefix + name: spec for name, spec in specs.items()}


def layer_of(name: str) -> str:
    """The layer that a recipe's patterns see for a tensor."""
    return name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]


def linear(specs: Mapping[str, TensorSpec]) -> list[str]:
    return [n.removesuffix(".weight") for n, s in specs.items() if is_linear(n, s)]


def is_linear(name: str, spec: TensorSpec) -> bool:
    return name.endswith(".weight") and len(spec.shape) == 2


def told(detection: Detection) -> list[tuple[str, str | None, str]]:
    return [(m.family.name, m.variant, m.prefix) for m in detection.matches]


def expected(skeleton: str, prefix: str) -> list[tuple[str, str | None, str]]:
    variant = SHARED.get(skeleton, skeleton.removeprefix("te-"))
    return [(KNOWN[skeleton][0], variant, prefix)]


def quantized(specs: Specs, format_name: str, family: Family | None) -> Specs:
    """The specs of a file quantized to a format: all linear layers that the family does not keep,
    or all without a family, as careless tools do it."""
    plug = catalog.load("formats", format_name)
    found = dict(specs)
    for name, spec in specs.items():
        layer = layer_of(name)
        role = family.role(layer) if family else None
        if not is_linear(name, spec) or (role and role.name == "keep"):
            continue
        group = next((g for g in GROUPS if spec.shape[1] % g == 0), None)
        if plug.refuse(spec, plug.scalings[0], None if plug.rotation == "never" else group):
            continue
        stored = plug.tensors(spec, plug.scalings[0])
        found |= {f"{layer}.{local}": s for local, s in stored.items()}
        found[f"{layer}.comfy_quant"] = TensorSpec("U8", (72,))
    assert len(found) > len(specs)
    return found


def test_every_skeleton_is_known_here_and_every_family_has_one() -> None:
    files = {p.name.removesuffix(".json.gz") for p in DIRECTORY.glob("*.json.gz")}
    assert files == set(KNOWN)
    assert {row[0] for row in KNOWN.values()} == set(families.names())


@each_skeleton
def test_detect_tells_family_variant_and_prefix(skeleton: str) -> None:
    for prefix in PREFIXES:
        detection = families.detect(under(prefix, read(skeleton)))
        assert told(detection) == expected(skeleton, prefix)
        assert detection.answer == "known"


@each_skeleton
def test_detect_tells_models_quantized_to_any_format(skeleton: str) -> None:
    """Also those in which other tools packed the very layers whose shape is read."""
    for format_name in PACKED:
        for family in (families.load(KNOWN[skeleton][0]), None):
            specs = quantized(read(skeleton), format_name, family)
            assert told(families.detect(specs)) == expected(skeleton, ""), format_name


@each_skeleton
def test_detect_needs_every_tensor_of_a_signature(skeleton: str) -> None:
    specs = read(skeleton)
    family = families.load(KNOWN[skeleton][0])
    held = [s for s in family.signatures if s.holds(specs, "")]
    assert len(held) == 1
    for name in (*held[0].has, *(size.tensor for size in held[0].sizes)):
        partial = {n: s for n, s in specs.items() if n != name}
        assert told(families.detect(partial)) == []


@each_skeleton
def test_detect_never_takes_a_partial_model_for_another_family(skeleton: str) -> None:
    specs = read(skeleton)
    named = {
        name
        for other in map(families.load, families.names())
        for test in (*other.signatures, *(v.signature for v in other.variants))
        for name in (*test.has, *test.lacks, *(size.tensor for size in test.sizes))
    }
    for name in named & set(specs):
        found = families.detect({n: s for n, s in specs.items() if n != name}).matches
        assert {m.family.name for m in found} <= {KNOWN[skeleton][0]}


@each_skeleton
def test_detect_takes_no_lora_for_a_model(skeleton: str) -> None:
    """Even one that holds every norm and bias in full."""
    for down, up in (
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_down.weight", ".lora_up.weight"),
    ):
        for prefix in PREFIXES:
            lora: Specs = {}
            for name, spec in read(skeleton).items():
                if is_linear(name, spec):
                    layer = prefix + name.removesuffix(".weight")
                    lora[layer + down] = TensorSpec("BF16", (16, spec.shape[1]))
                    lora[layer + up] = TensorSpec("BF16", (spec.shape[0], 16))
                else:
                    lora[prefix + name] = spec
            assert told(families.detect(lora)) == []


def sd_vae() -> Specs:
    names = ["conv_in", "conv_out", "mid.attn_1.q", "mid.block_1.conv1", "norm_out"]
    found = {f"{side}.{n}.weight" for side in ("encoder", "decoder") for n in names}
    found |= {f"decoder.up.{i}.block.0.conv1.weight" for i in range(4)}
    return dict.fromkeys(
        sorted(found | {"quant_conv.weight", "post_quant_conv.weight"}),
        TensorSpec("F32", (512, 512, 3, 3)),
    )


def wan_vae() -> Specs:
    names = ["conv1.weight", "middle.0.residual.0.gamma", "middle.1.to_qkv.weight", "head.0.gamma"]
    found = [f"{side}.{n}" for side in ("encoder", "decoder") for n in names]
    return dict.fromkeys(found, TensorSpec("F32", (384, 384, 3, 3, 3)))


def ltx_vae() -> Specs:
    names = ["conv_in.conv.weight", "up_blocks.0.res_blocks.0.conv1.conv.weight"]
    found = ["per_channel_statistics.mean-of-means", *(f"decoder.{n}" for n in names)]
    return dict.fromkeys(found, TensorSpec("F32", (128, 128, 3, 3, 3)))


def vision_encoder() -> Specs:
    layers = [f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(32)]
    return dict.fromkeys(
        [*layers, "vision_model.post_layernorm.weight", "visual_projection.weight"],
        TensorSpec("F16", (1280, 1280)),
    )


def flux_control_net() -> Specs:
    specs = {n: s for n, s in read("flux1-dev").items() if not n.startswith(("single", "final"))}
    return specs | {"controlnet_blocks.0.weight": TensorSpec("BF16", (3072, 3072))}


def sd_control_net() -> Specs:
    specs = {n: s for n, s in read("sd15-unet").items() if not n.startswith("out")}
    return specs | {"input_hint_block.0.weight": TensorSpec("F32", (16, 3, 3, 3))}


def resized(skeleton: str, name: str, *shape: int) -> Specs:
    """A model of the same names, but of another architecture."""
    return read(skeleton) | {name: TensorSpec("BF16", shape)}


def random_names() -> Specs:
    rng = random.Random(0)
    words = ["blocks", "0", "1", "attn", "mlp", "weight", "norm", "img_in", "layers", "model"]
    names = {".".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(5000)}
    return dict.fromkeys(sorted(names), TensorSpec("BF16", (64, 64)))


STRANGERS = {
    "nothing": {},
    "random names": random_names(),
    "Stable Diffusion's VAE": sd_vae(),
    "Wan's VAE": wan_vae(),
    "LTX's VAE": ltx_vae(),
    "a vision encoder": vision_encoder(),
    "a control net of FLUX.1": flux_control_net(),
    "a control net of SD 1": sd_control_net(),
    "Stable Diffusion 2": resized(
        "sd15-unet", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 320, 1024
    ),
    "SDXL's refiner": resized("sdxl-unet", "label_emb.0.0.weight", 1536, 2560),
    "Mage-Flow": resized("qwen-image", "txt_norm.weight", 2560),
    "Z-Image Omni": resized("z-image", "siglip_embedder.0.weight", 1152),
    "HunyuanImage": resized("hunyuan-video-13b", "img_in.proj.weight", 3584, 64, 1, 1),
    "one tensor": {"double_blocks.0.img_mod.lin.weight": TensorSpec("BF16", (18432, 3072))},
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_detect_says_unknown_rather_than_guess(stranger: str) -> None:
    for prefix in PREFIXES:
        detection = families.detect(under(prefix, STRANGERS[stranger]))
        assert (told(detection), detection.answer, detection.match) == ([], "unknown", None)


def test_detect_tells_the_family_of_a_model_that_no_variant_is() -> None:
    narrow = resized("flux1-dev", "img_in.weight", 3072, 128)
    assert told(families.detect(narrow)) == [("flux1", None, "")]
    pruned = {n: s for n, s in read("sdxl-unet").items() if "transformer_blocks.9." not in n}
    assert told(families.detect(pruned)) == [("sdxl", None, "")]


def test_detect_lists_all_models_of_an_ambiguous_file() -> None:
    detection = families.detect(under("net.", read("anima-2b")) | read("wan21-t2v-1.3b"))
    assert told(detection) == [("anima", "anima-2b", "net."), ("wan", "wan21-t2v-1.3b", "")]
    assert (detection.answer, detection.match) == ("ambiguous", None)


class Counting(dict[str, TensorSpec]):
    """Specs that count how often they are asked, and cannot be walked over."""

    asked = 0

    def __contains__(self, name: object) -> bool:
        self.asked += 1
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked += 1
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("the specs were walked over")

    def items(self) -> Any:
        raise AssertionError("the specs were walked over")


def test_detect_asks_for_a_few_names_of_a_large_header() -> None:
    names = (f"blocks.{i}.attn.{j}.weight" for i in range(5000) for j in range(10))
    specs = Counting(dict.fromkeys(names, TensorSpec("BF16", (64, 64))))
    assert families.detect(specs).answer == "unknown"
    assert 0 < specs.asked < 1000


@each_skeleton
def test_roles_are_those_that_were_counted_on_the_released_model(skeleton: str) -> None:
    name, keep, modulation, optional, left = KNOWN[skeleton]
    family = families.load(name)
    layers = linear(read(skeleton))
    roles = [role.name if (role := family.role(layer)) else None for layer in layers]
    counts = tuple(roles.count(role) for role in families.ROLES)
    assert (*counts, len(layers) - counts[0]) == (keep, modulation, optional, left)


@each_family
def test_every_pattern_matches_a_layer_of_its_family(family: str) -> None:
    from cq.core import select

    found = families.load(family)
    specs = [read(s) for s, row in KNOWN.items() if row[0] == family]
    layers = {layer_of(name) or name for s in specs for name in s}
    groups = (*found.keep, *found.modulation, *found.optional)
    for pattern in (p for group in groups for p in group.patterns):
        assert any(select.matcher(pattern)(layer) for layer in layers), pattern
    for pattern in found.detection:
        assert any(select.matcher(pattern)(layer) for s in specs for layer in linear(s)), pattern


@each_family
def test_patterns_tried_at_once_match_as_each_does(family: str) -> None:
    """Roles are found with patterns joined for speed; this is what they mean."""
    from cq.core import select

    found = families.load(family)
    groups = [(role, group) for role in families.ROLES for group in getattr(found, role)]
    tests = [
        (families.Role(role, group.reason), [select.matcher(p) for p in group.patterns])
        for role, group in groups
    ]
    for skeleton in (
        "flux1-dev",
        "wan22-animate-14b",
        *(s for s in KNOWN if KNOWN[s][0] == family),
    ):
        for layer in {layer_of(name) or name for name in read(skeleton)}:
            slow = next((role for role, some in tests if any(t(layer) for t in some)), None)
            assert found.role(layer) == slow


@each_family
def test_reasons_and_notes_are_parts_of_sentences(family: str) -> None:
    found = families.load(family)
    groups = (*found.keep, *found.modulation, *found.optional)
    assert found.keep
    for text in (*found.notes, *(group.reason for group in groups)):
        assert re.fullmatch(r"[^\n]{15,125}[^\n.]", text), text
        assert text[0].islower() or re.match(r"[`A-Z][\w-]*", text), text
    assert len({group.reason for group in groups}) == len(groups), "one group for each reason"


@pytest.mark.parametrize(
    ("family", "read_layers", "others"),
    [
        ("flux1", ["img_in", "txt_in", "vector_in.in_layer"], ["final_layer.linear"]),
        ("sdxl", ["label_emb.0.0", "input_blocks.4.1.transformer_blocks.0.attn2.to_k"],
         ["input_blocks.4.1.transformer_blocks.1.attn2.to_k"]),
        ("ltx2", ["transformer_blocks.0.attn2.to_k"], ["transformer_blocks.1.attn2.to_k"]),
        ("cosmos2", ["x_embedder.proj.1"], ["blocks.0.mlp.layer1"]),
        ("t5", [], ["shared", "encoder.block.0.layer.0.SelfAttention.q"]),
    ],
)  # fmt: skip
def test_reads_shape_names_what_comfyui_measures(
    family: str, read_layers: list[str], others: list[str]
) -> None:
    found = families.load(family)
    assert [found.reads_shape(layer) for layer in read_layers] == [True] * len(read_layers)
    assert [found.reads_shape(layer) for layer in others] == [False] * len(others)


PRESETS = {
    "flux2": "flux2", "t5xxl": "t5", "zimage": "z-image", "zimage_refiner": "z-image",
    "wan": "wan", "hunyuan": "hunyuan-video", "qwen": "qwen-image", "lens": "qwen-image",
    "distillation_large": "chroma", "distillation_small": "chroma",
    "nerf_large": "chroma-radiance", "nerf_small": "chroma-radiance",
    "radiance": "chroma-radiance", "anima": "anima", "krea2": "krea2", "ideogram4": "ideogram4",
    "boogu": "boogu", "minimaxh3": "minimax-h3", "ltxv2": "ltx2", "mistral": "llm",
    "visual": "llm", "gemma4": "llm", "qwen_vlm": "llm", "qwen35": "llm", "generic_text": "llm",
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_the_old_tool_are_families(preset: str) -> None:
    assert families.load(preset).name == PRESETS[preset]
    assert preset in (*families.names(), *families.aliases())


def test_zimage_refiner_keeps_the_refiners_too() -> None:
    plain, alias = families.load("zimage"), families.load("zimage_refiner")
    refiner = "context_refiner.0.attention.qkv"
    before, after = plain.role(refiner), alias.role(refiner)
    assert before is not None
    assert after == families.Role("keep", before.reason)
    assert (plain.role("x_embedder"), plain.role("layers.0.adaLN_modulation.0")) == (
        alias.role("x_embedder"),
        alias.role("layers.0.adaLN_modulation.0"),
    )


def test_an_unknown_family_is_refused_with_near_names() -> None:
    with pytest.raises(PlanError) as caught:
        families.load("flux3")
    assert (caught.value.exit_code, caught.value.code) == (4, "plan.no_family")
    assert "`flux2`" in (caught.value.hint or "")
    with pytest.raises(PlanError, match="no family `generic`"):
        families.load("generic")


WHOLE: dict[str, Any] = {
    "version": 1,
    "title": "Tiny",
    "kind": "diffusion",
    "signature": [{"has": ["tiny.weight"], "sizes": [["tiny.weight", 0, 8]]}],
    "keep": [{"reason": "it is tiny", "patterns": ["tiny"]}],
}


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a family of this name to the catalogue, for the test."""

    def add(name: str, data: Any) -> None:
        monkeypatch.setitem(catalog._registered["models"], name, data)
        families._family.cache_clear()

    yield add
    families._family.cache_clear()


def test_a_family_is_one_file_and_nothing_else(plug: Any) -> None:
    plug("tiny", {**WHOLE, "variants": [{"name": "tiny-1"}], "aliases": {"small": {}}})
    specs = {"net.tiny.weight": TensorSpec("BF16", (8, 8))}
    assert told(families.detect(specs)) == [("tiny", "tiny-1", "net.")]
    assert families.load("small").role("tiny") == families.Role("keep", "it is tiny")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keeps": []}, "has a key `keeps`"),
        ({"keep": [{"reason": "r", "patterns": [], "pattern": "x"}]}, "has a key `pattern`"),
        ({"variants": [{"name": "a", "size": []}]}, "has a key `size`"),
        ({"signature": [{"has": ["a"], "not": ["b"]}]}, "has a key `not`"),
        ({"aliases": {"x": {"keep": []}}}, "has a key `keep`"),
        ({"aliases": {"x": {"keep_also": ["keep"]}}}, "none of"),
        ({"aliases": {"x": 1}}, "is not a table"),
        ({"version": 2}, "version"),
        ({"title": None}, "`title` in the file is missing"),
        ({"kind": "VAE"}, "its kind `VAE`"),
        ({"notes": "text"}, "`notes` in the file is not of type list"),
        ({"notes": [1]}, "`notes` in the file is not a list of texts"),
        ({"keep": ["x"]}, "is not a list of tables"),
        ({"rotation": "256"}, "`rotation`"),
        ({"rotation": 100}, "no rotation group"),
        ({"signature": []}, "a signature needs tensors"),
        ({"signature": [{"lacks": ["a"]}]}, "a signature needs tensors"),
        ({"signature": [{"has": ["a"], "sizes": [["a", 0]]}]}, "a size is"),
    ],
)
def test_a_family_that_is_not_understood_is_refused(
    plug: Any, change: dict[str, Any], words: str
) -> None:
    plug("broken", {**WHOLE, **change})
    with pytest.raises(PlanError) as caught:
        families.load("broken")
    assert caught.value.code == "plan.plug_broken"
    assert caught.value.message.startswith("the family `broken` cannot be used: ")
    assert words in caught.value.message


def test_an_alias_means_one_family(plug: Any) -> None:
    plug("tiny", {**WHOLE, "aliases": {"qwen": {}}})
    with pytest.raises(PlanError, match="its alias `qwen` names `qwen-image` already"):
        families.aliases()


def test_families_need_no_torch() -> None:
    code = (
        "import sys; from cq.core import components, families\n"
        "families.load('zimage_refiner').role('x'); components.components({})\n"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
