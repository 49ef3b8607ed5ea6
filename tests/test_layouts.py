"""The run time: quantized tensors compute what their format says, with comfy-kitchen and without.

Tests over the catalogue take every format that is not a plain dtype, the day its file lands. The
oracles are `formats.decode`, float products, and comfy-kitchen's eager code.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_kitchen.tensor
import make
import pytest
import torch
import torch.nn.functional as functional
from comfy_kitchen.backends.eager import quantization as eager

import cq
import cq_quant
from cq.core import catalog, comfy, rotation
from cq.core.errors import CqError, InputError, PlanError, UsageError
from cq.core.formats import decode
from cq.layouts import (
    QuantizedLayout,
    QuantizedTensor,
    kitchen,
    layout_named,
    load,
    mixed_precision_ops,
    register_layout_op,
    registry,
    use_kitchen,
)
from cq.layouts.operations import int8_linear, int8_product
from cq.layouts.plugin import load_plugin
from tests.processes import BASE, quick
from tests.processes import cq as run_cq

aten = torch.ops.aten
FORMATS = tuple(n for n in catalog.names("formats") if not catalog.load("formats", n).casts)
EVERY = pytest.mark.parametrize("name", FORMATS)
INT8 = "int8_tensorwise"


class MyCustomLayout(QuantizedLayout):
    """Custom quantization layout for specific use case."""

    @classmethod
    def quantize(cls, tensor, scale=None, dtype=torch.int8, **kwargs):  # type: ignore[no-untyped-def]
        if scale is None:
            scale = tensor.abs().max() / 127
        qdata = (tensor / scale).round().clamp(-128, 127).to(dtype)
        layout_params = {
            "scale": scale,
            "orig_dtype": tensor.dtype,
        }
        return qdata, layout_params

    @staticmethod
    def dequantize(qdata, scale, orig_dtype, **kwargs):  # type: ignore[no-untyped-def, override]
        return qdata.to(orig_dtype) * scale


seen: list[tuple[Any, ...]] = []


@register_layout_op(torch.ops.aten.linear.default, "MyCustomLayout")
def my_custom_linear(func, args, kwargs):  # type: ignore[no-untyped-def]
    input_tensor, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    seen.append((func, type(weight)))
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    return torch.nn.functional.linear(input_tensor, weight, bias)


@pytest.fixture(autouse=True)
def without_kitchen() -> Iterator[None]:
    """Plain PyTorch, unless a test asks for comfy-kitchen; nothing that a test registers stays."""
    layouts, handlers = dict(registry._layouts), {k: dict(v) for k, v in registry._handlers.items()}
    formats = dict(catalog._registered["formats"])
    use_kitchen(False)
    seen.clear()
    yield
    use_kitchen(True)
    for table, before in (
        (registry._layouts, layouts),
        (registry._handlers, handlers),
        (catalog._registered["formats"], formats),
    ):
        table.clear()
        table.update(before)  # type: ignore[arg-type]


@pytest.fixture
def with_kitchen() -> None:
    use_kitchen(True)


def quantized(name: str, *shape: int, dtype: str = "F32", **options: Any) -> QuantizedTensor:
    weight = make.weight(*(shape or (128, 256)), dtype=dtype, seed=name)
    return QuantizedTensor.from_float(weight, name, **options)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=make.generator("x", shape)).to(dtype)


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file; safetensors' own reader knows no F8_E8M0."""
    file = cq.open(path)
    return file.read_many(file.specs)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


# The seed's example -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_linear_of_a_custom_layout_reaches_its_function_in_every_mode(mode: Any) -> None:
    weight, x, bias = make.weight(8, 16), activations(3, 16), make.weight(8)
    held = QuantizedTensor.from_float(weight, "MyCustomLayout")
    with mode():
        found = functional.linear(x, held, bias=bias)
        functional.linear(input=x, weight=held)
        aten.linear.default(x, held)
    assert [(aten.linear.default, QuantizedTensor)] * 3 == seen
    assert torch.equal(functional.linear(x, held.dequantize(), bias), found)


def test_tensor_has_what_the_seed_names() -> None:
    weight = make.weight(8, 16, dtype="BF16")
    held = QuantizedTensor.from_float(weight, "MyCustomLayout")
    assert (held._layout_type, held._qdata.dtype) == ("MyCustomLayout", torch.int8)
    assert held._layout_params["orig_dtype"] == held.dtype == torch.bfloat16
    assert isinstance(held, torch.Tensor)
    assert held.shape == weight.shape
    expected = held._qdata.to(torch.bfloat16) * held._layout_params["scale"]
    assert make.same(expected, held.dequantize())
    assert "MyCustomLayout" in repr(held)


def test_subclass_of_a_layout_inherits_its_functions() -> None:
    class Finer(MyCustomLayout):
        pass

    functional.linear(activations(3, 16), QuantizedTensor.from_float(make.weight(8, 16), Finer))
    assert len(seen) == 1


def test_layout_may_run_any_operation() -> None:
    @register_layout_op(aten.mm.default, MyCustomLayout)
    def product(func: Any, args: Any, kwargs: Any) -> Any:
        seen.append((func,))
        return func(*(a.dequantize() if isinstance(a, QuantizedTensor) else a for a in args))

    held = quantized("MyCustomLayout", 16, 8)
    x = activations(3, 16)
    assert torch.equal(x @ held.dequantize(), x @ held)
    assert [(aten.mm.default,)] == seen


# What keeps a tensor quantized ------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*FORMATS, "MyCustomLayout"])
def test_moving_and_copying_keep_a_tensor_quantized(name: str, mode: Any) -> None:
    with mode():
        _move(quantized(name))


