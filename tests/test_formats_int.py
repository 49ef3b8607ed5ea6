"""The formats of integer codes beside `int8_tensorwise`: W4A4, W4A8, AWQ and int8 blocks, against
comfy-kitchen's eager code, and against hand-made examples where it has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from comfy_kitchen.backends.eager import convrot_w4a4 as kitchen_w4a4
from comfy_kitchen.backends.eager import w4a8_int8 as kitchen_w4a8
from comfy_kitchen.backends.eager.awq import gemv_awq_w4a16
from comfy_kitchen.tensor.awq_w4a16 import TensorCoreAWQW4A16Layout
from comfy_kitchen.tensor.convrot_w4a4 import TensorCoreConvRotW4A4Layout
from comfy_kitchen.tensor.w4a8_int8 import AsymW4A8Int8Layout, quantize_w4a8_int8_weight

import cq
import cq_quant
from cq.core import catalog, comfy, rotation
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import InputError
from cq.core.formats import Format, _codebook, decode
from cq.core.grid import Grid
from cq.core.packing import pack_nibbles, unpack_nibbles

W4A4: Format = catalog.load("formats", "convrot_w4a4")
W4A8: Format = catalog.load("formats", "asym_w4a8_int8")
AWQ: Format = catalog.load("formats", "awq_w4a16")
BLOCKS: Format = catalog.load("formats", "int8_blockwise")
PLUGS = (W4A4, W4A8, AWQ, BLOCKS)
EACH = pytest.mark.parametrize("plug", PLUGS, ids=[plug.name for plug in PLUGS])
SEARCHING = pytest.mark.parametrize("plug", PLUGS[:3], ids=[plug.name for plug in PLUGS[:3]])
LAYER = "blocks.0.attn"
LUT = torch.tensor(kitchen_w4a8._FIXED_LUT)
REACH = {"convrot_w4a4": None, "asym_w4a8_int8": 16, "awq_w4a16": 64}


def student(rows: int, columns: int, freedom: int) -> torch.Tensor:
    """Heavy-tailed numbers: Student's t."""
    rng = make.generator("student", rows, columns, freedom)
    normal = torch.randn(1 + freedom, rows, columns, generator=rng)
    return 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()


def outliers(rows: int, columns: int) -> torch.Tensor:
    """Normal numbers, one in a thousand of them 50 times as large."""
    rng = make.generator("outliers", rows, columns)
    weight = 0.02 * torch.randn(rows, columns, generator=rng)
    return torch.where(torch.rand(rows, columns, generator=rng) < 1e-3, weight * 50, weight)


def awkward(rows: int, columns: int) -> torch.Tensor:
    """Zero rows and groups, rows of very different size, constant groups."""
    weight = make.weight(rows, columns, seed="awkward")
    weight[0] = 0
    weight[1, :64] = 0
    weight[2] *= 1e-9
    weight[3] *= 1e-12
    weight[4] *= 1e20
    weight[5, 64:128] = 0.125
    weight[6] = 0
    weight[6, 7] = -1.5
    return weight


CASES = {
    "normal": make.weight(256, 512),
    "student2": student(256, 512, 2),
    "student4": student(192, 1024, 4),
    "outliers": outliers(256, 512),
    "one row": make.weight(1, 256, seed=1),
}
EVERY = pytest.mark.parametrize("case", [*CASES, "awkward"])


def rows_of(case: str) -> torch.Tensor:
    """The rows of a case as a grid gets them: rotated, or plain if awkwardness would be lost."""
    return awkward(128, 256) if case == "awkward" else rotation.rotate(CASES[case], 256)


def grid_of(plug: Format, weight: torch.Tensor) -> Grid:
    grid = plug.grid(spec_of(weight), plug.scalings[0])
    assert grid is not None
    return grid


