"""`QuantizedTensor`: codes and parameters that PyTorch takes for a float tensor.

Owns what happens to such a tensor: moving and copying keep it quantized, operations that its layout
runs are handed over, everything else computes with its float values. Knows no layout.

Source: PyTorch's `__torch_dispatch__` and `__torch_function__` protocols for tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as functional

from cq.core.errors import UsageError
from cq.layouts.registry import QuantizedLayout, handler_of, layout_named

aten = torch.ops.aten

Change = Callable[[torch.Tensor], torch.Tensor]


class QuantizedTensor(torch.Tensor):
    """A tensor that is held quantized and shows itself as a float tensor.

    `_qdata` are the codes, `_layout_type` the layout's name, `_layout_params` everything else that
    the layout's `dequantize` takes. Shape and dtype are the float tensor's: `shape` without the
    padding that the codes may have, `dtype` the parameter `orig_dtype`.

    Moving, copying and changing the dtype keep it quantized, operations that were registered for
    the layout run on it as they see fit, and every other operation computes with `dequantize()`.
    """

    _qdata: torch.Tensor
    _layout_type: str
    _layout_params: dict[str, Any]

    @staticmethod
    def __new__(
        cls,
        qdata: torch.Tensor,
        layout_type: str | type[QuantizedLayout],
        layout_params: Mapping[str, Any],
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Codes and parameters as they are. `shape` None is the codes' shape; `dtype` None is the
        parameter `orig_dtype`, float32 if there is none. Raises: PlanError for an unknown layout.
        """
        layout_named(layout_type)
        found: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(qdata.shape) if shape is None else shape,
            dtype=dtype or layout_params.get("orig_dtype") or torch.float32,
            device=qdata.device,
            requires_grad=False,
        )
        return found

    def __init__(
        self,
        qdata: torch.Tensor,
        layout_type: str | type[QuantizedLayout],
        layout_params: Mapping[str, Any],
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._qdata = qdata
        self._layout_type = layout_named(layout_type).__name__
        self._layout_params = dict(layout_params)

    @classmethod
    def from_float(
        cls, tensor: torch.Tensor, layout_type: str | type[QuantizedLayout], **kwargs: Any
    ) -> Self:
        """Quantize a float tensor; `kwargs` go to the layout's `quantize`.

        Raises: PlanError if there is no such layout, or it cannot take the tensor.
        """
        with torch.no_grad():
            plain = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.detach()
            qdata, params = layout_named(layout_type).quantize(plain, **kwargs)
        return cls(qdata, layout_type, params, shape=tuple(tensor.shape), dtype=tensor.dtype)

    @property
    def layout_class(self) -> type[QuantizedLayout]:
        """The layout itself, of which `_layout_type` is the name."""
        return layout_named(self._layout_type)

    def dequantize(self) -> torch.Tensor:
        """The float tensor, of this tensor's shape and dtype."""
        value = self.layout_class.dequantize(self._qdata, **self._layout_params)
        if value.shape != self.shape:
            value = value[tuple(slice(side) for side in self.shape)]
        return value.to(self.dtype)

    def shown_as(self, dtype: torch.dtype) -> QuantizedTensor:
        """The same codes under another float dtype; nothing is copied."""
        return self if dtype == self.dtype else self._with(lambda tensor: tensor, dtype)

    def stored(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors that a file holds of it, by local name, and the layer's marker."""
        return self.layout_class.to_stored(self._qdata, self._layout_params)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape, layout, dtype and device; not the values, which would have to be computed."""
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, layout={self._layout_type},"
            f" dtype={self.dtype}, device={self.device})"
        )

    def _with(
        self, change: Change, dtype: torch.dtype | None = None, *, keep: bool = False
    ) -> QuantizedTensor:
        """A tensor whose codes and tensor parameters went through `change`; with `keep` a module's
        parameter stays one."""
        params = {
            name: change(value) if isinstance(value, torch.Tensor) else value
            for name, value in self._layout_params.items()
        }
        if dtype is not None and "orig_dtype" in params:
            params["orig_dtype"] = dtype
        found = QuantizedTensor(
            change(self._qdata),
            self._layout_type,
            params,
            shape=tuple(self.shape),
            dtype=dtype or self.dtype,
        )
        return _as_before(found, self) if keep else found

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        """A copy that shares nothing with this tensor."""
        if id(self) not in memo:
            memo[id(self)] = self._with(torch.clone, keep=True)
        found: QuantizedTensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Codes and parameters, for `copy.copy`, `pickle` and `torch.save`."""
        kind = (isinstance(self, torch.nn.Parameter), self.requires_grad)
        shape, held = tuple(self.shape), dict(self._layout_params)
        return _rebuilt, (self._qdata, self._layout_type, held, shape, self.dtype, *kind)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """The tensors that this one is made of, as attributes, and the rest."""
        names = [n for n, v in self._layout_params.items() if isinstance(v, torch.Tensor)]
        for name in names:
            setattr(self, f"_param_{name}", self._layout_params[name])
        plain = {n: v for n, v in self._layout_params.items() if n not in names}
        return ["_qdata", *(f"_param_{n}" for n in names)], (self._layout_type, plain, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], rest: Any, size: Any, stride: Any
    ) -> QuantizedTensor:
        """The inverse of `__tensor_flatten__`."""
        layout_type, plain, dtype = rest
        own = {n.removeprefix("_param_"): v for n, v in inner.items() if n != "_qdata"}
        return QuantizedTensor(
            inner["_qdata"], layout_type, {**plain, **own}, shape=tuple(size), dtype=dtype
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Hand a linear over as a whole: outside of inference mode PyTorch splits it into smaller
        operations before `__torch_dispatch__` sees it."""
        given = kwargs or {}
        if func in _LINEAR and len(args) + len(given) >= 2:
            found = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **given}
            whole = (found.pop("input", None), found.pop("weight", None), found.pop("bias", None))
            if not found:
                return _run(aten.linear.default, whole, {})
        if func == _SET_DATA:
            return _set_data(args[0], args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` quantized if it can be, else with float values."""
        return _run(func, args, kwargs or {})


_LINEAR = frozenset({functional.linear, aten.linear.default})
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if operation in _MOVES:
        return operation.decompose(*args, **kwargs)
    general = _GENERAL.get(operation)
    if general is not None and isinstance(args[0], QuantizedTensor):
        found = general(*args, **kwargs)
        if found is not NotImplemented:
            return found
    first = _first_quantized((*args, *kwargs.values()))
    assert first is not None
    handler = handler_of(operation, first.layout_class)
    if handler is not None:
        return handler(operation, args, kwargs)
    _refuse_writing(operation, args, kwargs)
    return operation(*floats(args), **floats(kwargs))


def floats(value: Any) -> Any:
    """`value` with every quantized tensor in it, also in lists and dicts, as a float tensor."""
    if isinstance(value, QuantizedTensor):
        return value.dequantize()
    if isinstance(value, dict):
        return {key: floats(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(floats(one) for one in value)
    return value


def _first_quantized(values: tuple[Any, ...]) -> QuantizedTensor | None:
    for value in values:
        if isinstance(value, QuantizedTensor):
            return value
        if isinstance(value, list | tuple):
            found = _first_quantized(tuple(value))
            if found is not None:
                return found
    return None


def _refuse_writing(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What is written to the float values would be lost with them."""
    for position, argument in enumerate(operation._schema.arguments):
        alias = argument.alias_info
        if alias is None or not alias.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, QuantizedTensor):
            raise UsageError(
                f"`{operation}` would write to a quantized tensor",
                hint="change the float tensor and quantize it again: `QuantizedTensor.from_float`",
                code="usage.quantized",
            )


def _detach(tensor: QuantizedTensor) -> QuantizedTensor:
    return tensor._with(torch.Tensor.detach)


def _clone(tensor: QuantizedTensor, *, memory_format: Any = None) -> QuantizedTensor:
    return tensor._with(torch.clone)


def _to_copy(
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return tensor._with(lambda t: t.to(device, non_blocking=non_blocking, copy=True), dtype)


def _empty_like(
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return tensor._with(lambda t: torch.empty_like(t, device=device), dtype)


def _copy_(
    target: QuantizedTensor, source: torch.Tensor, non_blocking: bool = False
) -> QuantizedTensor:
    if not isinstance(source, QuantizedTensor) or source._layout_type != target._layout_type:
        raise UsageError(
            f"a quantized tensor of layout `{target._layout_type}` takes copies of its own kind"
            " only",
            hint="assign the other tensor instead of copying it, or quantize it first",
            code="usage.quantized",
        )
    target._qdata.copy_(source._qdata, non_blocking=non_blocking)
    for name, value in source._layout_params.items():
        held = target._layout_params.get(name)
        if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor):
            held.copy_(value, non_blocking=non_blocking)
        elif name != "orig_dtype":
            target._layout_params[name] = value
    return target


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, of which PyTorch would take all but the codes."""
    if not (isinstance(tensor, QuantizedTensor) and isinstance(value, QuantizedTensor)):
        raise UsageError(
            "`.data` cannot be changed between a quantized and a float tensor",
            hint="assign a new `torch.nn.Parameter` to the module",
            code="usage.quantized",
        )
    with torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(tensor, value)
    tensor.__init__(value._qdata, value._layout_type, value._layout_params)  # type: ignore[misc]


def _as_before(found: QuantizedTensor, before: torch.Tensor) -> Any:
    if isinstance(before, torch.nn.Parameter):
        return torch.nn.Parameter(found, requires_grad=before.requires_grad)
    return found.requires_grad_(before.requires_grad)


def _rebuilt(
    qdata: torch.Tensor,
    layout_type: str,
    params: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    is_parameter: bool,
    requires_grad: bool,
) -> Any:
    found = QuantizedTensor(qdata, layout_type, params, shape=tuple(shape), dtype=dtype)
    if is_parameter:
        return torch.nn.Parameter(found, requires_grad=requires_grad)
    return found.requires_grad_(requires_grad)


torch.serialization.add_safe_globals([_rebuilt])

# In inference mode PyTorch hands these over undivided; divided, they are copies, or nothing.
_MOVES = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
        aten.contiguous.default,
    }
)

_GENERAL: Mapping[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy_,
    # Asked by `Module.to`: a shallow copy would leave the codes behind.
    aten._has_compatible_shallow_copy_type.default: lambda left, right: False,
}
