"""comfy-kitchen, where it is installed: its kernels for our formats, our layouts among its own.

Owns the table from formats to comfy-kitchen's layouts, and the adapter that makes a layout of ours
one of its. Everything works without it, and with `use_kitchen(False)` or `CQ_KITCHEN=0` as if it
were not there. Torch and comfy-kitchen only inside functions.

Source: comfy-kitchen 0.2.40, `tensor/base.py` (`QuantizedTensor`, `register_layout_class`,
`register_layout_op`) and the layouts beside it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cq.layouts.registry import QuantizedLayout
    from cq.layouts.tensor import QuantizedTensor

_switch = {"on": os.environ.get("CQ_KITCHEN", "1") != "0"}


def use_kitchen(enabled: bool) -> None:
    """Whether comfy-kitchen runs the formats from here on, if it is installed.

    Without a call it does, unless the environment variable `CQ_KITCHEN` is `0`.
    """
    from cq.layouts.registry import registered_layouts

    _switch["on"] = enabled
    for layout in registered_layouts():  # also those that were defined while it was off
        offer_layout(layout)


@contextmanager
def left_out() -> Iterator[None]:
    """While it lasts comfy-kitchen is neither used nor imported, which takes seconds."""
    before = _switch["on"]
    _switch["on"] = False
    try:
        yield
    finally:
        _switch["on"] = before


def tensors() -> Any | None:
    """The module `comfy_kitchen.tensor`, or None if it is not installed or not to be used."""
    return _imported() if _switch["on"] else None


@cache
def _imported() -> Any | None:
    try:
        import comfy_kitchen.tensor  # type: ignore[import-untyped]
    except (ImportError, OSError):  # OSError: a library of its kernels that does not load
        return None
    return comfy_kitchen.tensor


# Our formats on its layouts ----------------------------------------------------------------------

Values = Mapping[str, Any]


def _group(params: Values) -> int:
    group = params["marker"].get("convrot_groupsize", 256)
    return int(group)


def _int8(params: Values) -> dict[str, Any]:
    from cq.core.formats.int8_tensorwise import convrot_group

    scale, group = params["weight_scale"].float(), convrot_group(params["marker"])
    return {
        # One number per row multiplies along K unless it is a column.
        "scale": scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()),
        "convrot": group is not None,
        "convrot_groupsize": group or 256,
    }


def _float8(params: Values) -> dict[str, Any]:
    return {"scale": params["weight_scale"].float()}


def _mxfp8(params: Values) -> dict[str, Any]:
    import torch

    return {"scale": params["weight_scale"].view(torch.float8_e8m0fnu)}


def _nvfp4(params: Values) -> dict[str, Any]:
    import torch

    block = params["weight_scale"].view(torch.float8_e4m3fn)
    return {"scale": params["weight_scale_2"], "block_scale": block}


def _w4a4(params: Values) -> dict[str, Any]:
    return {
        "scale": params["weight_scale"].reshape(-1),
        "convrot_groupsize": _group(params),
        "linear_dtype": params["marker"].get("linear_dtype", "int4"),
    }


def _w4a8(params: Values) -> dict[str, Any]:
    import torch

    relative = params["weight_s_rel"]
    return {
        "scale": relative.view(torch.float8_e4m3fn) if relative.dtype == torch.uint8 else relative,
        "s_channel": params["weight_s_channel"],
        "codebook": params.get("weight_codebook"),
        "group_size": params["marker"].get("group_size", 16),
        "convrot_groupsize": _group(params),
    }


def _awq(params: Values) -> dict[str, Any]:
    return {
        "scale": params["weight_scale"],
        "zeros": params["weight_zeros"],
        "group_size": params["marker"].get("group_size", 64),
    }


_TWINS: Mapping[str, tuple[str, Callable[[Values], dict[str, Any]]]] = {
    "int8_tensorwise": ("TensorWiseINT8Layout", _int8),
    "float8_e4m3fn": ("TensorCoreFP8Layout", _float8),
    "float8_e5m2": ("TensorCoreFP8Layout", _float8),
    "mxfp8": ("TensorCoreMXFP8Layout", _mxfp8),
    "nvfp4": ("TensorCoreNVFP4Layout", _nvfp4),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", _w4a4),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", _w4a8),
    "awq_w4a16": ("TensorCoreAWQW4A16Layout", _awq),
}


def runs(x: torch.Tensor, weight: QuantizedTensor) -> bool:
    """Whether comfy-kitchen takes `x` times `weight`: it is in use, has a layout for the format,
    and kernels for the dtype."""
    import torch

    here = tensors()
    known = _TWINS.get(weight._layout_type)
    return (
        here is not None
        and known is not None
        and x.numel() > 0
        and hasattr(here, known[0])
        and x.dtype in {torch.float32, torch.float16, torch.bfloat16}
    )


def has_twin(format_name: str) -> bool:
    """Whether comfy-kitchen is in use and has a layout for the format of that name."""
    known = _TWINS.get(format_name)
    here = tensors() if known is not None else None
    return known is not None and hasattr(here, known[0])


def twin(weight: QuantizedTensor) -> Any:
    """The same codes and parameters as comfy-kitchen's own quantized tensor; nothing is copied
    that it can use as it is."""
    here = tensors()
    assert here is not None
    name, make = _TWINS[weight._layout_type]
    params = getattr(here, name).Params(
        orig_dtype=weight.dtype, orig_shape=tuple(weight.shape), **make(weight._layout_params)
    )
    return here.QuantizedTensor(weight._qdata, name, params)


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` by comfy-kitchen.

    Handed over through its dispatcher: called from outside, PyTorch would split the linear first.
    """
    import torch

    other = twin(weight)
    found: torch.Tensor = type(other).__torch_dispatch__(
        torch.ops.aten.linear.default, (type(other),), (x, other, bias)
    )
    return found.to(x.dtype)  # awq_w4a16 computes in the dtype of its scales


