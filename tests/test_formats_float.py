"""`float8_e4m3fn`, `float8_e5m2`, `mxfp8` and `nvfp4` against comfy-kitchen's eager code.

The plain rule is compared bit by bit: stored tensors and values, both ways. What differs on purpose
(weights that are all zero or so small that comfy-kitchen divides by zero) has tests of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from comfy_kitchen import float_utils
from comfy_kitchen.tensor import fp8 as kitchen_fp8
from comfy_kitchen.tensor import mxfp8 as kitchen_mxfp8
from comfy_kitchen.tensor import nvfp4 as kitchen_nvfp4

import cq
import cq_quant
from cq.core import catalog, comfy
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import InputError
from cq.core.formats import Format, decode
from cq.core.formats.float8_e4m3fn import widen
from cq.core.packing import swizzle, unswizzle

FP8 = ("float8_e4m3fn", "float8_e5m2")
FORMATS = (*FP8, "mxfp8", "nvfp4")
EVERY = pytest.mark.parametrize("name", FORMATS)
SHAPES = [(16, 16), (5, 3), (130, 48), (300, 200), (256, 4096), (1, 1)]
NATIVE = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
LAYER = "blocks.0.attn"


def plug_of(name: str) -> Format:
    plug: Format = catalog.load("formats", name)
    return plug


def stored(
    name: str, weight: torch.Tensor, *, search: bool = False, cut: int | None = None
) -> dict[str, torch.Tensor]:
    """The stored tensors of a float32 weight, chosen and packed in segments of `cut` rows."""
    plug = plug_of(name)
    spec = spec_of(weight)
    grid = plug.grid(spec, plug.scalings[0])
    assert grid is not None
    segments = list(weight.split(cut or weight.shape[0]))
    shared = dict(grid.survey(segments)) if grid.surveys else {}
    rows, scales = [], []
    for segment in segments:
        own = (grid.search if search and grid.searches else grid.scales)(segment, shared)
        rows.append(plug.pack(grid.nearest(segment, {**shared, **own})))
        scales.append(own)
    promised = plug.tensors(spec, plug.scalings[0])
    packed = torch.cat(rows).view(torch.uint8)
    padding = promised["weight"].shape[0] - packed.shape[0]
    packed = torch.nn.functional.pad(packed, (0, 0, 0, padding)).view(rows[0].dtype)
    joined = {key: torch.cat([own[key] for own in scales]) for key in scales[0]}
    found = {"weight": packed, **plug.pack_scales({**shared, **joined})}
    assert promised == {own: spec_of(tensor) for own, tensor in found.items()}
    return found


def marker_of(name: str, weight: torch.Tensor) -> dict[str, Any]:
    plug = plug_of(name)
    return plug.marker(spec_of(weight), plug.scalings[0], None)


def kitchen_layout(name: str) -> tuple[Any, dict[str, Any]]:
    if name in FP8:
        return kitchen_fp8.TensorCoreFP8Layout, {"dtype": NATIVE[name]}
    if name == "mxfp8":
        return kitchen_mxfp8.TensorCoreMXFP8Layout, {}
    return kitchen_nvfp4.TensorCoreNVFP4Layout, {}


def kitchens(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """comfy-kitchen's stored tensors of a float32 weight, and its float32 values of them."""
    layout, settings = kitchen_layout(name)
    codes, params = layout.quantize(weight, **settings)
    tensors = layout.state_dict_tensors(codes, params)
    found = {f"weight{suffix}": tensor for suffix, tensor in tensors.items()}
    if name == "mxfp8":  # a dtype that ComfyUI's reader of files does not know
        found["weight_scale"] = found["weight_scale"].view(torch.uint8)
    return found, layout.dequantize(codes, params)


def kitchen_values(name: str, found: Mapping[str, torch.Tensor], shape: Any) -> torch.Tensor:
    """comfy-kitchen's float32 values of stored tensors, with their padding."""
    layout, _ = kitchen_layout(name)
    common = {"orig_dtype": torch.float32, "orig_shape": tuple(shape)}
    if name == "nvfp4":
        params = layout.Params(
            scale=found["weight_scale_2"], block_scale=found["weight_scale"], **common
        )
    else:
        scale = found["weight_scale"]
        # As ComfyUI views it: comfy-kitchen takes no bytes.
        scale = scale.view(torch.float8_e8m0fnu) if name == "mxfp8" else scale
        params = layout.Params(scale=scale, **common)
    value: torch.Tensor = layout.dequantize(found["weight"], params)
    return value


