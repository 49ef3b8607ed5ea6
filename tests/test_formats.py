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
from cq.core.errors import InputError, PlanError
from cq.core.formats import Format, decode
from cq.core.formats.int8_tensorwise import Int8Tensorwise, convrot_group

FORMATS = tuple(n for n in catalog.names("formats") if not catalog.load("formats", n).casts)
CASTS = tuple(n for n in catalog.names("formats") if catalog.load("formats", n).casts)
MATRIX = [
    (format_name, optimizer, scaling)
    for format_name, optimizer in itertools.product(FORMATS, catalog.names("optimizers"))
    for scaling in catalog.load("formats", format_name).scalings
    if catalog.load("formats", format_name).rotation != "never"
    or not catalog.load("optimizers", optimizer).rotates
]
EVERY = pytest.mark.parametrize(("format_name", "optimizer", "scaling"), MATRIX)
EACH = pytest.mark.parametrize("format_name", FORMATS)
LAYER = "blocks.0.attn"
SIDES = st.one_of(
    st.integers(1, 40),
    st.sampled_from([48, 64, 80, 96, 127, 128, 192, 256, 257, 320, 512]),
)
EXPERTS = "blocks.0.mlp.experts"


def plan(
    directory: Path,
    weight: torch.Tensor,
    format_name: str,
    optimizer: str,
    scaling: str,
    layer: str = LAYER,
    **settings: Any,
) -> cq.Checkpoint:
    source = make.save(directory / "in.safetensors", {f"{layer}.weight": weight})
    return cq_quant.quantize(
        cq.open(source),
        format=format_name,
        optimizer=optimizer,
        scaling=scaling,
        only=[layer],
        allow_custom_loader=True,
        **settings,
    )


def stored_layer(path: Path, layer: str = LAYER) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A layer's stored tensors by local name, and its marker, as a reader finds them."""
    found = {name.removeprefix(layer + "."): value for name, value in make.load(path).items()}
    marker = comfy.parse_marker(bytes(found.pop("comfy_quant").tolist()), layer=layer)
    return found, marker


def decoded(path: Path, layer: str = LAYER) -> torch.Tensor:
    stored, marker = stored_layer(path, layer)
    return decode(catalog.load("formats", marker["format"]), stored, marker)


@EVERY
@settings(max_examples=15)
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
    """A shape is refused with a reason, or exactly the promised tensors lie in the file, from which
    the weight's own shape comes back."""
    directory = tmp_path_factory.mktemp("promise")
    plug: Format = catalog.load("formats", format_name)
    weight = make.weight(rows, columns, dtype=dtype)
    try:
        model = plan(directory, weight, format_name, optimizer, scaling)
    except PlanError as error:
        assert error.code == "plan.nothing"
        assert "the format refuses it" in str(error)
        return
    path = directory / "out.safetensors"
    cq.write(model, path)
    stored, marker = stored_layer(path)
    expected = plug.tensors(spec_of(weight), scaling)
    assert expected == {name: spec_of(value) for name, value in stored.items()}
    assert marker["format"] == plug.name
    assert plug.check(expected, marker) == []
    assert plug.shape(expected, marker) == weight.shape
    if plug.keeps_shape:
        assert expected["weight"].shape == weight.shape
    value = decoded(path)
    assert (value.dtype, value.shape) == (torch.float32, weight.shape)
    assert torch.isfinite(value).all()


@EVERY
def test_format_is_near_the_weight(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    """Twenty per cent is no measure of quality: a lost scale, rotation or order is far beyond."""
    weight = make.weight(256, 512)
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, weight, format_name, optimizer, scaling), path)
    assert float((decoded(path) - weight).norm() / weight.norm()) < 0.2


@EVERY
def test_format_decodes_segments_as_it_decodes_the_whole(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    weight = make.weight(384, 512)
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, weight, format_name, optimizer, scaling), path)
    plug: Format = catalog.load("formats", format_name)
    stored, marker = stored_layer(path)
    rows = stored.pop("weight")
    whole = plug.unpack(rows, 0, stored, marker)
    for start, stop in ((0, 128), (128, 384), (256, 300)):
        assert make.same(whole[start:stop], plug.unpack(rows[start:stop], start, stored, marker))


