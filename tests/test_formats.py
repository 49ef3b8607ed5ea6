"""Formats and optimizers, every pair of the catalogue: what was promised is what comes out.

New plugs are tested the day their file lands. What ComfyUI's own arithmetic makes of the stored
tensors is the oracle in `test_quant.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cq
import cq_quant
from cq.core import catalog, comfy, rotation
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import PlanError
from cq.core.formats import Format
from cq.core.formats.int8_tensorwise import Int8Tensorwise, convrot_group

MATRIX = [
    (format_name, optimizer, scaling)
    for format_name, optimizer in itertools.product(
        catalog.names("formats"), catalog.names("optimizers")
    )
    for scaling in catalog.load("formats", format_name).scalings
]
EVERY = pytest.mark.parametrize(("format_name", "optimizer", "scaling"), MATRIX)
LAYER = "blocks.0.attn"
SIDES = st.one_of(
    st.integers(1, 40),
    st.sampled_from([48, 64, 80, 96, 127, 128, 192, 256, 257, 320, 512]),
)


def plan(
    directory: Path, weight: torch.Tensor, format_name: str, optimizer: str, scaling: str
) -> cq.Checkpoint:
    source = make.save(directory / "in.safetensors", {f"{LAYER}.weight": weight})
    return cq_quant.quantize(
        cq.open(source), format=format_name, optimizer=optimizer, scaling=scaling, only=[LAYER]
    )


def stored_layer(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A layer's stored tensors by local name, and its marker, as a reader finds them."""
    found = {name.removeprefix(LAYER + "."): value for name, value in make.load(path).items()}
    marker = comfy.parse_marker(bytes(found.pop("comfy_quant").tolist()), layer=LAYER)
    return found, marker