def beside(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found.items() if name != "weight"}


def specs(found: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: spec_of(tensor) for name, tensor in found.items()}


def odd_weights() -> dict[str, torch.Tensor]:
    """Weights at the ends of what float32 and the formats' scales can hold."""
    rng = make.generator("odd")
    plain = make.weight(130, 48)
    sizes = 10 ** (torch.randn(130, 48, generator=rng) * 6)
    powers = 448 * 2.0 ** torch.randint(-40, 10, (130, 48), generator=rng)
    zeros = plain.clone()
    zeros[:, :32] = -0.0
    zeros[5] = 0.0
    small = plain.clone()
    small[3] *= 1e-38
    small[:, 7] = 1e-45
    return {
        "sizes": plain * sizes.clamp(1e-25, 1e30),
        "powers": powers,
        "above powers": torch.nextafter(powers, torch.tensor(torch.inf)),
        "below powers": torch.nextafter(powers, torch.tensor(0.0)),
        "zeros": zeros,
        "huge": plain * 1e38,
        "denormal": small,
    }


ODD = odd_weights()


# The oracle -------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_rule_is_bit_equal_to_kitchen(name: str, shape: tuple[int, int], dtype: str) -> None:
    """Stored tensors and values; a half-precision source is rounded from its float32 values."""
    weight = make.weight(*shape, dtype=dtype).float()
    expected, values = kitchens(name, weight)
    found = stored(name, weight)
    assert expected.keys() == found.keys()
    for own, tensor in expected.items():
        assert make.same(tensor, found[own]), own
    actual = decode(plug_of(name), found, marker_of(name, weight))
    assert make.same(values[: shape[0], : shape[1]], actual)


# Of denormal rows comfy-kitchen makes NaN in mxfp8; see the test of small blocks.
ENDS = [(name, case) for name in FORMATS for case in ODD if (name, case) != ("mxfp8", "denormal")]


@pytest.mark.parametrize(("name", "case"), ENDS)
def test_plain_rule_is_bit_equal_to_kitchen_at_the_ends(name: str, case: str) -> None:
    weight = ODD[case]
    expected, values = kitchens(name, weight)
    found = stored(name, weight)
    for own, tensor in expected.items():
        assert make.same(tensor, found[own]), own
    actual = decode(plug_of(name), found, marker_of(name, weight))
    assert make.same(values[:130, :48], actual)


@EVERY
@pytest.mark.parametrize("search", [False, True])
def test_kitchen_reads_what_is_stored_as_we_do(name: str, search: bool) -> None:
    weight = make.weight(300, 200)
    found = stored(name, weight, search=search)
    value = plug_of(name).unpack(found["weight"], 0, beside(found), marker_of(name, weight))
    assert make.same(kitchen_values(name, found, weight.shape), value)


@EVERY
@pytest.mark.parametrize("shape", [(300, 200), (129, 33), (512, 64)])
def test_unpack_reads_kitchens_tensors_by_segments(name: str, shape: tuple[int, int]) -> None:
    expected, values = kitchens(name, make.weight(*shape))
    plug = plug_of(name)
    parts = [
        plug.unpack(rows, 128 * index, beside(expected), {"format": name})
        for index, rows in enumerate(expected["weight"].split(128))
    ]
    assert make.same(values, torch.cat(parts))