def _move(held: QuantizedTensor) -> None:
    wanted = held.dequantize()
    buffer = io.BytesIO()
    torch.save({"held": held}, buffer)
    buffer.seek(0)
    for found in (
        held.detach(),
        held.clone(),
        held.to("cpu", copy=True),
        held.contiguous(),
        copy.copy(held),
        copy.deepcopy(held),
        torch.load(buffer)["held"],
        torch.empty_like(held).copy_(held),
        held.half().float(),
        held.to("cpu"),
        held.to(torch.float16).to(torch.ones(1)),
        held.to("cpu", torch.float32),
        held.type_as(torch.ones(1)),
    ):
        assert isinstance(found, QuantizedTensor)
        assert (found.shape, found.dtype) == (held.shape, held.dtype)
        assert make.same(wanted, found.dequantize())


@pytest.mark.parametrize("name", [*FORMATS, "MyCustomLayout"])
def test_parameter_survives_what_modules_do(name: str) -> None:
    module = torch.nn.Linear(256, 128)
    module.weight = torch.nn.Parameter(quantized(name), requires_grad=False)
    codes = module.weight._qdata
    other = copy.deepcopy(module.to(torch.bfloat16).eval())
    for one in (module, other):
        assert isinstance(one.weight, QuantizedTensor)
        assert isinstance(one.weight, torch.nn.Parameter)
        assert one.weight.dtype == one.bias.dtype == torch.bfloat16
        assert make.same(codes, one.weight._qdata)
        assert one(activations(4, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert other.weight._qdata.data_ptr() != module.weight._qdata.data_ptr()
    assert module.weight.requires_grad is False


@EVERY
def test_other_operations_compute_with_floats(name: str) -> None:
    held = quantized(name)
    wanted = held.dequantize()
    assert torch.equal(wanted + 1, held + 1)
    assert torch.equal(wanted.sum(), held.sum())
    assert torch.equal(torch.cat([wanted, wanted]), torch.cat([held, wanted]))
    assert torch.equal(wanted[3:5], held[3:5])
    assert type(held.t()) is torch.Tensor
    assert torch.zeros_like(wanted).copy_(held).equal(wanted)


def test_writing_into_a_quantized_tensor_is_refused_rather_than_lost() -> None:
    held = quantized("MyCustomLayout")
    before = held.dequantize()
    for write in (
        lambda: held.mul_(2),
        lambda: held.copy_(before),
        lambda: torch.add(before, 1, out=held),
        lambda: setattr(held, "data", before),
    ):
        with pytest.raises(UsageError):
            write()
    assert torch.equal(before, held.dequantize())


def test_data_takes_another_quantized_tensor() -> None:
    parameter = torch.nn.Parameter(quantized("MyCustomLayout"))
    parameter.data = QuantizedTensor.from_float(make.weight(128, 256, seed=9), "MyCustomLayout")
    wanted = QuantizedTensor.from_float(make.weight(128, 256, seed=9), "MyCustomLayout")
    assert torch.equal(wanted.dequantize(), parameter.dequantize())


# Names ------------------------------------------------------------------------------------------


def test_unknown_layout_is_refused_with_near_names() -> None:
    for ask in (
        lambda: QuantizedTensor.from_float(make.weight(4, 4), "MyCustomLayou"),
        lambda: register_layout_op(aten.linear.default, "MyCustomLayou"),
        lambda: layout_named("MyCustomLayou"),
    ):
        with pytest.raises(PlanError, match="no layout `MyCustomLayou`") as caught:
            ask()
        assert caught.value.hint == "did you mean `MyCustomLayout`?"
    with pytest.raises(PlanError) as caught:
        layout_named("nothing of the kind")
    assert "import the module that defines it" in str(caught.value.hint)


def test_plain_dtype_is_no_layout() -> None:
    with pytest.raises(PlanError, match="plain dtype"):
        layout_named("bf16")


def test_name_can_be_taken_once() -> None:
    with pytest.raises(PlanError, match="already"):
        type("MyCustomLayout", (QuantizedLayout,), {"__module__": "elsewhere"})
    with pytest.raises(PlanError, match="storage format of cq"):
        type(INT8, (QuantizedLayout,), {})
    assert layout_named("MyCustomLayout") is MyCustomLayout


def test_class_can_be_defined_again_as_notebooks_do() -> None:
    def define() -> type[QuantizedLayout]:
        class Again(QuantizedLayout):
            pass

        return Again

    define()
    assert define() is layout_named("Again")


def test_operation_can_be_registered_once() -> None:
    with pytest.raises(PlanError, match=r"has a function for `aten.linear.default` already"):
        register_layout_op(aten.linear.default, "MyCustomLayout")(lambda f, a, k: None)
    register_layout_op(aten.linear.default, "MyCustomLayout")(my_custom_linear)  # the same again


# Formats as layouts -----------------------------------------------------------------------------


@EVERY
def test_format_dequantizes_as_it_decodes(name: str) -> None:
    plug = catalog.load("formats", name)
    for scaling in plug.scalings:
        for shape in ((128, 256), (200, 512)):
            weight = make.weight(*shape, seed=name)
            try:
                held = QuantizedTensor.from_float(weight, name, scaling=scaling)
            except PlanError:
                assert plug.refuse(make.TensorSpec("F32", shape), scaling, None) is not None
                continue
            stored, marker = held.stored()
            assert marker["format"] == name
            wanted = decode(plug, stored, marker)[: shape[0], : shape[1]]
            assert make.same(wanted, held.dequantize())
            assert error(held.dequantize(), weight) < 0.2


@EVERY
def test_format_stores_what_the_quantizer_stores(name: str, tmp_path: Path) -> None:
    """`from_float` is `cq quant --optimizer rtn` at run time: equal integers and scales."""
    weight = make.weight(256, 512, seed=name)
    held = QuantizedTensor.from_float(weight, name)
    source = make.save(tmp_path / "in.safetensors", {"blocks.0.attn.weight": weight})
    plan = cq_quant.quantize(
        cq.open(source),
        format=name,
        optimizer="rtn",
        only=["blocks.0.attn"],
        allow_custom_loader=True,
    )
    cq.write(plan, tmp_path / "out.safetensors")
    file = read(tmp_path / "out.safetensors")
    stored, marker = held.stored()
    written = json.loads(bytes(file.pop("blocks.0.attn.comfy_quant").tolist()))
    assert marker == written
    assert {f"blocks.0.attn.{n}" for n in stored} == set(file)
    for local, tensor in stored.items():
        assert make.same(tensor, file[f"blocks.0.attn.{local}"])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_computes_with_the_float_weight(name: str, dtype: torch.dtype) -> None:
    """Exactly so, but for int8, whose activations are rounded as well."""
    held = quantized(name).to(dtype)
    bias = make.weight(128).to(dtype)
    for x in (activations(5, 256), activations(2, 3, 256), activations(256), activations(0, 256)):
        x = x.to(dtype)
        wanted = functional.linear(x, held.dequantize(), bias)
        found = functional.linear(x, held, bias)
        assert (found.dtype, found.shape) == (dtype, wanted.shape)
        if name != INT8:
            assert torch.equal(wanted, found)
        elif x.numel():
            assert 0 < error(found, wanted) < 0.02


def test_layout_takes_no_unknown_option_and_nothing_it_cannot_hold() -> None:
    weight = make.weight(64, 64)
    for words, tensor, options in (
        ("has no option `scalling`", weight, {"scalling": "row"}),
        ("has no scaling `block`", weight, {"scaling": "block"}),
        ("power of 4", weight, {"group": 8}),
        ("multiple of the rotation group", weight, {"group": 256}),
        ("not floating point", torch.ones(4, 4, dtype=torch.int8), {}),
        ("3-D", make.weight(2, 8, 8), {}),
        ("not finite", weight.clone().fill_(float("nan")), {}),
    ):
        with pytest.raises(PlanError, match=words):
            QuantizedTensor.from_float(tensor, INT8, **options)
    with pytest.raises(PlanError, match="never rotated"):
        QuantizedTensor.from_float(weight, "float8_e4m3fn", group=16)


@EVERY
def test_marker_can_ask_for_a_float_product(name: str, with_kitchen: None) -> None:
    held = quantized(name)
    held._layout_params["marker"]["full_precision_matrix_mult"] = True
    x = activations(5, 256)
    assert torch.equal(functional.linear(x, held.dequantize()), functional.linear(x, held))


# int8 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("group", [None, 16, 64, 256])
def test_int8_linear_is_bit_equal_to_kitchen(
    dtype: torch.dtype, scaling: str, group: int | None
) -> None:
    held = quantized(INT8, 96, 512, scaling=scaling, group=group)
    bias = make.weight(96).to(dtype)
    for rows in (1, 7, 300):
        x = activations(2, rows, 512).to(dtype)
        x[0, 0] = 0  # a row whose scale is the smallest there is
        wanted = eager.int8_linear(
            x,
            held._qdata,
            held._layout_params["weight_scale"],
            bias,
            dtype,
            convrot=group is not None,
            convrot_groupsize=group or 256,
        )
        assert make.same(wanted, int8_linear(x, held, bias))
        assert make.same(wanted, functional.linear(x, held, bias))


@pytest.mark.parametrize("columns", [1, 7, 1024, 5000])
def test_int8_product_is_exact(columns: int) -> None:
    from cq.layouts.operations import _summed_in_floats

    left, right = (make.noise("I8", (rows, columns), seed=rows) for rows in (9, 21))
    extreme = torch.full((2, columns), -128, dtype=torch.int8)
    left, right = torch.cat([left, extreme]), torch.cat([right, extreme])
    wanted = left.long() @ right.long().t()
    assert torch.equal(wanted, int8_product(left, right).long())
    assert torch.equal(wanted, _summed_in_floats(left, right).long())


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("name", [INT8, "float8_e4m3fn"])
def test_gradients_are_those_of_the_float_weight(name: str, on: bool) -> None:
    use_kitchen(on)
    held, bias = quantized(name), make.weight(128).requires_grad_()
    x = activations(5, 256).requires_grad_()
    found = functional.linear(x, held, bias)
    with torch.no_grad():
        again = functional.linear(x, held, bias)
    assert torch.allclose(again, found, rtol=1e-6, atol=1e-6), "the bias may be fused or added"
    found.sum().backward()
    ones = torch.ones(5, 128)
    assert torch.allclose(ones @ held.dequantize(), x.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.full((128,), 5.0), bias.grad)


# comfy-kitchen ----------------------------------------------------------------------------------

TWINS = tuple(name for name in FORMATS if name in kitchen._TWINS)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("shape", [(128, 256), (200, 512), (40, 1280)])
def test_kitchen_reads_the_same_numbers(
    name: str, shape: tuple[int, int], with_kitchen: None
) -> None:
    """The table from our tensors to comfy-kitchen's parameters is right, padding included."""
    held = quantized(name, *shape)
    twin = kitchen.twin(held)
    assert (twin.shape, twin.dtype) == (held.shape, held.dtype)
    assert torch.equal(twin.dequantize(), held.dequantize())


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kitchen_runs_the_product(name: str, dtype: torch.dtype, with_kitchen: None) -> None:
    held = quantized(name).to(dtype)
    x, bias = activations(2, 8, 256).to(dtype), make.weight(128).to(dtype)
    assert kitchen.runs(x, held)
    with torch.inference_mode():
        wanted = functional.linear(x, kitchen.twin(held), bias)
        assert make.same(wanted, functional.linear(x, held, bias))
    found = functional.linear(x, held, bias)
    assert make.same(wanted, found), "the same outside of inference mode"
    # 4-bit activations are coarse, and comfy-kitchen has no others on a CPU.
    assert error(found, functional.linear(x, held.dequantize(), bias)) < 0.3


def test_kitchen_rounds_activations_where_its_layout_does(with_kitchen: None) -> None:
    """The kernels do run: a product with the float weight would be another."""
    for name in (INT8, "convrot_w4a4"):
        held, x = quantized(name), activations(8, 256)
        assert not torch.equal(functional.linear(x, held.dequantize()), functional.linear(x, held))


def test_scale_of_one_dimension_reaches_kitchen_as_a_column(with_kitchen: None) -> None:
    held = quantized(INT8, 64, 64)
    flat = {**held._layout_params, "weight_scale": held._layout_params["weight_scale"].flatten()}
    other = QuantizedTensor(held._qdata, INT8, flat)
    assert torch.equal(held.dequantize(), kitchen.twin(other).dequantize())


def test_dtypes_without_kernels_stay_with_pytorch(with_kitchen: None) -> None:
    held = quantized("float8_e4m3fn").to(torch.float64)
    x = activations(3, 256).double()
    assert torch.equal(functional.linear(x, held.dequantize()), functional.linear(x, held))


def test_custom_layout_is_one_of_kitchens(with_kitchen: None) -> None:
    weight, x = make.weight(8, 16), activations(3, 16)
    theirs = comfy_kitchen.tensor.QuantizedTensor.from_float(weight, "MyCustomLayout")
    ours = QuantizedTensor.from_float(weight, "MyCustomLayout")
    assert torch.equal(ours.dequantize(), theirs.dequantize())
    with torch.inference_mode():
        found = functional.linear(x, theirs)
    assert torch.equal(functional.linear(x, ours.dequantize()), found)
    assert [(aten.linear.default, QuantizedTensor)] == seen, "our function ran, on our tensor"
    assert theirs.to(torch.bfloat16).dequantize().dtype == torch.bfloat16
    assert set(theirs.state_dict("weight")) == {"weight", "weight_scale"}
    again = theirs.requantize_from_float(weight * 2)
    assert torch.equal(2 * theirs.dequantize(), again.dequantize())


def test_layout_defined_while_kitchen_is_off_is_offered_when_it_is_on() -> None:
    class Later(MyCustomLayout):
        pass

    use_kitchen(True)
    held = comfy_kitchen.tensor.QuantizedTensor.from_float(make.weight(8, 16), "Later")
    with torch.inference_mode():
        functional.linear(activations(3, 16), held)
    assert len(seen) == 1


WITHOUT_KITCHEN = """
import sys
sys.modules["comfy_kitchen"] = None  # what `import` raises ImportError for
import torch, tests.make as make
from cq.layouts import QuantizedTensor, kitchen
import tests.seed_layout
assert kitchen.tensors() is None
held = QuantizedTensor.from_float(make.weight(64, 64), "int8_tensorwise")
held = torch.nn.functional.linear(torch.ones(3, 64), held)
custom = QuantizedTensor.from_float(make.weight(64, 64), "SeedLayout")
print(tuple(held.shape), tuple((custom + 1).shape))
"""


def test_everything_works_where_kitchen_is_not_installed(tmp_path: Path) -> None:
    code = WITHOUT_KITCHEN.replace("import tests.seed_layout\n", PLUGIN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.stdout, done.stderr) == ("(3, 64) (64, 64)\n", "")


def test_environment_keeps_kitchen_out() -> None:
    code = (
        "import sys; from cq.layouts import QuantizedTensor, kitchen; import torch\n"
        "torch.nn.functional.linear(torch.ones(2, 64),"
        " QuantizedTensor.from_float(torch.ones(64, 64), 'int8_tensorwise'))\n"
        "print('comfy_kitchen' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CQ_KITCHEN": "0"},
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


# A layout as a storage format -------------------------------------------------------------------

PLUGIN = '''
import torch
from cq.layouts import QuantizedLayout

class SeedLayout(QuantizedLayout):
    """Rows of int8 with an offset: two tensors beside the codes, and a number that is not."""

    @classmethod
    def quantize(cls, tensor, levels=255, **kwargs):
        low, high = tensor.amin(1, keepdim=True), tensor.amax(1, keepdim=True)
        scale = (high - low).clamp(min=1e-8) / levels
        codes = ((tensor - low) / scale).round().to(torch.uint8)
        return codes, {"scale": scale, "low": low, "levels": levels, "orig_dtype": tensor.dtype}

    @staticmethod
    def dequantize(qdata, scale, low, levels, orig_dtype):
        assert levels == 255
        return (qdata.float() * scale + low).to(orig_dtype)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "seed_layout.py"
    path.write_text(PLUGIN)
    yield path
    sys.modules.pop("seed_layout", None)


def test_custom_layout_is_stored_and_read_back(plugin: Path, tmp_path: Path) -> None:
    """The whole way with real processes: quantize, see it in the file, verify, load and run."""
    source = make.save(tmp_path / "in.safetensors", make.model(dtype="F32"))
    out = tmp_path / "out.safetensors"
    asked = ("quant", source, "--plugin", plugin, "--format", "SeedLayout", "-o", out)
    refused = run_cq(*asked)
    assert refused.code == 4
    assert "seed_layout" in refused.err
    done = run_cq(*asked, "--allow-custom-loader")
    assert done.code == 0, done.err
    file = read(out)
    layer = "blocks.0.attn.qkv"
    marker = comfy.parse_marker(bytes(file[f"{layer}.comfy_quant"].tolist()), layer=layer)
    assert marker == {"format": "SeedLayout", "params": {"levels": 255}}
    assert file[f"{layer}.weight"].dtype == torch.uint8
    assert file[f"{layer}.weight_low"].shape == (192, 1)

    load_plugin(str(plugin))
    original = make.model(dtype="F32")
    module = Model()
    assert sorted(make.quantized_names()) == sorted(load(module, out).quantized)
    held = module.blocks[0].attn.qkv.weight
    assert isinstance(held, QuantizedTensor)
    wanted = QuantizedTensor.from_float(original[f"{layer}.weight"], "SeedLayout")
    assert torch.equal(wanted.dequantize(), held.dequantize())
    assert error(held.dequantize(), original[f"{layer}.weight"]) < 0.02


def test_plugin_brings_formats_to_every_command(plugin: Path, tmp_path: Path) -> None:
    listed = json.loads(run_cq("plugins", "--json", "--plugin", plugin).out)
    assert listed["plugins"]["formats"]["SeedLayout"] == "seed_layout"
    assert "SeedLayout" not in run_cq("plugins").out


def test_layout_plans_what_it_stores(plugin: Path) -> None:
    load_plugin(str(plugin))
    plug = catalog.load("formats", "SeedLayout")
    assert plug is layout_named("SeedLayout").as_plug()
    spec = make.TensorSpec("BF16", (40, 24))
    stored = plug.store(make.weight(40, 24))
    assert plug.tensors(spec, "own") == {n: make.spec_of(t) for n, t in stored.items()}
    marker = plug.marker(spec, "own", None)
    assert plug.shape(plug.tensors(spec, "own"), marker) == (40, 24)
    assert plug.check(plug.tensors(spec, "own"), marker) == []
    beside = {n: t for n, t in stored.items() if n != "weight"}
    value = plug.unpack(stored["weight"], 0, beside, marker)
    assert error(value, make.weight(40, 24)) < 0.02
    assert "fails on it" not in str(plug.refuse(spec, "own", None))
    assert plug.refuse(make.TensorSpec("F32", (2, 3, 4)), "own", None)


def test_layout_that_looks_at_numbers_is_planned_by_a_sample() -> None:
    class Looks(QuantizedLayout):
        """Half the bytes, and a scale that only numbers give."""

        @classmethod
        def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
            largest = torch.tensor(tensor.abs().max().item())
            codes = (tensor / largest * 7).round().to(torch.int8).reshape(-1, 2)
            return (codes[:, :1] << 4) | (codes[:, 1:] & 15), {"scale": largest}

        @classmethod
        def dequantize(cls, qdata: torch.Tensor, **params: Any) -> torch.Tensor:
            low = (qdata << 4) >> 4
            levels = torch.cat([qdata >> 4, low], 1).float() * (params["scale"].item() / 7)
            return levels.reshape(-1, 32)

    plug = Looks.as_plug()
    spec = make.TensorSpec("F32", (8, 32))
    stored = plug.store(make.weight(8, 32))
    assert plug.refuse(spec, "own", None) is None
    assert plug.tensors(spec, "own") == {n: make.spec_of(t) for n, t in stored.items()}
    value = plug.unpack(stored["weight"], 0, {"weight_scale": stored["weight_scale"]}, {})
    assert (
        float((value - make.weight(8, 32)).abs().max()) <= float(stored["weight_scale"]) / 14 * 1.01
    )


def test_a_layout_that_cannot_be_read_back_stores_nothing() -> None:
    """A misspelt `dequantize` must not make a file that nothing opens."""

    class Oneway(QuantizedLayout):
        @classmethod
        def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
            return tensor.round().to(torch.int8), {}

    with pytest.raises(PlanError, match="`Oneway` has no `dequantize`"):
        Oneway.as_plug().refuse(make.TensorSpec("F32", (8, 32)), "own", None)


def test_parameter_that_depends_on_the_weight_must_be_a_tensor() -> None:
    class Untrue(MyCustomLayout):
        @classmethod
        def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
            return tensor.to(torch.int8), {"scale": float(tensor.abs().max())}

    plug = Untrue.as_plug()
    assert plug.refuse(make.TensorSpec("F32", (8, 8)), "own", None) is None
    with pytest.raises(PlanError, match="depend on the weight"):
        plug.store(make.weight(8, 8))


def test_layout_says_why_it_cannot_store_a_weight() -> None:
    class Even(MyCustomLayout):
        @classmethod
        def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
            if tensor.shape[1] % 2:
                raise ValueError("K is odd")
            return tensor.to(torch.int8), {"kind": torch.int8}

    plug = Even.as_plug()
    assert "K is odd" in str(plug.refuse(make.TensorSpec("F32", (4, 3)), "own", None))
    assert "not JSON serializable" in str(plug.refuse(make.TensorSpec("F32", (4, 4)), "own", None))


def test_entry_point_may_name_a_layout(
    monkeypatch: pytest.MonkeyPatch, fresh_catalog: None
) -> None:
    class Entry:
        name, value = "MyCustomLayout", "somewhere:MyCustomLayout"

        @staticmethod
        def load() -> Any:
            return MyCustomLayout

    real = catalog.entry_points
    monkeypatch.setattr(
        catalog,
        "entry_points",
        lambda group: [Entry] if group == "cq.formats" else real(group=group),
    )
    plug = catalog.load("formats", "MyCustomLayout")
    assert plug is MyCustomLayout.as_plug()
    assert (plug.name, plug.first_comfyui, plug.loader) == ("MyCustomLayout", None, __name__)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 3, "there is no plugin"),
        ("1 / 0", 4, "ZeroDivisionError"),
        ("x = 1", 4, "brings no format"),
        (PLUGIN.replace("SeedLayout", "int8_tensorwise"), 4, "storage format of cq"),
    ],
)
def test_bad_plugin_is_an_error_with_its_reason(
    text: str | None, code: int, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad_plugin.py"
    if text is not None:
        path.write_text(text)
    done = run_cq("plugins", "--plugin", path)
    assert done.code == code
    assert words in done.err
    assert "Traceback" not in done.err


def test_plugin_may_bring_a_format_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "own_format.py"
    path.write_text(
        "from cq.core.formats.fp32 import Cast\nPLUG = Cast('own_cast', 'F32')\n"
        "import sys\nassert 'torch' not in sys.modules\n"
    )
    listed = json.loads(run_cq("plugins", "--json", "--plugin", path).out)
    assert "own_cast" in listed["plugins"]["formats"]


# Modules and files ------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, operations: Any, dim: int) -> None:
        super().__init__()
        linear = operations.Linear
        self.attn = torch.nn.Module()
        self.attn.qkv = linear(dim, 3 * dim)
        self.attn.proj = linear(dim, dim, bias=False)
        self.attn.norm_q = torch.nn.RMSNorm(dim)
        self.norm1 = torch.nn.RMSNorm(dim)
        self.mlp = torch.nn.Sequential(
            linear(dim, 4 * dim), torch.nn.GELU(), linear(4 * dim, dim, bias=False)
        )


class Model(torch.nn.Module):
    """The module of which `make.model` is the state dict."""

    def __init__(self, operations: Any = torch.nn, dim: int = 64) -> None:
        super().__init__()
        self.img_in = operations.Linear(16, dim)
        self.time_in = torch.nn.Module()
        self.time_in.in_layer = operations.Linear(dim, dim, bias=False)
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 8, dim))
        self.register_buffer("step", torch.zeros(()))
        self.blocks = torch.nn.ModuleList(Block(operations, dim) for _ in range(2))
        self.final_layer = torch.nn.Module()
        self.final_layer.linear = operations.Linear(dim, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.img_in(x) + self.pos_embed[:, :1]
        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, -1)
            x = x + block.attn.proj(block.attn.norm_q(q) * k + v)
            x = x + block.mlp(x)
        return self.final_layer.linear(x)


MIXED = {
    "blocks.0.attn.qkv": INT8,
    "blocks.0.attn.proj": "float8_e4m3fn",
    "blocks.0.mlp.0": "nvfp4",
    "blocks.0.mlp.2": "mxfp8",
    "blocks.1.attn.qkv": "convrot_w4a4",
    "blocks.1.mlp.0": "asym_w4a8_int8",
    "blocks.1.mlp.2": "float8_e5m2",
}


def mixed(directory: Path, *, prefix: str = "", **options: Any) -> Path:
    """A model in many formats, written by cq."""
    source = make.save(directory / "in.safetensors", make.model(dim=64, dtype="F32", prefix=prefix))
    chosen = [f"{prefix}{layer}={name}" for layer, name in MIXED.items() if name in FORMATS]
    path = directory / "mixed.safetensors"
    cq.write(cq_quant.quantize(cq.open(source), only=chosen, optimizer="rtn", **options), path)
    return path


def expected(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The same numbers as floats, by cq's own dequantization."""
    from cq.core.dequantize import Dequantize

    plain = path.with_name("plain.safetensors")
    cq.write(Dequantize(dtype="F32").apply(cq.open(path)), plain, force=True)
    return {name.removeprefix(prefix): value for name, value in read(plain).items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("header", [False, True])
def test_load_fills_a_module_from_a_file_of_many_formats(
    prefix: str, header: bool, tmp_path: Path
) -> None:
    path = mixed(tmp_path, prefix=prefix, save_quant_metadata=header)
    if header:  # the header alone, as some tools write it
        tensors = {n: t for n, t in read(path).items() if not n.endswith(".comfy_quant")}
        make.save(path, tensors, make.metadata(path))
    module = Model()
    loaded = load(module, path)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert set(loaded.quantized) == {layer for layer, name in MIXED.items() if name in FORMATS}
    for name, wanted in expected(path, prefix).items():
        held = dict(module.state_dict())[name]
        quantized_here = name.removesuffix(".weight") in loaded.quantized
        assert isinstance(held, QuantizedTensor) == quantized_here
        assert torch.equal(wanted, held.dequantize() if quantized_here else held)
    plain = Model()
    plain.load_state_dict(expected(path, prefix))
    x = activations(2, 5, 16)
    with torch.inference_mode():
        assert error(module(x), plain(x)) < 0.05


def test_load_never_dequantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mixed(tmp_path)
    for name in set(MIXED.values()) & set(FORMATS):
        monkeypatch.setattr(type(catalog.load("formats", name)), "unpack", None)
    assert load(Model(), path).quantized


def test_load_fills_a_module_that_has_no_memory_yet(tmp_path: Path) -> None:
    path = mixed(tmp_path)
    with torch.device("meta"):
        module = Model()
    load(module, path, dtype=torch.bfloat16)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    x = activations(2, 5, 16, dtype=torch.bfloat16)
    assert bool(module(x).isfinite().all())


def test_load_takes_a_checkpoint_that_was_never_written(tmp_path: Path) -> None:
    source = make.save(tmp_path / "in.safetensors", make.model(dtype="F32"))
    plan = cq_quant.quantize(cq.open(source), optimizer="rtn")
    cq.write(plan, tmp_path / "out.safetensors")
    direct, staged = Model(), Model()
    load(direct, plan)
    load(staged, tmp_path / "out.safetensors")
    x = activations(2, 5, 16)
    assert torch.equal(staged(x), direct(x))


def test_load_leaves_what_stands_outside_of_the_prefix(tmp_path: Path) -> None:
    tensors = make.model(dtype="F32", prefix="model.diffusion_model.")
    tensors["first_stage_model.decoder.weight"] = make.weight(8, 8)
    path = make.save(tmp_path / "in.safetensors", tensors)
    assert load(Model(), path) == ([], [], [])
    with pytest.raises(InputError, match=r"1 unexpected: `first_stage_model\.decoder\.weight`"):
        load(_nested(), path, prefix="")


def _nested() -> torch.nn.Module:
    outer, inner = torch.nn.Module(), torch.nn.Module()
    outer.model = inner
    inner.diffusion_model = Model()
    return outer


def test_load_names_what_does_not_match(tmp_path: Path) -> None:
    tensors = make.model(dtype="F32")
    del tensors["blocks.1.norm1.weight"]
    tensors["blocks.7.strange"] = make.weight(3)
    path = make.save(tmp_path / "in.safetensors", tensors)
    with pytest.raises(InputError) as caught:
        load(Model(), path)
    assert "1 missing: `blocks.1.norm1.weight`" in caught.value.message
    assert "1 unexpected: `blocks.7.strange`" in caught.value.message
    loaded = load(Model(), path, strict=False)
    assert loaded.missing_keys == ["blocks.1.norm1.weight"]
    assert loaded.unexpected_keys == ["blocks.7.strange"]


def test_load_gives_floats_to_what_is_no_linear(tmp_path: Path) -> None:
    """A convolution of one pixel, say: its module cannot compute with codes."""
    path = mixed(tmp_path)
    module = Model()

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(64, 64))

    module.blocks[0].attn.proj = Own()
    loaded = load(module, path)
    assert "blocks.0.attn.proj" not in loaded.quantized
    held = module.blocks[0].attn.proj.weight
    assert torch.equal(expected(path)["blocks.0.attn.proj.weight"], held)
    assert type(held) is torch.nn.Parameter


@pytest.mark.parametrize("name", [n for n in FORMATS if catalog.load("formats", n).experts])
def test_load_gives_floats_to_stacked_experts(name: str, tmp_path: Path) -> None:
    weights = make.weight(3, 128, 256)
    source = make.save(tmp_path / "in.safetensors", {"blocks.0.experts.gate.weight": weights})
    path = tmp_path / "out.safetensors"
    plan = cq_quant.quantize(
        cq.open(source), format=name, optimizer="rtn", only=["blocks.0.experts.gate"]
    )
    cq.write(plan, path)
    assert cq.open(path).specs["blocks.0.experts.gate.weight"].shape[0] == 3

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3, 128, 256))

    module = torch.nn.ModuleDict({"gate": Experts()})
    assert load(module, path, prefix="blocks.0.experts.").quantized == []
    held = module["gate"].weight
    assert torch.equal(expected(path)["blocks.0.experts.gate.weight"], held)
    assert error(held, weights) < 0.2


def broken(directory: Path, change: Any) -> Path:
    path = mixed(directory)
    tensors = read(path)
    change(tensors)
    return make.save(path, tensors)


def _unmarked(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["blocks.0.attn.qkv.comfy_quant"], tensors["blocks.0.attn.qkv.weight_scale"]


def _set(name: str, value: Any) -> Any:
    return lambda tensors: tensors.__setitem__(name, value(tensors) if callable(value) else value)


def _marker(settings: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


QKV = "blocks.0.attn.qkv"


def _rotated(group: Any) -> Any:
    settings = {"format": INT8, "convrot": True, "convrot_groupsize": group}
    return _set(f"{QKV}.comfy_quant", _marker(settings))


BROKEN = [
    ("rotation group 100", _rotated(100)),
    ("rotation group 256", _rotated(256)),
    ("rotation group 0", _rotated("many")),
    ("scale", lambda t: t.pop(f"{QKV}.weight_scale")),
    ("no `weight`", lambda t: t.pop(f"{QKV}.weight")),
    ("does not fit", _set(f"{QKV}.weight_scale", torch.ones(7, 1))),
    ("shape", _set(f"{QKV}.weight", lambda t: t[f"{QKV}.weight"][:, :32].contiguous())),
    ("U8", _set(f"{QKV}.weight", lambda t: t[f"{QKV}.weight"].view(torch.uint8))),
    ("svdquant_w4a4", _set(f"{QKV}.comfy_quant", _marker({"format": "svdquant_w4a4"}))),
    ("not a JSON object", _set(f"{QKV}.comfy_quant", _marker([1]))),
    ("neither a scale nor a marker", _unmarked),
]


@pytest.mark.parametrize(("words", "change"), BROKEN)
def test_load_refuses_a_layer_that_is_not_sound(words: str, change: Any, tmp_path: Path) -> None:
    path = broken(tmp_path, change)
    with pytest.raises(CqError) as caught:
        load(Model(), path)
    assert words in str(caught.value)
    assert QKV in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({}, {"weight_scale": None}, "no `weight_scale`"),
        ({}, {"weight": None}, "no `weight`"),
        ({}, {"weight": torch.zeros(64, 32, dtype=torch.int8)}, "shape"),
        ({"params": {"colour": 1}}, {}, "`colour`"),
        ({}, {"weight_scale": torch.zeros(3, 7)}, "cannot be read"),
    ],
)
def test_load_refuses_a_custom_layer_that_is_not_sound(
    settings: dict[str, Any], change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    class Strict(QuantizedLayout):
        @classmethod
        def dequantize(  # type: ignore[override]
            cls, qdata: torch.Tensor, scale: torch.Tensor
        ) -> torch.Tensor:
            return qdata.float() * scale

    layer = {"weight": torch.zeros(64, 64, dtype=torch.int8), "weight_scale": torch.ones(())}
    sound = {**layer, "comfy_quant": _marker({"format": "Strict"})}
    layer |= {"comfy_quant": _marker({"format": "Strict", **settings})}

    def module() -> torch.nn.Module:
        return torch.nn.ModuleDict({"one": mixed_precision_ops().Linear(64, 64, bias=False)})

    def file(tensors: dict[str, Any]) -> Path:
        found = {f"one.{n}": t for n, t in tensors.items() if t is not None}
        return make.save(tmp_path / "one.safetensors", found)

    assert load(module(), file(sound)).quantized == ["one"]
    with pytest.raises(InputError) as caught:
        load(module(), file({**layer, **change}))
    assert words in str(caught.value)
    if "weight" not in change or change["weight"] is not None:
        with pytest.raises(InputError, match="one"):
            module().load_state_dict(make.load(file({**layer, **change})))


# Operations classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_load_quantized_layers_from_a_state_dict(
    compute: torch.dtype, device: str, tmp_path: Path
) -> None:
    tensors = read(mixed(tmp_path))
    operations = mixed_precision_ops(compute)
    with torch.device(device):
        module = Model(operations)
    report = module.load_state_dict(tensors, strict=False, assign=device == "meta")
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    wanted = Model()
    load(wanted, tmp_path / "mixed.safetensors", dtype=compute)
    for (name, ours), (_, theirs) in zip(
        module.named_parameters(), wanted.named_parameters(), strict=True
    ):
        assert type(ours) is type(theirs)
        if isinstance(ours, QuantizedTensor):
            assert ours.dtype == compute
            assert make.same(theirs.dequantize(), ours.dequantize()), name
    x = activations(2, 5, 64).to(compute)
    block = module.blocks[0]
    assert torch.equal(wanted.blocks[0].mlp(x), block.mlp(x))
    assert block.mlp[0](x.float()).dtype == torch.float32, "computes in the input's dtype"


def test_operations_give_back_the_tensors_of_the_file(tmp_path: Path) -> None:
    path = mixed(tmp_path)
    tensors = read(path)
    module = Model(mixed_precision_ops(torch.float32))
    module.load_state_dict(tensors)
    saved = module.state_dict()
    assert set(tensors) == set(saved)
    for name, tensor in tensors.items():
        assert type(saved[name]) is torch.Tensor, "what safetensors can write"
        assert make.same(tensor, saved[name]), name


@pytest.mark.parametrize(("words", "change"), [b for b in BROKEN if b[0] != "no `weight`"])
def test_operations_refuse_a_layer_that_is_not_sound(
    words: str, change: Any, tmp_path: Path
) -> None:
    tensors = read(broken(tmp_path, change))
    with pytest.raises(CqError) as caught:
        Model(mixed_precision_ops()).load_state_dict(tensors)
    assert QKV in str(caught.value)


def test_operations_report_a_missing_weight() -> None:
    module = mixed_precision_ops().Linear(4, 4)
    report = module.load_state_dict({"bias": torch.ones(4), "weight_scale": torch.ones(())}, False)
    assert report == (["weight"], ["weight_scale"])


@pytest.mark.parametrize("name", [n for n in FORMATS if catalog.load("formats", n).embeddings])
def test_embedding_looks_up_rows_as_the_whole_table_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = quantized(name, 50, 64)
    table = held.dequantize()
    stored, marker = held.stored()
    module = mixed_precision_ops(torch.float32).Embedding(50, 64)
    module.load_state_dict({**stored, "comfy_quant": _marker(marker)})
    indices = torch.tensor([[3, 0, 49], [3, 7, 7]])
    monkeypatch.setattr(QuantizedTensor, "dequantize", None)  # the whole table is not needed
    assert torch.equal(table[indices], module(indices))
    assert torch.equal(table[5], functional.embedding(torch.tensor(5), held))
    assert module(torch.empty(0, dtype=torch.long)).shape == (0, 64)
    with pytest.raises(IndexError):
        module(torch.tensor([50]))


def test_rotated_embedding_is_bit_equal_to_kitchen() -> None:
    held = quantized(INT8, 50, 256, group=64)
    indices = torch.tensor([3, 0, 49])
    wanted = eager.dequantize_int8_embedding(
        held._qdata, held._layout_params["weight_scale"], indices, 64, 0
    )
    assert make.same(wanted, functional.embedding(indices, held))
    assert rotation.is_group(64)


def test_embedding_in_any_other_format_still_looks_up() -> None:
    held = quantized("MyCustomLayout", 50, 64)
    indices = torch.tensor([3, 0, 49])
    assert torch.equal(held.dequantize()[indices], functional.embedding(indices, held))


# The digits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [False, True])
def test_digits_of_the_int8_model_are_those_of_the_base(on: bool, tmp_path: Path) -> None:
    from examples.digits.contact_sheet import psnr
    from examples.digits.model import load as load_digits
    from examples.digits.sample import sample

    use_kitchen(on)
    out = tmp_path / "int8.safetensors"
    cq.write(cq_quant.quantize(cq.open(BASE)), out)
    model = load_digits(out)
    assert sum(isinstance(p, QuantizedTensor) for p in model.parameters()) == 16
    found = sample(model, [0, 4, 7], seed=1, steps=10)
    assert psnr(found, sample(load_digits(BASE), [0, 4, 7], seed=1, steps=10)) > 40


def test_the_documented_layout_works(tmp_path: Path) -> None:
    """docs/custom-layouts.md, as a reader would try it."""
    text = (BASE.parents[2] / "docs" / "custom-layouts.md").read_text()
    plugin = tmp_path / "five.py"
    plugin.write_text(text.split("```python\n")[1].split("```")[0])
    source = make.save(tmp_path / "in.safetensors", make.model())
    out, back = tmp_path / "five.safetensors", tmp_path / "back.safetensors"
    with_plugin = ("--plugin", plugin)
    for step in (
        ("quant", source, *with_plugin, "--format", "FiveBits", "--allow-custom-loader", "-o", out),
        ("verify", out, *with_plugin, "--against", source, "--min-sqnr", "8"),
        ("quant", out, *with_plugin, "--format", "bf16", "-o", back),
    ):
        done = (run_cq if step[0] == "verify" else quick)(*step)
        assert done.code == 0, done.err
    assert set(make.load(source)) == set(make.load(back))