# Our layouts among its own -----------------------------------------------------------------------


def offer_layout(layout: type[QuantizedLayout]) -> None:
    """Register a layout of ours and its operations with comfy-kitchen, if that is in use."""
    from cq.layouts.registry import operations_of

    here = tensors()
    if here is not None:
        here.register_layout_class(layout.__name__, _adapter(layout))  # type: ignore[arg-type]
        for operation in operations_of(layout):
            _offer_operation(operation, layout)


def _offer_operation(operation: Any, layout: type[QuantizedLayout]) -> None:
    from cq.layouts.registry import handler_of

    here = _imported()
    assert here is not None

    def handle(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        handler = handler_of(operation, layout)
        assert handler is not None
        return handler(operation, _ours(args), _ours(kwargs or {}))

    here.register_layout_op(operation, _adapter(layout))(handle)  # type: ignore[arg-type]


def _ours(value: Any) -> Any:
    """`value` with comfy-kitchen's tensors of our layouts in it as ours."""
    from cq.layouts.tensor import QuantizedTensor

    here = _imported()
    if here is not None and isinstance(value, here.QuantizedTensor):
        layout = getattr(value.layout_cls, "ours", None)
        if layout is None:
            return value
        params = value._params
        return QuantizedTensor(
            value._qdata,
            layout,
            _given(params),
            shape=tuple(params.orig_shape),
            dtype=params.orig_dtype,
        )
    if isinstance(value, dict):
        return {key: _ours(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_ours(one) for one in value)
    return value


@cache
def _adapter(layout: Any) -> Any:
    """A class that comfy-kitchen takes for one of its layouts and that does as `layout` does."""
    here: Any = _imported()

    class Adapter(here.QuantizedLayout):  # type: ignore[misc]
        ours = layout
        Params = here.BaseLayoutParams

        @classmethod
        def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
            qdata, given = layout.quantize(tensor, **kwargs)
            kind = _params_class(here.BaseLayoutParams, layout.__name__, tuple(given))
            missing = {"scale": None, "orig_dtype": tensor.dtype, "orig_shape": tuple(tensor.shape)}
            return qdata, kind(**{**missing, **given})

        @classmethod
        def dequantize(cls, qdata: torch.Tensor, params: Any) -> torch.Tensor:
            value: torch.Tensor = layout.dequantize(qdata, **_given(params))
            return value

        @classmethod
        def get_plain_tensors(cls, qtensor: Any) -> tuple[torch.Tensor, ...]:
            params = qtensor._params
            return (qtensor._qdata, *(getattr(params, n) for n in params._tensor_fields()))

        @classmethod
        def state_dict_tensors(cls, qdata: torch.Tensor, params: Any) -> dict[str, torch.Tensor]:
            stored, _ = layout.to_stored(qdata, _given(params))
            return {name.removeprefix("weight"): value for name, value in stored.items()}

    Adapter.__name__ = Adapter.__qualname__ = layout.__name__
    return Adapter


@cache
def _params_class(base: Any, layout: str, names: tuple[str, ...]) -> Any:
    """A dataclass of comfy-kitchen's kind whose fields are the parameters `names`."""

    def tensor_fields(self: Any) -> list[str]:
        import torch

        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return [name for name, value in held.items() if isinstance(value, torch.Tensor)]

    own = [n for n in names if n not in {f.name for f in dataclasses.fields(base)}]
    return dataclasses.make_dataclass(
        f"{layout}Params",
        [(name, Any) for name in own],
        bases=(base,),
        frozen=True,
        namespace={"_tensor_fields": tensor_fields, "given": names},
    )


def _given(params: Any) -> dict[str, Any]:
    """The parameters as our layout returned them."""
    return {name: getattr(params, name) for name in params.given}