def test_nvfp4_codes_are_kitchens_for_every_kind_of_ratio() -> None:
    """All bfloat16 numbers, which hold all levels and ties, with their float32 neighbours."""
    raw = torch.arange(1 << 16, dtype=torch.int32) << 16
    numbers = raw.view(torch.float32)
    numbers = numbers[torch.isfinite(numbers)]
    beyond = torch.full_like(numbers, torch.inf)
    around = (numbers, torch.nextafter(numbers, beyond), torch.nextafter(numbers, -beyond))
    ratios = torch.cat(around)
    ratios = ratios[torch.isfinite(ratios)]
    ratios = ratios[: ratios.numel() // 16 * 16].view(-1, 16)
    grid = plug_of("nvfp4").grid(TensorSpec("F32", tuple(ratios.shape)), "block")
    assert grid is not None
    ones = torch.ones(ratios.shape[0], 1).to(torch.float8_e4m3fn)
    codes = grid.nearest(ratios, {"scale_2": torch.tensor(1.0), "block": ones})
    expected = float_utils._f32_to_floatx_unpacked(ratios.clamp(-6, 6), 2, 1)
    assert torch.equal(expected, codes)


@pytest.mark.parametrize("dtype", NATIVE.values())
def test_widen_is_torchs_conversion(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    expected = codes.float()
    finite = codes[torch.isfinite(expected)]
    assert make.same(finite.float(), widen(finite))
    assert torch.equal(expected.isnan(), widen(codes).isnan())
    assert torch.equal(expected.isinf(), widen(codes).isinf())


@EVERY
@pytest.mark.parametrize("search", [False, True])
def test_codes_do_not_depend_on_how_rows_are_cut(name: str, search: bool) -> None:
    weight = make.weight(700, 1008)
    whole = stored(name, weight, search=search)
    for cut in (128, 384):
        parts = stored(name, weight, search=search, cut=cut)
        for own, tensor in whole.items():
            assert make.same(tensor, parts[own]), own


# What comfy-kitchen cannot store ----------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("search", [False, True])
def test_zeros_are_stored_as_zeros_with_usable_scales(name: str, search: bool) -> None:
    weight = torch.zeros(20, 40)
    weight[3] = -0.0
    found = stored(name, weight, search=search)
    value = decode(plug_of(name), found, marker_of(name, weight))
    assert torch.equal(torch.zeros(20, 40), value)
    single = found["weight_scale_2" if name == "nvfp4" else "weight_scale"]
    if name != "mxfp8":
        assert 0 < float(single) < 1e-30
        assert torch.isfinite(1 / single)


@EVERY
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-37])
def test_weights_near_zero_stay_finite_and_near_zero(name: str, size: float) -> None:
    """comfy-kitchen makes NaN or the largest number of some of them."""
    weight = make.weight(20, 40).sign() * size
    value = decode(plug_of(name), stored(name, weight, search=True), marker_of(name, weight))
    assert bool((value.abs() <= 1.25 * size).all())
    assert size < 1e-37 or bool(((value - weight).abs() <= 0.2 * size).all())


def test_mxfp8_small_blocks_keep_their_values() -> None:
    """Where comfy-kitchen's exponent is 0, by which it divides, ours is 1."""
    weight = ODD["denormal"]
    found = stored("mxfp8", weight)
    exponents = unswizzle(found["weight_scale"].view(torch.uint8), 0, 130, 2)
    assert exponents[3].tolist() == [1, 1]
    value = decode(plug_of("mxfp8"), found, marker_of("mxfp8", weight))
    assert bool(((value[3] - weight[3]).abs() <= weight[3].abs() / 16 + 2.0**-136).all())


# Search -----------------------------------------------------------------------------------------