@EVERY
@settings(max_examples=25)
@given(rows=SIDES, columns=SIDES, dtype=st.sampled_from(make.FLOAT_DTYPES))
def test_format_keeps_its_promise(
    format_name: str,
    optimizer: str,
    scaling: str,
    rows: int,
    columns: int,
    dtype: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A shape is refused with a reason, or exactly the promised tensors lie in the file."""
    directory = tmp_path_factory.mktemp("promise")
    plug: Format = catalog.load("formats", format_name)
    weight = make.weight(rows, columns, dtype=dtype)
    try:
        model = plan(directory, weight, format_name, optimizer, scaling)
    except PlanError as error:
        assert error.code == "plan.nothing"
        assert plug.refuse(spec_of(weight), scaling, None)
        return
    path = directory / "out.safetensors"
    cq.write(model, path)
    stored, marker = stored_layer(path)
    expected = plug.tensors(spec_of(weight), scaling)
    assert expected == {name: spec_of(value) for name, value in stored.items()}
    assert marker["format"] == plug.name
    assert plug.check(expected, marker) == []
    value = plug.unpack(stored, marker)
    assert (value.dtype, value.shape) == (torch.float32, weight.shape)
    assert torch.isfinite(value).all()


@EVERY
def test_format_is_near_the_weight(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    """Twenty per cent is no measure of quality: a lost scale, rotation or order is far beyond."""
    weight = make.weight(192, 512)
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, weight, format_name, optimizer, scaling), path)
    value = catalog.load("formats", format_name).unpack(*stored_layer(path))
    assert float((value - weight).norm() / weight.norm()) < 0.2


@EVERY
def test_format_stores_an_all_zero_layer_as_zeros(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, torch.zeros(64, 256), format_name, optimizer, scaling), path)
    value = catalog.load("formats", format_name).unpack(*stored_layer(path))
    assert torch.equal(torch.zeros(64, 256), value)


@EVERY
def test_format_stores_zero_rows_as_zeros(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    weight = make.weight(64, 256)
    weight[[0, 17, 63]] = 0
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, weight, format_name, optimizer, scaling), path)
    value = catalog.load("formats", format_name).unpack(*stored_layer(path))
    assert value[[0, 17, 63]].count_nonzero() == 0
    assert torch.isfinite(value).all()


@EVERY
def test_format_refuses_an_empty_weight(format_name: str, optimizer: str, scaling: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    for shape in ((0, 64), (64, 0), (0, 0), (), (64,), (2, 64, 64)):
        assert plug.refuse(TensorSpec("F32", shape), scaling, None)


@pytest.mark.parametrize("format_name", catalog.names("formats"))
def test_format_says_what_a_user_must_know(format_name: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    assert format_name == plug.name
    assert plug.scalings
    assert set(plug.scalings) <= {"tensor", "row", "block"}
    assert plug.first_comfyui.count(".") == 2
    for scaling in plug.scalings:
        assert scaling == plug.grid(scaling).scaling


@pytest.mark.parametrize("format_name", catalog.names("formats"))
def test_grid_rounds_its_own_levels_to_themselves(format_name: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    for scaling in plug.scalings:
        grid = plug.grid(scaling)
        weight = make.weight(32, 256)
        scales = grid.scales(grid.absmax(weight))
        codes = grid.nearest(weight, scales)
        again = grid.nearest(grid.values(codes, scales), scales)
        assert make.same(codes, again)


@pytest.mark.parametrize("format_name", catalog.names("formats"))
def test_grid_combines_segments_by_maximum(format_name: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    grid, weight = plug.grid("tensor" if "tensor" in plug.scalings else plug.scalings[0]), None
    if grid.scaling != "tensor":
        pytest.skip("no scale of this format reaches beyond a row")
    weight = make.weight(64, 64)
    parts = torch.stack([grid.absmax(weight[:20]), grid.absmax(weight[20:])]).amax(0)
    assert make.same(grid.absmax(weight), parts)


@pytest.mark.parametrize("optimizer", catalog.names("optimizers"))
def test_optimizer_says_what_a_user_must_know(optimizer: str) -> None:
    plug = catalog.load("optimizers", optimizer)
    assert optimizer == plug.name
    assert isinstance(plug.rotates, bool)
    assert plug.note is None or plug.note


# int8_tensorwise --------------------------------------------------------------------------------

INT8: Int8Tensorwise = catalog.load("formats", "int8_tensorwise")


def test_int8_marker_has_the_bytes_of_the_official_files() -> None:
    raw = comfy.marker_bytes(INT8.marker(256))
    assert raw == b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    assert len(raw) == 72
    assert comfy.marker_bytes(INT8.marker(None)) == b'{"format": "int8_tensorwise"}'


def test_int8_scale_has_the_shape_that_broadcasts() -> None:
    weight = TensorSpec("BF16", (5, 7))
    assert INT8.tensors(weight, "row")["weight_scale"] == TensorSpec("F32", (5, 1))
    assert INT8.tensors(weight, "tensor")["weight_scale"] == TensorSpec("F32", ())


@given(st.integers(1, 20), st.integers(1, 60), st.sampled_from(INT8.scalings), st.integers(0, 99))
def test_int8_is_within_half_a_step(rows: int, columns: int, scaling: str, seed: int) -> None:
    """Nearest rounding, no clipping, and -128 never used."""
    weight = make.weight(rows, columns, seed=seed)
    grid = INT8.grid(scaling)
    scales = grid.scales(grid.absmax(weight))
    codes = grid.nearest(weight, scales)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= -127
    error = (grid.values(codes, scales) - weight).abs()
    assert bool((error <= scales * 0.5001).all())
    assert int(codes.abs().max()) == 127


def test_int8_rounds_ties_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes = INT8.grid("row").nearest(weight, torch.tensor([[1.0]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


GOOD = {"weight": TensorSpec("I8", (64, 256)), "weight_scale": TensorSpec("F32", (64, 1))}


@pytest.mark.parametrize(
    ("changes", "marker", "slugs"),
    [
        ({}, {}, []),
        ({"weight_scale": TensorSpec("F32", ())}, {}, []),
        ({}, {"convrot": True}, []),
        ({}, {"convrot": True, "convrot_groupsize": 64}, []),
        ({}, {"params": {"convrot": True, "convrot_groupsize": 16}}, []),
        ({}, {"convrot": False, "convrot_groupsize": 7}, []),
        ({"weight": None}, {}, ["weight.missing"]),
        ({"weight": TensorSpec("U8", (64, 256))}, {}, ["weight.dtype"]),
        ({"weight_scale": None}, {}, ["scale.missing"]),
        ({"weight_scale": TensorSpec("BF16", (64, 1))}, {}, ["scale.dtype"]),
        ({"weight_scale": TensorSpec("F32", (64,))}, {}, ["scale.shape"]),
        ({"weight_scale": TensorSpec("F32", (1, 64))}, {}, ["scale.shape"]),
        ({"weight_scale": TensorSpec("F16", (64,))}, {}, ["scale.dtype", "scale.shape"]),
        ({}, {"convrot": True, "convrot_groupsize": 128}, ["convrot.group"]),
        ({}, {"convrot": True, "convrot_groupsize": 1024}, ["convrot.group"]),
        ({}, {"convrot": True, "convrot_groupsize": "256"}, ["convrot.group"]),
        ({}, {"convrot": True, "convrot_groupsize": 0}, ["convrot.group"]),
        ({}, {"convrot": True, "convrot_groupsize": -4}, ["convrot.group"]),
        ({}, {"params": {"convrot": True, "convrot_groupsize": 2}}, ["convrot.group"]),
    ],
)
def test_int8_check_finds_what_comfyui_would_trip_over(
    changes: dict[str, TensorSpec | None], marker: dict[str, Any], slugs: list[str]
) -> None:
    stored = {name: spec for name, spec in {**GOOD, **changes}.items() if spec is not None}
    faults = INT8.check(stored, {"format": "int8_tensorwise", **marker})
    assert slugs == [slug for slug, _ in faults]
    assert all(sentence for _, sentence in faults)


def test_int8_check_survives_any_shape() -> None:
    for shape in ((), (64,), (2, 3, 4), (0, 0)):
        stored = {"weight": TensorSpec("I8", shape), "weight_scale": TensorSpec("F32", shape)}
        for marker in ({}, {"convrot": True}):
            INT8.check(stored, marker)


def test_convrot_group_reads_markers_as_comfyui_does() -> None:
    assert convrot_group({}) is None
    assert convrot_group({"convrot": True}) == 256
    assert convrot_group({"convrot": True, "convrot_groupsize": 64}) == 64
    assert convrot_group({"params": {"convrot": True}}) == 256
    assert convrot_group({"params": None, "convrot": False}) is None


def test_int8_unpacks_segments_as_it_unpacks_the_whole() -> None:
    stored = {
        "weight": torch.randint(-127, 128, (40, 256), generator=make.generator(1)).to(torch.int8),
        "weight_scale": make.weight(40, 1, seed=2).abs() + 1e-4,
    }
    marker = INT8.marker(256)
    whole = INT8.unpack(stored, marker)
    part = INT8.unpack({name: value[8:24] for name, value in stored.items()}, marker)
    assert torch.equal(whole[8:24], part)


# Rotation ---------------------------------------------------------------------------------------

SIZES = (4, 16, 64, 256)


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_is_symmetric_and_an_involution(size: int) -> None:
    h = rotation.hadamard(size)
    assert torch.equal(h, h.T)
    assert torch.equal(torch.eye(size), h @ h)
    assert torch.equal(torch.ones(size), h.sum(1))
    assert {size**-0.5} == set(h.abs().unique().tolist())


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_is_not_the_sylvester_matrix(size: int) -> None:
    sylvester = torch.ones(1, 1)
    while sylvester.shape[0] < size:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    assert not torch.equal(sylvester / size**0.5, rotation.hadamard(size))


@pytest.mark.parametrize("size", [-4, 0, 1, 2, 3, 8, 12, 32, 128, 255, 512])
def test_hadamard_refuses_what_is_no_power_of_4(size: int) -> None:
    assert not rotation.is_group(size)
    with pytest.raises(PlanError, match="power of 4"):
        rotation.hadamard(size)


@given(st.integers(1, 20_000), st.sampled_from([256, 64, 16]))
def test_group_for_is_the_largest_that_divides(features: int, largest: int) -> None:
    group = rotation.group_for(features, largest)
    fits = [g for g in (256, 64, 16) if g <= largest and features % g == 0]
    assert (fits[0] if fits else None) == group


@pytest.mark.parametrize("group", rotation.GROUPS)
def test_rotate_is_the_product_with_the_full_matrix(group: int) -> None:
    weight = make.weight(70, 3 * 256)
    full = torch.block_diag(*[rotation.hadamard(group).double()] * (weight.shape[1] // group))
    expected = weight.double() @ full
    actual = rotation.rotate(weight, group).double()
    assert float((expected - actual).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("group", rotation.GROUPS)
def test_unrotate_undoes_rotate(group: int) -> None:
    weight = make.weight(70, 512)
    before = weight.clone()
    again = rotation.unrotate(rotation.rotate(weight, group), group)
    assert torch.equal(before, weight)
    assert torch.allclose(weight, again, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group", rotation.GROUPS)
def test_rotate_does_not_depend_on_how_rows_are_cut(group: int) -> None:
    weight = make.weight(1500, 512)
    whole = rotation.rotate(weight, group)
    parts = [rotation.rotate(weight[i : i + 128], group) for i in range(0, 1500, 128)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("group", rotation.GROUPS)
def test_rotation_takes_a_transposed_weight(group: int) -> None:
    """What a stage hands over need not be contiguous."""
    weight = make.weight(512, 64)
    expected = rotation.rotate(weight.T.contiguous(), group)
    assert torch.allclose(expected, rotation.rotate(weight.T, group), rtol=0, atol=1e-6)
    assert torch.allclose(weight.T, rotation.unrotate(expected, group), rtol=0, atol=1e-6)
    turned = expected.T.contiguous().T
    assert torch.allclose(weight.T, rotation.unrotate(turned, group), rtol=0, atol=1e-6)