def stored(
    directory: Path, plug: Format, weight: torch.Tensor, *, search: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A layer's stored tensors by local name, and its marker, as `cq.write` makes them."""
    source = make.save(directory / "in.safetensors", {f"{LAYER}.weight": weight})
    path = directory / "out.safetensors"
    model = cq_quant.quantize(
        cq.open(source),
        format=plug.name,
        only=[LAYER],
        scale_search=search,
        allow_custom_loader=True,
    )
    cq.write(model, path, force=True)
    found = {name.removeprefix(LAYER + "."): value for name, value in make.load(path).items()}
    return found, comfy.parse_marker(bytes(found.pop("comfy_quant").tolist()), layer=LAYER)


def errors(plug: Format, weight: torch.Tensor, scales: Any) -> torch.Tensor:
    """The squared error of nearest codes on each reach of a scale, in float64."""
    grid = grid_of(plug, weight)
    value = grid.values(grid.nearest(weight, scales), scales)
    squares = (value.double() - weight.double()).square()
    return squares.view(-1, REACH[plug.name] or weight.shape[1]).sum(1)


def nearly_equal(expected: torch.Tensor, actual: torch.Tensor) -> None:
    """At most one code in 10 000 differs, by one step: rotations sum in another order."""
    difference = (expected.int() - actual.int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.sum()) <= max(1, expected.numel() // 10_000)


def codes_of(plug: Format, packed: torch.Tensor) -> torch.Tensor:
    codes = unpack_nibbles(packed, high_first=False)
    return ((codes.int() ^ 8) - 8) if plug is W4A4 else codes.int()


# All of them ------------------------------------------------------------------------------------


def unclipped(plug: Format, weight: torch.Tensor) -> Any:
    """The scales that clip nothing: the plain rule's, but for W4A8, whose plain rule is a fit."""
    if plug is not W4A8:
        return grid_of(plug, weight).scales(weight, {})
    return dict(zip(("s_rel", "s_channel"), _codebook.unclipped(weight), strict=True))


@SEARCHING
@EVERY
def test_search_is_never_worse_on_any_reach(plug: Format, case: str) -> None:
    weight = rows_of(case)
    grid = grid_of(plug, weight)
    before = errors(plug, weight, unclipped(plug, weight))
    after = errors(plug, weight, grid.search(weight, {}))
    assert bool((after <= before * (1 + 1e-6)).all())


@SEARCHING
@EVERY
def test_search_is_better_than_the_plain_rule(plug: Format, case: str) -> None:
    weight = rows_of(case)
    grid = grid_of(plug, weight)
    before = errors(plug, weight, grid.scales(weight, {})).sum()
    after = errors(plug, weight, grid.search(weight, {})).sum()
    assert after <= before * (1 if case in {"awkward", "one row"} else 0.97)


@SEARCHING
def test_search_minds_importance(plug: Format) -> None:
    """The error of important columns falls, and the weighted error is never worse on any reach."""
    weight = rows_of("student4")
    importance = torch.where(torch.arange(weight.shape[1]) % 4 == 0, 50.0, 0.1)
    grid = grid_of(plug, weight)
    plain = unclipped(plug, weight)
    found = {
        "plain": plain,
        "even": grid.search(weight, {}),
        "weighted": grid.search(weight, {}, importance),
    }
    weighted = {}
    for name, scales in found.items():
        value = grid.values(grid.nearest(weight, scales), scales)
        squares = (value.double() - weight.double()).square() * importance
        weighted[name] = squares.view(-1, REACH[plug.name] or weight.shape[1]).sum(1)
    assert bool((weighted["weighted"] <= weighted["plain"] * (1 + 1e-5)).all())
    assert float(weighted["weighted"].sum()) < float(weighted["even"].sum())


@SEARCHING
def test_search_with_even_importance_is_the_plain_search(plug: Format) -> None:
    weight = rows_of("normal")
    grid = grid_of(plug, weight)
    even = grid.search(weight, {})
    ones = grid.search(weight, {}, torch.ones(weight.shape[1]))
    one, other = errors(plug, weight, even).sum(), errors(plug, weight, ones).sum()
    assert torch.isclose(one, other, rtol=1e-3, atol=0)


@EACH
@EVERY
def test_scales_are_finite_and_codes_in_range(plug: Format, case: str) -> None:
    weight = rows_of(case)
    if plug is BLOCKS:
        weight = awkward(128, 256) if case == "awkward" else make.weight(256, 512)
    grid = grid_of(plug, weight)
    plain = grid.scales(weight, {})
    low, high = {"convrot_w4a4": (-7, 7), "int8_blockwise": (-127, 127)}.get(plug.name, (0, 15))
    for scales in (plain, grid.search(weight, {})):
        assert all(bool(scale.float().isfinite().all()) for scale in scales.values())
        codes = grid.nearest(weight, scales)
        assert codes.dtype == torch.int8
        assert low <= int(codes.min())
        assert int(codes.max()) <= high
        assert bool(grid.values(codes, scales).isfinite().all())


@EACH
@pytest.mark.parametrize("rows", [128, 256, 384, 129, 300])
def test_grid_does_not_depend_on_how_rows_are_cut(plug: Format, rows: int) -> None:
    rows = rows if plug is not BLOCKS else rows // 128 * 128
    weight = student(rows, 2048, 3)
    grid = grid_of(plug, weight)
    importance = make.weight(2048, seed="importance").abs()

    def fitted(part: torch.Tensor) -> Iterator[torch.Tensor]:
        plain = grid.scales(part, {})
        for scales in (plain, grid.search(part, {}), grid.search(part, {}, importance)):
            yield grid.nearest(part, scales)
            yield from (scales[name].contiguous() for name in sorted(scales))

    whole = list(fitted(weight))
    parts = zip(*(fitted(part) for part in weight.split(128)), strict=True)
    for expected, pieces in zip(whole, parts, strict=True):
        assert make.same(expected, torch.cat(pieces))


@EACH
def test_grid_takes_a_transposed_weight(plug: Format) -> None:
    """What a stage hands over need not be contiguous."""
    weight = make.weight(256, 128).T
    grid = grid_of(plug, weight)
    expected = grid.scales(weight.contiguous(), {})
    for name, scale in grid.scales(weight, {}).items():
        assert make.same(expected[name], scale)
    search = grid.search(weight.contiguous(), expected)
    for name, scale in grid.search(weight, expected).items():
        assert make.same(search[name], scale)
    assert torch.equal(grid.nearest(weight.contiguous(), search), grid.nearest(weight, search))


@EACH
def test_unpack_decodes_segments_as_the_whole(plug: Format, tmp_path: Path) -> None:
    tensors, marker = stored(tmp_path, plug, make.weight(384, 512), search=True)
    whole = decode(plug, tensors, marker)
    packed = tensors.pop("weight")
    for start, stop in ((0, 128), (128, 384), (256, 300)):
        part = plug.unpack(packed[start:stop], start, tensors, marker)
        assert make.same(whole[start:stop], part)


@EACH
def test_zeros_come_back_as_zeros(plug: Format, tmp_path: Path) -> None:
    """A zero row too, and a zero weight: in the rotated basis as in the original one."""
    weight = make.weight(128, 256)
    weight[[0, 17]] = 0
    for search in (False, True):
        value = decode(plug, *stored(tmp_path, plug, weight, search=search))
        assert value[[0, 17]].count_nonzero() == 0
        nothing = decode(plug, *stored(tmp_path, plug, torch.zeros(128, 256), search=search))
        assert torch.equal(torch.zeros(128, 256), nothing)


@pytest.mark.parametrize(
    ("plug", "shape", "group", "words"),
    [
        (W4A4, (8, 100), None, "K=100 is not a multiple of 64"),
        (W4A4, (8, 64), None, "K=64 is not a multiple of a rotation group"),
        (W4A4, (8, 64), 256, "K=64 is not a multiple of the rotation group 256"),
        (W4A4, (8, 64), 64, None),
        (W4A4, (8, 64, 64), 64, "3-D"),
        (W4A4, (0, 64), 64, "empty"),
        (W4A8, (8, 40), None, "K=40 is not a multiple of 16"),
        (W4A8, (8, 48), None, "K=48 is not a multiple of a rotation group"),
        (W4A8, (8, 48), 16, None),
        (W4A8, (8, 48), 64, "K=48 is not a multiple of the rotation group 64"),
        (AWQ, (8, 96), None, "K=96 is not a multiple of 64"),
        (AWQ, (8, 64), None, None),
        (AWQ, (8, 64), 64, "rotated"),
        (AWQ, (64,), None, "1-D"),
        (BLOCKS, (100, 256), None, "N=100 is not a multiple of 128"),
        (BLOCKS, (128, 100), None, "K=100 is not a multiple of 128"),
        (BLOCKS, (128, 128), None, None),
        (BLOCKS, (128, 256), 256, "rotated"),
    ],
)
def test_refuse_says_why(
    plug: Format, shape: tuple[int, ...], group: int | None, words: str | None
) -> None:
    reason = plug.refuse(TensorSpec("BF16", shape), plug.scalings[0], group)
    if words is None:
        assert reason is None
    else:
        assert words in (reason or "")


@EACH
def test_markers_are_comfyuis(plug: Format) -> None:
    weight = TensorSpec("BF16", (256, 512))
    group = None if plug.rotation == "never" else 256
    expected = {
        "convrot_w4a4": b'{"format": "convrot_w4a4", "convrot_groupsize": 256}',
        "asym_w4a8_int8": b'{"format": "asym_w4a8_int8", "group_size": 16,'
        b' "convrot_groupsize": 256}',
        "awq_w4a16": b'{"format": "awq_w4a16", "group_size": 64}',
        "int8_blockwise": b'{"format": "int8_blockwise", "group_size": 128}',
    }
    marker = plug.marker(weight, plug.scalings[0], group)
    assert expected[plug.name] == comfy.marker_bytes(marker)


W4A4_GOOD = {"weight": TensorSpec("I8", (8, 128)), "weight_scale": TensorSpec("F32", (8,))}
W4A8_GOOD = {
    "weight": TensorSpec("I8", (8, 128)),
    "weight_s_rel": TensorSpec("F8_E4M3", (8, 16)),
    "weight_s_channel": TensorSpec("F32", (8,)),
    "weight_codebook": TensorSpec("F32", (16,)),
}
AWQ_GOOD = {
    "weight": TensorSpec("I8", (8, 128)),
    "weight_scale": TensorSpec("BF16", (4, 8)),
    "weight_zeros": TensorSpec("BF16", (4, 8)),
}
BLOCKS_GOOD = {
    "weight": TensorSpec("I8", (256, 512)),
    "weight_scale": TensorSpec("F32", (2, 4)),
}
GOOD = dict(zip(PLUGS, (W4A4_GOOD, W4A8_GOOD, AWQ_GOOD, BLOCKS_GOOD), strict=True))
SIX_BITS = {
    "weight": TensorSpec("I8", (8, 192)),
    "weight_codebook": None,
}


@pytest.mark.parametrize(
    ("plug", "changes", "marker", "slugs"),
    [
        (W4A4, {}, {}, []),
        (W4A4, {}, {"convrot_groupsize": 64, "linear_dtype": "int8"}, []),
        (W4A4, {}, {"params": {"convrot_groupsize": 64}}, []),
        (W4A4, {"weight": None}, {}, ["weight.missing"]),
        (W4A4, {"weight": TensorSpec("U8", (8, 128))}, {}, ["weight.dtype"]),
        (W4A4, {"weight_scale": None}, {}, ["scale.missing"]),
        (W4A4, {"weight_scale": TensorSpec("F32", (8, 1))}, {}, ["scale.shape"]),
        (W4A4, {"weight_scale": TensorSpec("F32", ())}, {}, ["scale.shape"]),
        (W4A4, {"weight_scale": TensorSpec("BF16", (8,))}, {}, ["scale.dtype"]),
        (W4A4, {}, {"convrot_groupsize": 128}, ["convrot.group"]),
        (W4A4, {}, {"convrot_groupsize": 1024}, ["convrot.group"]),
        (W4A4, {}, {"convrot_groupsize": "256"}, ["convrot.group"]),
        (W4A4, {}, {"params": {"convrot_groupsize": 3}}, ["convrot.group"]),
        (W4A4, {}, {"linear_dtype": "fp8"}, ["marker.linear_dtype"]),
        (
            W4A4,
            {"weight": TensorSpec("I8", (8, 136))},
            {"convrot_groupsize": 16},
            ["weight.shape"],
        ),
        (W4A8, {}, {}, []),
        (W4A8, {}, {"params": {"group_size": 16, "convrot_groupsize": 64}}, []),
        (W4A8, {"weight_codebook": None}, {}, []),
        (W4A8, {"weight_s_rel": TensorSpec("U8", (8, 16))}, {}, []),
        (W4A8, {"weight_s_rel": TensorSpec("F32", (8, 32))}, {"group_size": 8}, []),
        (W4A8, SIX_BITS, {}, []),
        (W4A8, {"weight": None}, {}, ["weight.missing"]),
        (W4A8, {"weight": TensorSpec("U8", (8, 128))}, {}, ["weight.dtype"]),
        (W4A8, {"weight_s_rel": None}, {}, ["scale.missing"]),
        (W4A8, {"weight_s_channel": None}, {}, ["scale.missing"]),
        (W4A8, {"weight_s_rel": TensorSpec("F8_E4M3", (8, 17))}, {}, ["scale.shape"]),
        (W4A8, {"weight_s_rel": TensorSpec("F8_E4M3", (9, 16))}, {}, ["scale.shape"]),
        (W4A8, {"weight_s_rel": TensorSpec("BF16", (8, 16))}, {}, ["scale.dtype"]),
        (W4A8, {"weight_s_channel": TensorSpec("F32", (8, 1))}, {}, ["scale.shape"]),
        (W4A8, {"weight_s_channel": TensorSpec("F16", (8,))}, {}, ["scale.dtype"]),
        (W4A8, {"weight_codebook": TensorSpec("F32", (64,))}, {}, ["codebook.shape"]),
        (
            W4A8,
            {**SIX_BITS, "weight_codebook": W4A8_GOOD["weight_codebook"]},
            {},
            ["codebook.shape"],
        ),
        (W4A8, {}, {"group_size": 24}, ["group.size"]),
        (W4A8, {}, {"group_size": 2}, ["group.size"]),
        (W4A8, {}, {"group_size": None}, ["group.size"]),
        (W4A8, {}, {"convrot_groupsize": 128}, ["convrot.group"]),
        (AWQ, {}, {}, []),
        (AWQ, {}, {"group_size": 64}, []),
        (AWQ, {"weight": None}, {}, ["weight.missing"]),
        (AWQ, {"weight": TensorSpec("U8", (8, 128))}, {}, ["weight.dtype"]),
        (AWQ, {"weight_scale": None}, {}, ["scale.missing"]),
        (AWQ, {"weight_scale": None, "weight_zeros": None}, {}, ["scale.missing"] * 2),
        (AWQ, {"weight_zeros": TensorSpec("F16", (4, 8))}, {}, ["scale.dtype"]),
        (AWQ, {"weight_scale": TensorSpec("BF16", (8, 4))}, {}, ["scale.shape"]),
        (AWQ, {}, {"group_size": 128}, ["scale.shape"] * 2),
        (AWQ, {}, {"group_size": 96}, ["group.size"]),
        (AWQ, {}, {"group_size": "64"}, ["group.size"]),
        (BLOCKS, {}, {}, []),
        (BLOCKS, {"weight_scale": TensorSpec("F32", (4, 8))}, {"group_size": 64}, []),
        (BLOCKS, {"weight": None}, {}, ["weight.missing"]),
        (BLOCKS, {"weight": TensorSpec("U8", (256, 512))}, {}, ["weight.dtype"]),
        (BLOCKS, {"weight_scale": None}, {}, ["scale.missing"]),
        (BLOCKS, {"weight_scale": TensorSpec("F16", (2, 4))}, {}, ["scale.dtype"]),
        (BLOCKS, {"weight_scale": TensorSpec("F32", (4, 2))}, {}, ["scale.shape"]),
        (BLOCKS, {"weight_scale": TensorSpec("F32", (256, 4, 1))}, {}, ["scale.shape"]),
        (BLOCKS, {}, {"group_size": 96}, ["group.size"]),
        (BLOCKS, {}, {"group_size": 0}, ["group.size"]),
    ],
)
def test_check_finds_what_comfyui_would_trip_over(
    plug: Format, changes: dict[str, TensorSpec | None], marker: dict[str, Any], slugs: list[str]
) -> None:
    specs = {name: spec for name, spec in {**GOOD[plug], **changes}.items() if spec is not None}
    faults = plug.check(specs, {"format": plug.name, **marker})
    assert slugs == [slug for slug, _ in faults]
    assert all(sentence for _, sentence in faults)


@EACH
def test_check_and_shape_survive_any_shape(plug: Format) -> None:
    """`shape` may refuse what `check` finds fault with, and nothing else happens."""
    shapes = ((), (8,), (8, 128), (2, 3, 4), (0, 0), (0, 128))
    for name in GOOD[plug]:
        for shape in shapes:
            specs = {**GOOD[plug], name: TensorSpec(GOOD[plug][name].dtype, shape)}
            for marker in ({}, {"group_size": 0, "convrot_groupsize": 0, "params": 3}):
                plug.check(specs, marker)
                try:
                    assert len(plug.shape(specs, marker)) == 2
                except InputError as error:
                    assert error.message


@EACH
def test_shape_needs_what_lies_beside_the_codes(plug: Format) -> None:
    for name in GOOD[plug].keys() - {"weight", "weight_codebook"}:
        specs = {k: spec for k, spec in GOOD[plug].items() if k != name}
        with pytest.raises(InputError, match=name):
            plug.shape(specs, {})
    expected = (256, 512) if plug is BLOCKS else (8, 256)
    assert expected == plug.shape(GOOD[plug], {})


@pytest.mark.parametrize("plug", [W4A4, W4A8], ids=["w4a4", "w4a8"])
def test_shape_refuses_a_rotation_that_cannot_be_undone(plug: Format) -> None:
    with pytest.raises(InputError, match="rotation group 128"):
        plug.shape(GOOD[plug], {"convrot_groupsize": 128})


# convrot_w4a4 -----------------------------------------------------------------------------------


def test_w4a4_nibbles_by_hand() -> None:
    """The even column in the low nibble, two's complement; -8 is read though never written."""
    packed = W4A4.pack(torch.tensor([[1, -1, -7, 7]], dtype=torch.int8))
    assert packed.dtype == torch.int8
    assert packed.view(torch.uint8).tolist() == [[0xF1, 0x79]]
    rows = torch.tensor([[0xF1, 0x79] * 32, [0x88, 0x80] * 32], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([0.5, 2.0])
    value = W4A4.unpack(rows, 0, {"weight_scale": scale}, {"convrot_groupsize": 4})
    turned = rotation.rotate(value, 4)[:, :4]
    assert turned.tolist() == [[0.5, -0.5, -3.5, 3.5], [-16.0, -16.0, 0.0, -16.0]]


@EVERY
def test_w4a4_rows_are_bit_equal_to_kitchen(case: str) -> None:
    weight = rows_of(case)
    grid = grid_of(W4A4, weight)
    packed, scale = kitchen_w4a4.quantize_signed_int4_rowwise(weight)
    scales = grid.scales(weight, {})
    assert make.same(scale, scales["scale"])
    assert make.same(packed, W4A4.pack(grid.nearest(weight, scales)))


@pytest.mark.parametrize(("columns", "group"), [(768, 256), (1088, 64), (64, 64)])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_w4a4_files_are_kitchens_but_for_ties(
    columns: int, group: int, dtype: str, tmp_path: Path
) -> None:
    weight = make.weight(300, columns, dtype=dtype)
    found, marker = stored(tmp_path, W4A4, weight)
    assert marker == {"format": "convrot_w4a4", "convrot_groupsize": group}
    packed, scale = kitchen_w4a4.quantize_convrot_w4a4_weight(weight.float(), group)
    nearly_equal(codes_of(W4A4, packed), codes_of(W4A4, found["weight"]))
    assert scale.shape == found["weight_scale"].shape
    assert torch.allclose(scale, found["weight_scale"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [256, 64, 16])
def test_w4a4_values_are_bit_equal_to_kitchen(group: int) -> None:
    """Kitchen's tensors, its scale in other shapes and dtypes, and bytes of any kind."""
    weight = make.weight(200, 512)
    packed, params = TensorCoreConvRotW4A4Layout.quantize(weight, convrot_groupsize=group)
    marker = {"format": "convrot_w4a4", "convrot_groupsize": group}
    for codes in (packed, make.noise("I8", (200, 256))):
        expected = TensorCoreConvRotW4A4Layout.dequantize(codes, params)
        for scale in (params.scale, params.scale[:, None]):
            tensors = {"weight": codes, "weight_scale": scale}
            assert make.same(expected, decode(W4A4, tensors, marker))
    half = {"weight": packed, "weight_scale": params.scale.half()}
    expected = kitchen_w4a4.dequantize_convrot_w4a4_weight(packed, params.scale.half(), group)
    assert make.same(expected, decode(W4A4, half, marker))


@pytest.mark.parametrize("case", ["normal", "student2", "student4", "outliers"])
def test_w4a4_search_beats_kitchen(case: str, tmp_path: Path) -> None:
    """By 1.3 dB at least, 1.6 dB for most rotated weights (K is small here)."""
    weight = CASES[case]
    ours = decode(W4A4, *stored(tmp_path, W4A4, weight, search=True))
    packed, params = TensorCoreConvRotW4A4Layout.quantize(weight)
    theirs = TensorCoreConvRotW4A4Layout.dequantize(packed, params)
    gain = (theirs - weight).square().sum() / (ours - weight).square().sum()
    assert 10 * float(gain.log10()) > 1.3


@pytest.mark.parametrize("search", [False, True])
def test_w4a4_requantizes_to_the_same_integers(search: bool, tmp_path: Path) -> None:
    """A row's largest code is 7 under either rule, so its values tell the scale."""
    before, marker = stored(tmp_path, W4A4, make.weight(256, 512), search=search)
    again, _ = stored(tmp_path, W4A4, decode(W4A4, before, marker))
    assert make.same(before["weight"], again["weight"])
    assert torch.allclose(before["weight_scale"], again["weight_scale"], rtol=1e-5, atol=0)


def test_w4a4_search_finds_the_best_of_many_scales() -> None:
    """Within a per cent of an exhaustive sweep, row by row."""
    weight = rows_of("student4")
    grid = grid_of(W4A4, weight)
    plain = grid.scales(weight, {})
    best = errors(W4A4, weight, plain)
    for factor in torch.linspace(0.3, 1.05, 60):
        best = torch.minimum(best, errors(W4A4, weight, {"scale": plain["scale"] * factor}))
    found = errors(W4A4, weight, grid.search(weight, {}))
    assert bool((found < best * 1.01).all())


# asym_w4a8_int8 ---------------------------------------------------------------------------------


@EVERY
def test_w4a8_rows_are_bit_equal_to_kitchen(case: str) -> None:
    weight = rows_of(case)
    grid = grid_of(W4A8, weight)
    packed, relative, channel, _, codebook = kitchen_w4a8._quantize_rotated_w4a8_int8_weight(
        weight, codebook_override=LUT
    )
    scales = grid.scales(weight, {})
    assert make.same(relative, scales["s_rel"])
    assert make.same(channel, scales["s_channel"])
    assert make.same(packed, W4A8.pack(grid.nearest(weight, scales)))
    assert make.same(codebook, W4A8.pack_scales(scales)["weight_codebook"])


def test_w4a8_extremes_are_those_of_groups_of_either_sign_or_both() -> None:
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    groups = torch.cat((weight, weight.abs(), -weight.abs(), torch.zeros(2, 16), weight * 1e-44))
    highest, lowest = _codebook._extremes(groups)
    assert torch.equal(highest, groups.amax(1))
    assert torch.equal(lowest, groups.amin(1))


@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0], ids=["mixed", "gains", "losses"])
def test_w4a8_greatest_gain_is_the_first_of_equal_ones(shift: float) -> None:
    """Small whole numbers are often equal; losses have bits in another order."""
    values = torch.randint(-3, 4, (500, 8), generator=torch.Generator().manual_seed(4)) + shift
    most, place = _codebook._first_greatest(values.float())
    expected = values.max(1)
    assert torch.equal(most, expected.values.float())
    assert torch.equal(place, (values == expected.values[:, None]).int().argmax(1))


def test_w4a8_thresholds_are_kitchens_to_the_last_bit() -> None:
    """Weights on and beside the middle of two levels, where a table of bins cannot tell."""
    middles = (LUT[1:] + LUT[:-1]) / 2
    offsets = (torch.arange(-20, 21)).float() * 2.0**-26
    near = (middles[:, None] + offsets).flatten()
    weight = torch.zeros(near.numel(), 16)
    weight[:, 0] = 1.0  # the group's absmax: the others are normalized already
    weight[:, 1:] = near[:, None] * torch.linspace(1, 1 + 2.0**-20, 15)
    weight = torch.cat((weight, weight.roll(5, 0)), 1).repeat(1, 8)
    grid = grid_of(W4A8, weight)
    expected = kitchen_w4a8._quantize_rotated_w4a8_int8_weight(weight, codebook_override=LUT)
    scales = grid.scales(weight, {})
    assert make.same(expected[1], scales["s_rel"])
    assert make.same(expected[2], scales["s_channel"])
    assert make.same(expected[0], W4A8.pack(grid.nearest(weight, scales)))


@pytest.mark.parametrize(("columns", "group"), [(768, 256), (1088, 64), (48, 16)])
def test_w4a8_files_are_kitchens_but_for_ties(columns: int, group: int, tmp_path: Path) -> None:
    """Kitchen decides for the frozen codebook by itself."""
    weight = make.weight(300, columns, dtype="BF16")
    found, marker = stored(tmp_path, W4A8, weight)
    assert marker["convrot_groupsize"] == group
    packed, params = AsymW4A8Int8Layout.quantize(weight.float(), convrot_groupsize=group)
    assert make.same(params.codebook, found["weight_codebook"])
    codes, expected = codes_of(W4A8, found["weight"]), codes_of(W4A8, packed)
    different = codes != expected
    assert int((codes - expected).abs().max()) <= 1
    # A group scale that falls on the other side of a float8 tie moves all codes of its group.
    assert int(different.sum()) <= max(16, codes.numel() // 5_000)
    assert torch.allclose(params.s_channel, found["weight_s_channel"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("bits", "group", "codebook", "dtype"),
    [
        (4, 16, True, torch.float8_e4m3fn),
        (4, 16, True, torch.float32),
        (4, 8, True, torch.float8_e4m3fn),
        (4, 4, False, torch.float32),
        (4, 64, False, torch.float8_e4m3fn),
        (6, 16, False, torch.float8_e4m3fn),
        (6, 32, False, torch.float32),
    ],
)
@pytest.mark.parametrize("rotated", [256, 16])
def test_w4a8_values_are_bit_equal_to_kitchen(
    bits: int, group: int, codebook: bool, dtype: torch.dtype, rotated: int
) -> None:
    weight = make.weight(200, 512)
    packed, relative, channel, _, levels = quantize_w4a8_int8_weight(
        weight,
        group_size=group,
        convrot_groupsize=rotated,
        codebook=codebook,
        scale_dtype=dtype,
        bits=bits,
    )
    assert packed.shape == (200, 512 * bits // 8)
    expected = kitchen_w4a8.dequantize_w4a8_int8_weight(
        packed,
        relative,
        channel,
        codebook=levels,
        group_size=group,
        convrot_groupsize=rotated,
        output_dtype=torch.float32,
    )
    tensors = {"weight": packed, "weight_s_rel": relative, "weight_s_channel": channel}
    if levels is not None:
        tensors["weight_codebook"] = levels
    marker = {"format": W4A8.name, "group_size": group, "convrot_groupsize": rotated}
    assert make.same(expected, decode(W4A8, tensors, marker))
    nested = {"format": W4A8.name, "params": marker}
    assert make.same(expected, decode(W4A8, tensors, nested))
    if dtype == torch.float8_e4m3fn:
        viewed = {**tensors, "weight_s_rel": relative.view(torch.uint8)}
        assert make.same(expected, decode(W4A8, viewed, marker))


def test_w4a8_stored_values_are_kitchens(tmp_path: Path) -> None:
    tensors, marker = stored(tmp_path, W4A8, make.weight(200, 512), search=True)
    expected = kitchen_w4a8.dequantize_w4a8_int8_weight(
        tensors["weight"],
        tensors["weight_s_rel"],
        tensors["weight_s_channel"],
        codebook=tensors["weight_codebook"],
        group_size=marker["group_size"],
        convrot_groupsize=marker["convrot_groupsize"],
        output_dtype=torch.float32,
    )
    assert make.same(expected, decode(W4A8, tensors, marker))


def test_w4a8_six_bits_by_hand() -> None:
    """Codes 33, 34, 0, 63 stand for 1, 2, -32, 31: nibbles 1, 2, 0, 15, then their top bits 2, 2,
    0, 3 in one byte."""
    rows = torch.tensor([[0x21, 0xF0, 0b11_00_10_10]], dtype=torch.uint8)
    rows = torch.cat([rows[:, :2].repeat(1, 4), rows[:, 2:].repeat(1, 4)], 1).view(torch.int8)
    beside = {"weight_s_rel": torch.ones(1, 1), "weight_s_channel": torch.tensor([0.5])}
    value = W4A8.unpack(rows, 0, beside, {"convrot_groupsize": 4})
    assert rotation.rotate(value, 4).tolist() == [[0.5, 1.0, -16.0, 15.5] * 4]


@EVERY
def test_w4a8_codes_are_the_nearest(case: str) -> None:
    """No other of the 16 numbers is nearer, under any scales."""
    weight = rows_of(case)
    grid = grid_of(W4A8, weight)
    plain = grid.scales(weight, {})
    for scales in (plain, grid.search(weight, {})):
        numbers = kitchen_w4a8._grid_levels(LUT, scales["s_rel"])
        steps = (weight / scales["s_channel"][:, None]).view(*scales["s_rel"].shape, 16, 1)
        least = (steps.double() - numbers[:, :, None]).abs().amin(-1)
        codes = grid.nearest(weight, scales).long().view(*scales["s_rel"].shape, 16)
        distance = (steps[..., 0].double() - numbers.gather(2, codes)).abs()
        assert bool((distance <= least + 1e-9).all())


def test_w4a8_search_finds_the_best_neighbour() -> None:
    """Against every float8 number within three steps, evaluated in float64."""
    weight = rows_of("student4")[:32]
    grid = grid_of(W4A8, weight)
    plain = unclipped(W4A8, weight)
    raw = plain["s_rel"].view(torch.uint8).int()
    best = errors(W4A8, weight, plain)
    for step in range(-3, 5):
        moved = (raw + step).to(torch.uint8).view(torch.float8_e4m3fn)
        best = torch.minimum(best, errors(W4A8, weight, {**plain, "s_rel": moved}))
    found = errors(W4A8, weight, grid.search(weight, {}))
    assert torch.allclose(best, found, rtol=1e-3, atol=0)


@pytest.mark.parametrize("case", ["normal", "student2", "student4", "outliers"])
def test_w4a8_search_beats_kitchen(case: str, tmp_path: Path) -> None:
    weight = CASES[case]
    ours = decode(W4A8, *stored(tmp_path, W4A8, weight, search=True))
    packed, params = AsymW4A8Int8Layout.quantize(weight)
    theirs = AsymW4A8Int8Layout.dequantize(packed, params)
    gain = (theirs - weight).square().sum() / (ours - weight).square().sum()
    assert 10 * float(gain.log10()) > 0.18


@pytest.mark.parametrize("columns", [16, 64, 256])
def test_kitchen_chooses_the_frozen_codebook_for_heavy_tails(columns: int) -> None:
    """Why ours is always that one: rotated groups are not heavy-tailed."""
    for freedom in (2, 3, 4):
        weight = student(256, 512, freedom)
        assert make.same(
            LUT, AsymW4A8Int8Layout.quantize(weight, convrot_groupsize=columns)[1].codebook
        )
    weight = outliers(256, 512)
    assert make.same(
        LUT, AsymW4A8Int8Layout.quantize(weight, convrot_groupsize=columns)[1].codebook
    )


# awq_w4a16 --------------------------------------------------------------------------------------


def awq_tensors(rows: int, columns: int, group: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shape = (columns // group, rows)
    return {
        "weight": make.noise("I8", (rows, columns // 2)),
        "weight_scale": (make.weight(*shape, seed="scale").abs() + 0.01).to(dtype),
        "weight_zeros": make.weight(*shape, seed="zeros").to(dtype),
    }


def test_awq_by_hand(tmp_path: Path) -> None:
    """Numbers -8 to 7 are their own codes less 8, in steps of 1 around a zero of 0; transposed."""
    weight = torch.arange(16.0).sub(8).repeat(2, 8)
    weight[1] *= 0.5
    weight[:, 64:] += 4
    tensors, marker = stored(tmp_path, AWQ, weight.bfloat16())
    assert tensors["weight"][0, :8].view(torch.uint8).tolist() == [
        *(0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE),
    ]
    assert tensors["weight_scale"].tolist() == [[1.0, 0.5], [1.0, 0.5]]
    assert tensors["weight_zeros"].tolist() == [[0.0, 0.0], [4.0, 4.0]]
    assert torch.equal(weight, decode(AWQ, tensors, marker))


@pytest.mark.parametrize("group", [64, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_awq_values_are_bit_equal_to_kitchen(group: int, dtype: torch.dtype) -> None:
    tensors = awq_tensors(200, 512, group, dtype)
    params = TensorCoreAWQW4A16Layout.Params(
        scale=tensors["weight_scale"],
        zeros=tensors["weight_zeros"],
        orig_dtype=torch.float32,
        orig_shape=(200, 512),
        group_size=group,
    )
    expected = TensorCoreAWQW4A16Layout.dequantize(tensors["weight"], params)
    marker = {"format": "awq_w4a16", "group_size": group}
    assert make.same(expected, decode(AWQ, tensors, marker))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_awq_keeps_scales_in_the_runtimes_dtype(dtype: str, tmp_path: Path) -> None:
    """Kitchen's product returns the scales' dtype; it is near the true product."""
    weight = make.weight(128, 512, dtype=dtype)
    tensors, marker = stored(tmp_path, AWQ, weight, search=True)
    expected = torch.float16 if dtype == "F16" else torch.bfloat16
    x = make.weight(8, 512, seed="x").to(expected)
    out = gemv_awq_w4a16(
        x, tensors["weight"], tensors["weight_scale"], tensors["weight_zeros"], group_size=64
    )
    assert expected == out.dtype == tensors["weight_scale"].dtype == tensors["weight_zeros"].dtype
    ours = x.float() @ decode(AWQ, tensors, marker).T
    assert float((out.float() - ours).norm() / ours.norm()) < 0.02
    true = x.float() @ weight.float().T
    assert float((ours - true).norm() / true.norm()) < 0.15


@EVERY
def test_awq_codes_are_the_nearest(case: str) -> None:
    weight = rows_of(case)
    grid = grid_of(AWQ, weight)
    plain = grid.scales(weight, {})
    for scales in (plain, grid.search(weight, {})):
        scale, zero = (scales[name].double()[..., None, None] for name in ("scale", "zero"))
        levels = (torch.arange(16) - 8) * scale + zero
        groups = weight.double().view(*scales["scale"].shape, 64, 1)
        least = (groups - levels).abs().amin(-1)
        codes = grid.nearest(weight, scales).long().view(*scales["scale"].shape, 64, 1)
        distance = (groups - levels.expand(*groups.shape[:3], 16).gather(-1, codes)).abs()[..., 0]
        slack = 1e-5 * (scale + zero.abs())[..., 0]
        assert bool((distance <= least + slack).all())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_awq_keeps_constant_groups(dtype: str, tmp_path: Path) -> None:
    weight = make.weight(128, 256, dtype=dtype)
    weight[:, 64:128] = 0.0123
    weight[3] = -7.5
    for search in (False, True):
        value = decode(AWQ, *stored(tmp_path, AWQ, weight, search=search))
        assert torch.equal(weight[:, 64:128].float(), value[:, 64:128])
        assert torch.equal(weight[3].float(), value[3])


def test_awq_requantizes_to_the_same_integers(tmp_path: Path) -> None:
    """Under the plain rule, where both ends of the range are levels. A search clips, and then a
    group need not reach both ends."""
    before, marker = stored(tmp_path, AWQ, make.weight(256, 512))
    again, _ = stored(tmp_path, AWQ, decode(AWQ, before, marker))
    nearly_equal(codes_of(AWQ, before["weight"]), codes_of(AWQ, again["weight"]))


@pytest.mark.parametrize("case", ["normal", "student4"])
def test_awq_search_gains(case: str) -> None:
    weight = CASES[case]
    grid = grid_of(AWQ, weight)
    plain = grid.scales(weight, {})
    gain = errors(AWQ, weight, plain).sum() / errors(AWQ, weight, grid.search(weight, {})).sum()
    assert 10 * float(gain.log10()) > 0.7


# int8_blockwise ---------------------------------------------------------------------------------


def test_blocks_by_hand(tmp_path: Path) -> None:
    """Each block's scale is its largest magnitude / 127, ties go to even, -128 is not used."""
    weight = torch.zeros(256, 256)
    weight[0, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0])
    weight[127, 128] = -254.0
    weight[255, 255] = 12.7
    tensors, marker = stored(tmp_path, BLOCKS, weight)
    assert tensors["weight_scale"].tolist() == [
        [1.0, 2.0],
        [pytest.approx(1e-30), pytest.approx(0.1)],
    ]
    assert tensors["weight"][0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]
    assert tensors["weight"][127, 128:130].tolist() == [-127, 0]
    assert marker["group_size"] == 128
    expected = weight.clone()
    expected[0, :8] = torch.tensor([127.0, 0, 2, 2, 0, -2, -2, -127])
    assert torch.allclose(expected, decode(BLOCKS, tensors, marker))


def test_blocks_are_within_half_a_step(tmp_path: Path) -> None:
    weight = make.weight(384, 256)
    tensors, marker = stored(tmp_path, BLOCKS, weight)
    step = tensors["weight_scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    error = (decode(BLOCKS, tensors, marker) - weight).abs()
    assert bool((error <= step * 0.5001).all())
    blocks = weight.view(3, 128, 2, 128).abs().amax((1, 3))
    assert make.same(blocks / 127, tensors["weight_scale"])


def test_blocks_in_many_segments_are_those_of_the_whole(tmp_path: Path) -> None:
    weight = make.weight(2560, 1024)
    tensors, _ = stored(tmp_path, BLOCKS, weight)
    grid = grid_of(BLOCKS, weight)
    scales = grid.scales(weight, {})
    assert make.same(scales["scale"], tensors["weight_scale"])
    assert make.same(grid.nearest(weight, scales), tensors["weight"])


def test_blocks_requantize_to_the_same_integers(tmp_path: Path) -> None:
    before, marker = stored(tmp_path, BLOCKS, make.weight(256, 512))
    again, _ = stored(tmp_path, BLOCKS, decode(BLOCKS, before, marker))
    assert make.same(before["weight"], again["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_of_other_tools_are_read(dtype: torch.dtype) -> None:
    """Blocks of another side, and the scales of a row's blocks."""
    codes = make.noise("I8", (256, 256))
    square = (make.weight(4, 4).abs() + 0.01).to(dtype)
    value = decode(BLOCKS, {"weight": codes, "weight_scale": square}, {"group_size": 64})
    expected = codes.float().view(4, 64, 4, 64) * square.float()[:, None, :, None]
    assert make.same(expected.view(256, 256), value)
    strips = (make.weight(256, 2, 1).abs() + 0.01).to(dtype)
    value = decode(BLOCKS, {"weight": codes, "weight_scale": strips}, {})
    expected = (codes.float().view(256, 2, 128) * strips.float()).view(256, 256)
    assert make.same(expected, value)


# Nibbles ----------------------------------------------------------------------------------------


def test_codes_of_files_lie_low_nibble_first() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.int8)
    for plug in (W4A8, AWQ):
        packed = plug.pack(codes)
        assert packed.dtype == torch.int8
        assert packed.view(torch.uint8).tolist() == [[0x21, 0x0F]]
    assert pack_nibbles(codes, high_first=True).tolist() == [[0x12, 0xF0]]