def block_errors(
    weight: torch.Tensor, scales: Mapping[str, torch.Tensor], importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The exact squared error of each block of 16 columns under the nearest codes, in float64."""
    grid = plug_of("nvfp4").grid(spec_of(weight), "block")
    assert grid is not None
    value = grid.values(grid.nearest(weight, scales), scales)
    errors = (value.double() - weight.double()).square()
    if importance is not None:
        errors *= importance.double()
    padded = torch.nn.functional.pad(errors, (0, -weight.shape[1] % 16))
    return padded.view(weight.shape[0], -1, 16).sum(-1)


def searched(
    weight: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The scales of the plain rule and of the search, shared ones included."""
    grid = plug_of("nvfp4").grid(spec_of(weight), "block")
    assert grid is not None
    shared = dict(grid.survey([weight]))
    plain = {**shared, **grid.scales(weight, shared)}
    return plain, {**shared, **grid.search(weight, shared, importance)}


def student(rows: int, columns: int) -> torch.Tensor:
    """Student's t with 4 degrees of freedom: heavy tails."""
    rng = make.generator("student")
    spread = torch.randn(rows, columns, 4, generator=rng).square().mean(-1).sqrt()
    return torch.randn(rows, columns, generator=rng) / spread


NORMAL = torch.randn(512, 512, generator=make.generator("normal"))
SEARCHED = {"normal": NORMAL, "student": student(512, 512), "padded": make.weight(130, 41), **ODD}


@pytest.mark.parametrize("case", list(SEARCHED))
@pytest.mark.parametrize("important", [False, True])
def test_search_is_never_worse_on_any_block(case: str, important: bool) -> None:
    weight = SEARCHED[case]
    importance = None
    if important:
        importance = torch.rand(weight.shape[1], generator=make.generator("importance")) ** 4
    plain, better = searched(weight, importance)
    before = block_errors(weight, plain, importance)
    after = block_errors(weight, better, importance)
    assert bool((after <= before * (1 + 1e-5)).all())


@pytest.mark.parametrize(("case", "decibels"), [("normal", 1.3), ("student", 0.8)])
def test_search_gains_and_loses_next_to_nothing_to_a_sweep(case: str, decibels: float) -> None:
    weight = SEARCHED[case]
    plain, better = searched(weight)
    before, after = block_errors(weight, plain), block_errors(weight, better)
    assert float(10 * torch.log10(before.sum() / after.sum())) > decibels
    best = before
    code = plain["block"].view(torch.uint8).int()
    for step in range(-7, 9):
        moved = (code + step).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn)
        best = torch.minimum(best, block_errors(weight, {**plain, "block": moved}))
    assert float(10 * torch.log10(after.sum() / best.sum())) < 0.01


def test_search_weighs_columns_by_importance() -> None:
    importance = torch.ones(512)
    importance[::16] = 1000.0
    _, even = searched(NORMAL)
    _, uneven = searched(NORMAL, importance)
    weighed = block_errors(NORMAL, uneven, importance).sum()
    assert float(weighed / block_errors(NORMAL, even, importance).sum()) < 0.5


def test_search_leaves_the_scale_of_the_largest_block() -> None:
    """The scale of the whole weight hangs on it when values are quantized once more."""
    plain, better = searched(NORMAL)
    largest = plain["block"].view(torch.uint8) == 126
    assert bool(largest.any())
    assert bool((better["block"].view(torch.uint8)[largest] == 126).all())


@pytest.mark.parametrize("name", [*FP8, "mxfp8"])
def test_eight_bits_do_not_search(name: str) -> None:
    weight = make.weight(64, 64)
    grid = plug_of(name).grid(spec_of(weight), plug_of(name).scalings[0])
    assert grid is not None
    assert not grid.searches
    shared = dict(grid.survey([weight])) if grid.surveys else {}
    plain, found = grid.scales(weight, shared), grid.search(weight, shared)
    assert plain.keys() == found.keys()
    assert all(make.same(scale, found[own]) for own, scale in plain.items())


# Quantizing values once more --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "search"), [(n, False) for n in FORMATS] + [("nvfp4", True)])
@pytest.mark.parametrize("shape", [(300, 200), (256, 1024)])
def test_values_quantized_once_more_are_the_same(
    name: str, search: bool, shape: tuple[int, int]
) -> None:
    """The values, and with the plain rule the codes: but for `mxfp8`, where a block whose largest
    number was rounded down to 224 times its power of two takes the next smaller power, with doubled
    codes. Searched scales can differ in the same way."""
    weight = make.weight(*shape)
    found = stored(name, weight, search=search)
    value = decode(plug_of(name), found, marker_of(name, weight)).contiguous()
    again = stored(name, value, search=search)
    assert make.same(value, decode(plug_of(name), again, marker_of(name, weight)).contiguous())
    if name != "mxfp8" and not search:
        assert all(make.same(tensor, again[own]) for own, tensor in found.items())