@EVERY
def test_format_stores_the_same_however_the_source_is_cut(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    """A weight of several segments, and the same rows alone where no scale reaches beyond them."""
    weight = make.weight(1536, 1024)
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, weight, format_name, optimizer, scaling), path)
    assert len(list(cq.open(tmp_path / "in.safetensors").pieces(f"{LAYER}.weight"))) > 1
    plug: Format = catalog.load("formats", format_name)
    grid = plug.grid(spec_of(weight), scaling)
    if grid is None or grid.surveys or optimizer == "learned":  # whose loss the whole weight sets
        return
    stored, _ = stored_layer(path)
    cq.write(plan(tmp_path, weight[:128], format_name, optimizer, scaling), path, force=True)
    part, _ = stored_layer(path)
    assert make.same(stored["weight"][:128].contiguous(), part["weight"])


@EVERY
def test_search_is_never_worse_than_the_plain_rule(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    errors = {}
    weight = make.weight(256, 1024, seed="search")
    for search in (False, True):
        path = tmp_path / f"{search}.safetensors"
        found = plan(tmp_path, weight, format_name, optimizer, scaling, scale_search=search)
        cq.write(found, path)
        errors[search] = float((decoded(path) - weight).double().square().sum())
    grid = catalog.load("formats", format_name).grid(spec_of(weight), scaling)
    if grid is not None and grid.searches:
        assert errors[True] < errors[False]
    else:
        assert errors[True] == errors[False]


@EVERY
def test_format_stores_zeros_as_zeros(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, torch.zeros(128, 256), format_name, optimizer, scaling), path)
    assert torch.equal(torch.zeros(128, 256), decoded(path))
    weight = make.weight(128, 256)
    weight[[0, 17, 63]] = 0
    cq.write(plan(tmp_path, weight, format_name, optimizer, scaling), path, force=True)
    value = decoded(path)
    assert value[[0, 17, 63]].count_nonzero() == 0
    assert torch.isfinite(value).all()


@EVERY
def test_format_stacks_experts_as_it_stores_each_alone(
    format_name: str, optimizer: str, scaling: str, tmp_path: Path
) -> None:
    """Every stored tensor gets a leading dimension, and each expert its own scales; rotated only
    where the format always is, since ComfyUI drops the flag of int8."""
    plug: Format = catalog.load("formats", format_name)
    weight = torch.stack([make.weight(128, 256, seed=i) * (i + 1) for i in range(3)])
    if not plug.experts:
        with pytest.raises(PlanError, match="no layer to quantize") as caught:
            plan(tmp_path, weight, format_name, optimizer, scaling, EXPERTS)
        assert "stacked experts" in (caught.value.hint or "")
        return
    path = tmp_path / "out.safetensors"
    cq.write(plan(tmp_path, weight, format_name, optimizer, scaling, EXPERTS), path)
    stored, marker = stored_layer(path, EXPERTS)
    assert marker["num_experts"] == 3
    assert "convrot" not in marker
    plain = "rtn" if optimizer == "quip" and plug.rotation == "optional" else optimizer
    for i in range(3):
        alone = tmp_path / f"{i}.safetensors"
        cq.write(plan(tmp_path, weight[i], format_name, plain, scaling), alone)
        expected, _ = stored_layer(alone)
        assert set(expected) == set(stored)
        for name, tensor in expected.items():
            assert make.same(tensor, stored[name][i])
    assert make.same(decoded(alone), decoded(path, EXPERTS)[2])