# Other tools' forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "slugs"),
    [
        ("nvfp4", torch.uint8, []),
        ("nvfp4", torch.float8_e4m3fn, []),
        ("mxfp8", torch.uint8, []),
        ("mxfp8", torch.float8_e8m0fnu, []),
    ],
)
def test_block_scales_are_read_in_either_dtype(
    name: str, dtype: torch.dtype, slugs: list[str]
) -> None:
    weight = make.weight(130, 48)
    found, marker = stored(name, weight), marker_of(name, weight)
    plug = plug_of(name)
    other = {**found, "weight_scale": found["weight_scale"].view(dtype)}
    flat = {**found, "weight_scale": found["weight_scale"].flatten()}
    expected = decode(plug, found, marker)
    assert make.same(expected, decode(plug, other, marker))
    assert make.same(expected, decode(plug, flat, marker))
    assert [slug for slug, _ in plug.check(specs(other), marker)] == slugs
    assert [slug for slug, _ in plug.check(specs(flat), marker)] == ["scale.shape"]


@pytest.mark.parametrize("name", [*FP8, "mxfp8"])
def test_float8_in_bytes_is_read_and_is_a_fault(name: str) -> None:
    weight = make.weight(130, 48)
    found, marker = stored(name, weight), marker_of(name, weight)
    as_bytes = {**found, "weight": found["weight"].view(torch.uint8)}
    plug = plug_of(name)
    assert make.same(decode(plug, found, marker), decode(plug, as_bytes, marker))
    assert [slug for slug, _ in plug.check(specs(as_bytes), marker)] == ["fp8.container"]


E4M3 = plug_of("float8_e4m3fn")
ROWS, BLOCKS, CUBES = (f"float8_e4m3fn_{kind}" for kind in ("rowwise", "blockwise", "block3d"))


@pytest.mark.parametrize(
    ("marker", "shape"),
    [
        ({"format": "float8_e4m3fn"}, (1,)),
        ({"format": "float8_e4m3fn"}, (256, 1)),
        ({"format": ROWS}, (256,)),
        ({"format": ROWS, "group_size": 64}, (256, 1)),
        ({"format": BLOCKS, "group_size": 64}, (4, 3)),
        ({"format": BLOCKS}, (4, 3)),
        ({"format": BLOCKS, "group_size": 32}, (8, 6)),
        ({"format": CUBES, "group_size": 64}, (256, 3, 1)),
        ({"format": CUBES}, (256, 6, 1)),
    ],
)
def test_e4m3_reads_scales_of_rows_and_blocks(
    marker: dict[str, Any], shape: tuple[int, ...]
) -> None:
    codes = make.weight(256, 192, seed="codes").mul(1000).to(torch.float8_e4m3fn)
    scale = make.weight(*shape, seed="scale").abs() + 0.01
    found = {"weight": codes, "weight_scale": scale}
    if len(shape) == 3:
        spread = scale[:, :, 0].repeat_interleave(192 // shape[1], 1)
    elif len(shape) == 2:
        spread = scale.repeat_interleave(256 // shape[0], 0).repeat_interleave(192 // shape[1], 1)
    else:
        spread = scale[:, None]
    expected = codes.float() * spread
    assert E4M3.shape(specs(found), marker) == (256, 192)
    assert make.same(expected, decode(E4M3, found, marker))
    segment = E4M3.unpack(codes[128:], 128, beside(found), marker)
    assert make.same(expected[128:], segment)


def test_e4m3_block_of_all_columns_is_no_row() -> None:
    """A scale `(N / block, 1)` of square blocks, where K is one block."""
    codes = torch.ones(256, 64).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    marker = {"format": BLOCKS, "group_size": 64}
    value = decode(E4M3, {"weight": codes, "weight_scale": scale}, marker)
    assert value[:, 0].tolist() == [1.0] * 64 + [2.0] * 64 + [3.0] * 64 + [4.0] * 64


@pytest.mark.parametrize("shape", [(255,), (192,), (128, 1), (3, 3), (4, 5), (256, 5, 1), (1, 2)])
def test_e4m3_refuses_scales_that_do_not_fit(shape: tuple[int, ...]) -> None:
    found = {"weight": TensorSpec("F8_E4M3", (256, 192)), "weight_scale": TensorSpec("F32", shape)}
    with pytest.raises(InputError, match="does not fit"):
        E4M3.shape(found, {"format": "float8_e4m3fn"})


# What ComfyUI would trip over -------------------------------------------------------------------

Changes = dict[str, TensorSpec | None]
GOOD: dict[str, dict[str, TensorSpec]] = {
    "float8_e4m3fn": {
        "weight": TensorSpec("F8_E4M3", (50, 40)),
        "weight_scale": TensorSpec("F32", ()),
    },
    "mxfp8": {
        "weight": TensorSpec("F8_E4M3", (160, 288)),
        "weight_scale": TensorSpec("U8", (256, 12)),
    },
    "nvfp4": {
        "weight": TensorSpec("U8", (144, 40)),
        "weight_scale": TensorSpec("F8_E4M3", (256, 8)),
        "weight_scale_2": TensorSpec("F32", ()),
    },
}
GOOD["float8_e5m2"] = {**GOOD["float8_e4m3fn"], "weight": TensorSpec("F8_E5M2", (50, 40))}
FAULTS: list[tuple[str, Changes, list[str]]] = [
    *((name, {}, []) for name in FORMATS),
    *((name, {"weight": None}, ["weight.missing"]) for name in FORMATS),
    *((name, {"weight_scale": None}, ["scale.missing"]) for name in FORMATS),
    ("float8_e4m3fn", {"weight_scale": TensorSpec("F32", (1,))}, []),
    ("float8_e4m3fn", {"weight_scale": TensorSpec("F32", (50, 1))}, ["scale.shape"]),
    ("float8_e4m3fn", {"weight_scale": TensorSpec("F32", (50,))}, ["scale.shape"]),
    ("float8_e4m3fn", {"weight_scale": TensorSpec("BF16", ())}, ["scale.dtype"]),
    ("float8_e4m3fn", {"weight_scale": TensorSpec("F16", (2,))}, ["scale.dtype", "scale.shape"]),
    ("float8_e4m3fn", {"weight": TensorSpec("U8", (50, 40))}, ["fp8.container"]),
    ("float8_e4m3fn", {"weight": TensorSpec("I8", (50, 40))}, ["fp8.container"]),
    ("float8_e4m3fn", {"weight": TensorSpec("F8_E5M2", (50, 40))}, ["weight.dtype"]),
    ("float8_e4m3fn", {"weight": TensorSpec("F8_E4M3", (50,))}, ["weight.shape"]),
    ("float8_e5m2", {"weight": TensorSpec("F8_E4M3", (50, 40))}, ["weight.dtype"]),
    ("mxfp8", {"weight_scale": TensorSpec("F8_E8M0", (256, 12))}, []),
    ("mxfp8", {"weight_scale": TensorSpec("F8_E4M3", (256, 12))}, ["scale.dtype"]),
    ("mxfp8", {"weight_scale": TensorSpec("F32", (256, 12))}, ["scale.dtype"]),
    ("mxfp8", {"weight_scale": TensorSpec("U8", (160, 9))}, ["scale.shape"]),
    ("mxfp8", {"weight_scale": TensorSpec("U8", (3072,))}, ["scale.shape"]),
    ("mxfp8", {"weight": TensorSpec("U8", (160, 288))}, ["fp8.container"]),
    ("mxfp8", {"weight": TensorSpec("F8_E5M2", (160, 288))}, ["weight.dtype"]),
    ("mxfp8", {"weight": TensorSpec("F8_E4M3", (150, 288))}, ["weight.shape"]),
    ("mxfp8", {"weight": TensorSpec("F8_E4M3", (160, 272))}, ["weight.shape"]),
    ("nvfp4", {"weight_scale": TensorSpec("U8", (256, 8))}, []),
    ("nvfp4", {"weight_scale": TensorSpec("F8_E8M0", (256, 8))}, ["scale.dtype"]),
    ("nvfp4", {"weight_scale": TensorSpec("F8_E4M3", (144, 5))}, ["scale.shape"]),
    ("nvfp4", {"weight_scale_2": None}, ["scale.missing"]),
    ("nvfp4", {"weight_scale_2": TensorSpec("F16", ())}, ["scale.dtype"]),
    ("nvfp4", {"weight_scale_2": TensorSpec("F32", (1,))}, ["scale.shape"]),
    ("nvfp4", {"weight": TensorSpec("F8_E4M3", (144, 40))}, ["weight.dtype"]),
    ("nvfp4", {"weight": TensorSpec("U8", (140, 40))}, ["weight.shape"]),
    ("nvfp4", {"weight": TensorSpec("U8", (144, 36))}, ["weight.shape"]),
]


@pytest.mark.parametrize(("name", "changes", "slugs"), FAULTS)
def test_check_finds_what_comfyui_would_trip_over(
    name: str, changes: Changes, slugs: list[str]
) -> None:
    found = {own: spec for own, spec in {**GOOD[name], **changes}.items() if spec is not None}
    faults = plug_of(name).check(found, {"format": name})
    assert slugs == [slug for slug, _ in faults]
    assert all(sentence for _, sentence in faults)


@EVERY
def test_check_looks_into_stacked_experts(name: str) -> None:
    stacked = {own: TensorSpec(spec.dtype, (6, *spec.shape)) for own, spec in GOOD[name].items()}
    assert plug_of(name).check(stacked, {"format": name, "num_experts": 6}) == []


@EVERY
def test_check_survives_any_shape(name: str) -> None:
    shapes = ((), (64,), (0, 0), (0, 64), (64, 0), (2, 3, 4), (0, 2, 2), (2, 3, 4, 5, 6))
    for shape in shapes:
        for scale in shapes:
            found = {
                own: TensorSpec(spec.dtype, shape if own == "weight" else scale)
                for own, spec in GOOD[name].items()
            }
            faults = plug_of(name).check(found, {"format": name, "group_size": -1})
            assert faults or name in FP8


@pytest.mark.parametrize("label", [ROWS, BLOCKS, CUBES])
def test_check_refuses_labels_that_comfyui_does_not_know(label: str) -> None:
    assert label in E4M3.aliases
    faults = E4M3.check(GOOD["float8_e4m3fn"], {"format": label})
    assert [slug for slug, _ in faults] == ["marker.format"]


# Shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "bias", "shape"),
    [
        ({"orig_shape": [140, 70]}, None, (140, 70)),
        ({"orig_shape": [140, 70]}, 144, (140, 70)),
        ({"orig_shape": [144, 80]}, None, (144, 80)),
        ({}, None, (144, 80)),
        ({}, 140, (140, 80)),
        ({}, 128, (144, 80)),
        ({}, 145, (144, 80)),
        ({"orig_shape": [128, 70]}, None, (144, 80)),
        ({"orig_shape": [140, 60]}, 130, (130, 80)),
        ({"orig_shape": [140]}, None, (144, 80)),
        ({"orig_shape": "140x70"}, None, (144, 80)),
        ({"orig_shape": [140.0, 70.0]}, None, (144, 80)),
        ({"orig_shape": [True, 70]}, None, (144, 80)),
        ({"orig_shape": [-1, 70]}, None, (144, 80)),
    ],
)
def test_padded_shape_is_told_by_the_marker_or_the_bias(
    extra: dict[str, Any], bias: int | None, shape: tuple[int, int]
) -> None:
    found = dict(GOOD["nvfp4"])
    if bias is not None:
        found["bias"] = TensorSpec("BF16", (bias,))
    assert plug_of("nvfp4").shape(found, {"format": "nvfp4", **extra}) == shape


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mxfp8", {"weight_scale": None}),
        ("mxfp8", {"weight_scale": TensorSpec("U8", (160, 9))}),
        ("mxfp8", {"weight_scale": TensorSpec("F8_E8M0", (12, 256))}),
        ("mxfp8", {"weight": TensorSpec("F8_E4M3", (160, 280))}),
        ("mxfp8", {"weight": TensorSpec("F8_E4M3", (160,))}),
        ("mxfp8", {"weight": TensorSpec("F8_E4M3", ())}),
        ("mxfp8", {"weight": TensorSpec("F8_E4M3", (160, 0))}),
        ("nvfp4", {"weight_scale": None}),
        ("nvfp4", {"weight_scale_2": None}),
        ("nvfp4", {"weight_scale_2": TensorSpec("F32", (144,))}),
        ("nvfp4", {"weight_scale": TensorSpec("F8_E4M3", (144, 5))}),
        ("nvfp4", {"weight_scale": TensorSpec("F32", (256, 8))}),
        ("nvfp4", {"weight": TensorSpec("U8", (144, 44))}),
        ("nvfp4", {"weight": TensorSpec("I32", (144, 40))}),
        ("float8_e5m2", {"weight_scale": None}),
        ("float8_e5m2", {"weight": TensorSpec("F8_E5M2", ())}),
    ],
)
def test_shape_refuses_tensors_that_do_not_fit(name: str, changes: Changes) -> None:
    found = {own: spec for own, spec in {**GOOD[name], **changes}.items() if spec is not None}
    with pytest.raises(InputError):
        plug_of(name).shape(found, {"format": name})