@EACH
def test_format_refuses_what_is_no_matrix(format_name: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    for scaling in plug.scalings:
        for shape in ((0, 64), (64, 0), (0, 0), (), (64,), (2, 64, 64)):
            assert plug.refuse(TensorSpec("F32", shape), scaling, None)


@EACH
def test_format_says_what_a_user_must_know(format_name: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    assert format_name == plug.name
    assert plug.scalings
    assert set(plug.scalings) <= {"tensor", "row", "block"}
    assert (plug.first_comfyui is None) == (plug.loader is not None)
    if plug.first_comfyui is not None:
        assert plug.first_comfyui.count(".") == 2
    weight = TensorSpec("BF16", (256, 512))
    for scaling in plug.scalings:
        grid = plug.grid(weight, scaling)
        assert grid is not None
        assert scaling == grid.scaling
        assert grid.nbytes_work > 0


@EACH
def test_format_without_a_released_loader_is_asked_for(format_name: str, tmp_path: Path) -> None:
    plug: Format = catalog.load("formats", format_name)
    source = make.save(tmp_path / "in.safetensors", {f"{LAYER}.weight": make.weight(256, 256)})
    if plug.first_comfyui is not None:
        cq_quant.quantize(cq.open(source), format=format_name)
        return
    with pytest.raises(PlanError, match="no released ComfyUI loads") as caught:
        cq_quant.quantize(cq.open(source), format=format_name)
    assert "--allow-custom-loader" in (caught.value.hint or "")


@EACH
def test_format_stands_on_detection_layers_only_if_it_keeps_shapes(
    format_name: str, tmp_path: Path
) -> None:
    """ComfyUI reads the shape of `img_in` to tell the model, before anything is decoded."""
    plug: Format = catalog.load("formats", format_name)
    source = make.save(tmp_path / "in.safetensors", {"img_in.weight": make.weight(256, 256)})

    def quantize() -> cq.Checkpoint:
        return cq_quant.quantize(
            cq.open(source), format=format_name, only=["img_in"], allow_custom_loader=True
        )

    if plug.keeps_shape:
        assert quantize().specs["img_in.weight"].shape == (256, 256)
        return
    with pytest.raises(PlanError, match="no layer to quantize") as caught:
        quantize()
    assert "shape" in (caught.value.hint or "")


@EACH
def test_format_takes_embedding_tables_only_if_comfyui_does(
    format_name: str, tmp_path: Path
) -> None:
    plug: Format = catalog.load("formats", format_name)
    name = "model.embed_tokens"
    source = make.save(tmp_path / "in.safetensors", {f"{name}.weight": make.weight(256, 256)})
    try:
        cq_quant.quantize(
            cq.open(source), format=format_name, only=[name], allow_custom_loader=True
        )
    except PlanError as error:
        assert not plug.embeddings
        assert "embedding" in (error.hint or "")
    else:
        assert plug.embeddings


@EACH
def test_check_survives_any_shape(format_name: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    own = plug.tensors(TensorSpec("F32", (256, 256)), plug.scalings[0])
    for shape in ((), (64,), (2, 3, 4), (0, 0), (1, 2, 3, 4, 5)):
        stored = {name: TensorSpec(spec.dtype, shape) for name, spec in own.items()}
        for name in own:
            missing = {k: v for k, v in stored.items() if k != name}
            assert plug.check(missing, {"format": format_name})
        plug.check(stored, {"format": format_name, "params": 7, "group_size": "x"})


@EVERY
def test_grid_rounds_its_own_levels_to_themselves(
    format_name: str, optimizer: str, scaling: str
) -> None:
    plug: Format = catalog.load("formats", format_name)
    weight = make.weight(128, 256)
    grid = plug.grid(spec_of(weight), scaling)
    assert grid is not None
    shared = grid.survey([weight]) if grid.surveys else {}
    scales = {**shared, **grid.scales(weight, shared)}
    codes = grid.nearest(weight, scales)
    values = grid.values(codes, scales)
    again = grid.nearest(values, scales)
    assert torch.equal(values, grid.values(again, scales))


@EACH
def test_grid_surveys_segments_as_it_surveys_the_whole(format_name: str) -> None:
    plug: Format = catalog.load("formats", format_name)
    weight = make.weight(384, 256)
    for scaling in plug.scalings:
        grid = plug.grid(spec_of(weight), scaling)
        if grid is None or not grid.surveys:
            continue
        whole = grid.survey([weight])
        parts = grid.survey([weight[:128], weight[128:]])
        assert set(whole) == set(parts)
        assert all(make.same(whole[key], parts[key]) for key in whole)


# Plain dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", CASTS)
@pytest.mark.parametrize("dtype", make.FLOAT_DTYPES)
def test_cast_is_torchs_own(format_name: str, dtype: str, tmp_path: Path) -> None:
    """Every float tensor, of any shape, and no marker; integers stay."""
    plug: Format = catalog.load("formats", format_name)
    tensors = {
        **make.model(dtype=dtype),
        "conv.weight": make.weight(4, 3, 2, 2, dtype=dtype),
        "count": torch.tensor([1, 2, 3]),
    }
    source = make.save(tmp_path / "in.safetensors", tensors)
    model = cq_quant.quantize(cq.open(source), format=format_name)
    cq.write(model, tmp_path / "out.safetensors")
    found = make.load(tmp_path / "out.safetensors")
    assert set(tensors) == set(found)
    for name, tensor in tensors.items():
        expected = plug.store(tensor)["weight"] if tensor.is_floating_point() else tensor
        assert make.same(expected, found[name])


def test_a_cast_to_the_same_dtype_copies_unread(tmp_path: Path) -> None:
    source = make.save(tmp_path / "in.safetensors", make.model(dtype="BF16"))
    model = cq_quant.quantize(cq.open(source), format="bf16")
    assert all(part.extent is not None for part in model.parts)


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.tensor([[1.0, 70000.0]])}
    source = make.save(tmp_path / "in.safetensors", tensors)
    with pytest.raises(InputError, match=r"`a\.weight` .* overflows fp16") as caught:
        cq.write(cq_quant.quantize(cq.open(source), format="fp16"), tmp_path / "out.safetensors")
    assert "--skip a" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.glob("out*")] in ([], ["out.safetensors.partial"])


@pytest.mark.parametrize("optimizer", catalog.names("optimizers"))
def test_optimizer_says_what_a_user_must_know(optimizer: str) -> None:
    plug = catalog.load("optimizers", optimizer)
    assert optimizer == plug.name
    assert isinstance(plug.rotates, bool)
    assert plug.note is None or plug.note


# int8_tensorwise --------------------------------------------------------------------------------

INT8: Int8Tensorwise = catalog.load("formats", "int8_tensorwise")


def test_int8_marker_has_the_bytes_of_the_official_files() -> None:
    raw = comfy.marker_bytes(INT8.marker(TensorSpec("BF16", (256, 256)), "row", 256))
    assert raw == b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    assert len(raw) == 72
    assert (
        comfy.marker_bytes(INT8.marker(TensorSpec("BF16", (256, 256)), "row", None))
        == b'{"format": "int8_tensorwise"}'
    )


def test_int8_scale_has_the_shape_that_broadcasts() -> None:
    weight = TensorSpec("BF16", (5, 7))
    assert INT8.tensors(weight, "row")["weight_scale"] == TensorSpec("F32", (5, 1))
    assert INT8.tensors(weight, "tensor")["weight_scale"] == TensorSpec("F32", ())


@given(st.integers(1, 20), st.integers(1, 60), st.sampled_from(INT8.scalings), st.integers(0, 99))
def test_int8_is_within_half_a_step(rows: int, columns: int, scaling: str, seed: int) -> None:
    """Nearest rounding, no clipping, and -128 never used."""
    weight = make.weight(rows, columns, seed=seed)
    grid = INT8.grid(spec_of(weight), scaling)
    shared = grid.survey([weight]) if grid.surveys else {}
    scales = {**shared, **grid.scales(weight, shared)}
    codes = grid.nearest(weight, scales)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= -127
    error = (grid.values(codes, scales) - weight).abs()
    assert bool((error <= scales["scale"] * 0.5001).all())
    assert int(codes.abs().max()) == 127


def test_int8_rounds_ties_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes = INT8.grid(spec_of(weight), "row").nearest(weight, {"scale": torch.tensor([[1.0]])})
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