@pytest.mark.parametrize(
    ("name", "shape", "padded"),
    [
        ("mxfp8", (64, 96), False),
        ("mxfp8", (64, 80), True),
        ("mxfp8", (48, 64), True),
        ("nvfp4", (48, 80), False),
        ("nvfp4", (48, 81), True),
        ("nvfp4", (50, 80), True),
        ("float8_e4m3fn", (5, 3), False),
    ],
)
def test_marker_tells_the_shape_exactly_when_there_is_padding(
    name: str, shape: tuple[int, int], padded: bool
) -> None:
    expected: dict[str, Any] = {"format": name}
    if padded:
        expected["orig_shape"] = list(shape)
    assert marker_of(name, make.weight(*shape)) == expected


@EVERY
def test_format_refuses_what_it_cannot_store(name: str) -> None:
    plug = plug_of(name)
    for shape in ((), (64,), (0, 64), (64, 0), (2, 64, 64), (8, 8, 3, 3)):
        assert plug.refuse(TensorSpec("F32", shape), plug.scalings[0], None)
    weight = TensorSpec("BF16", (5, 3))
    assert plug.refuse(weight, plug.scalings[0], None) is None
    assert plug.refuse(weight, plug.scalings[0], 256)


@pytest.mark.parametrize("shape", [(70, 40), (64, 64)])
def test_swizzle_is_undone_by_segments(shape: tuple[int, int]) -> None:
    scales = make.noise("U8", shape)
    whole = swizzle(scales)
    assert torch.equal(scales, unswizzle(whole, 0, *shape))


# Files ------------------------------------------------------------------------------------------


def written(
    directory: Path, weight: torch.Tensor, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A layer's stored tensors and its marker, from a file that `cq` wrote."""
    source = make.save(directory / "in.safetensors", {f"{LAYER}.weight": weight})
    path = directory / "out.safetensors"
    cq.write(cq_quant.quantize(cq.open(source), only=[LAYER], **settings), path, force=True)
    found = {own.removeprefix(f"{LAYER}."): tensor for own, tensor in make.load(path).items()}
    return found, comfy.parse_marker(bytes(found.pop("comfy_quant").tolist()), layer=LAYER)


@EVERY
@pytest.mark.parametrize("shape", [(130, 48), (1100, 1000)])
def test_file_is_bit_equal_to_kitchen(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    weight = make.weight(*shape, dtype="BF16")
    found, marker = written(tmp_path, weight, format=name, scale_search=False)
    expected, _ = kitchens(name, weight.float())
    assert expected.keys() == found.keys()
    for own, tensor in expected.items():
        assert make.same(tensor, found[own]), own
    plug = plug_of(name)
    assert marker == marker_of(name, weight)
    assert plug.check(specs(found), marker) == []
    assert decode(plug, found, marker).shape == shape


def test_file_of_nvfp4_is_searched_by_default(tmp_path: Path) -> None:
    weight = make.weight(130, 200, dtype="BF16")
    found, _ = written(tmp_path, weight, format="nvfp4")
    expected = stored("nvfp4", weight.float(), search=True)
    assert all(make.same(tensor, found[own]) for own, tensor in expected.items())
    assert not make.same(stored("nvfp4", weight.float())["weight"], found["weight"])
