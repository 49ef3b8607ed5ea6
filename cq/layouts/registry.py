"""Layouts and their operations by name.

Owns `QuantizedLayout`, the base of every layout, and the two tables: names to layouts, operations
to handlers. Knows no layout of its own; storage formats become layouts in `cq.layouts.formats`
when one is asked for. Imports no torch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cq.core import catalog
from cq.core.errors import InputError, PlanError
from cq.core.text import printable

if TYPE_CHECKING:
    import torch

    from cq.core.formats import Format

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""What runs an operation on quantized tensors: `handler(operation, args, kwargs)`."""

_H = TypeVar("_H", bound=Handler)

_layouts: dict[str, type[QuantizedLayout]] = {}
_handlers: dict[Any, dict[type[QuantizedLayout], Handler]] = {}


class QuantizedLayout:
    """How numbers are held quantized at run time. A subclass is registered under its name.

    A subclass offers `quantize` and `dequantize`, of which the second takes what the first returns:
    `dequantize(qdata, **params)`. `orig_dtype` among the parameters is the dtype that the tensor
    shows; if `dequantize` takes it, it is given also where `quantize` did not return it.

    Raises: PlanError, where the class is defined, if another layout or a storage format has its
    name. To define the same class again, as a notebook does, replaces it.
    """

    registered: ClassVar[bool] = False

    def __init_subclass__(cls, *, registered: bool = True, **kwargs: Any) -> None:
        """Register the class, unless it says `registered=False`, as bases of layouts do."""
        super().__init_subclass__(**kwargs)
        cls.registered = registered
        if registered:
            _register(cls)

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """The codes of a float tensor, and everything else that `dequantize` needs, by name."""
        raise _lacks(cls, "quantize")

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, **params: Any) -> torch.Tensor:
        """The float tensor that codes and parameters stand for; it may have padding."""
        raise _lacks(cls, "dequantize")

    @classmethod
    def to_stored(
        cls, qdata: torch.Tensor, params: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors that a file holds, by local name, and the layer's marker.

        The parameter `scale` is the tensor `weight_scale`; what is not a tensor stands in the
        marker under `params`, except `orig_dtype`, which is the reader's choice.
        """
        stored, plain = {"weight": qdata}, {}
        for name, value in params.items():
            if _is_tensor(value):
                stored[f"weight_{name}"] = value
            elif name != "orig_dtype":
                plain[name] = value
        marker: dict[str, Any] = {"format": cls.__name__}
        return stored, marker | ({"params": plain} if plain else {})

    @classmethod
    def from_stored(
        cls,
        stored: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Codes and parameters of stored tensors: the inverse of `to_stored`.

        Raises: InputError if a parameter that `dequantize` cannot do without is missing.
        """
        nested = marker.get("params")
        params = dict(nested) if isinstance(nested, dict) else {}
        for name, value in stored.items():
            if name.startswith("weight_"):
                params[name.removeprefix("weight_")] = value
        taken, any_name = _parameters(cls)  # type: ignore[arg-type]  # as below
        if any_name or "orig_dtype" in taken:
            params["orig_dtype"] = dtype
        strange = next((name for name in params if name not in taken), None)
        if strange is not None and not any_name:
            raise InputError(
                f"there is a parameter `{printable(strange)}`, which the layout `{cls.__name__}`"
                " does not know",
                code="input.layout",
            )
        missing = [name for name, needed in taken.items() if needed and name not in params]
        if missing or "weight" not in stored:
            lost = f"weight_{missing[0]}" if missing else "weight"
            raise InputError(
                f"there is no `{lost}`, which the layout `{cls.__name__}` needs",
                code="input.layout",
            )
        return stored["weight"], params

    @classmethod
    def as_plug(cls) -> Format:
        """The layout as a storage format for `cq quant --format`; the same object every time."""
        from cq.layouts.plugin import format_of

        return format_of(cls)  # type: ignore[arg-type]  # mypy holds classes for unhashable


@cache
def _parameters(layout: Any) -> tuple[Mapping[str, bool], bool]:
    """The names that `dequantize` takes beside the codes, with whether each is needed; and whether
    it takes any name."""
    found = list(inspect.signature(layout.dequantize).parameters.values())[1:]
    named = {
        p.name: p.default is p.empty
        for p in found
        if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in found)


def _lacks(layout: type[QuantizedLayout], method: str) -> PlanError:
    # Not NotImplementedError, which is PyTorch's word for "cannot be told without the numbers".
    return PlanError(
        f"the layout `{layout.__name__}` has no `{method}`",
        hint="a layout offers the class methods `quantize` and `dequantize`",
        code="plan.layout",
    )


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _register(layout: type[QuantizedLayout]) -> None:
    from cq.layouts import kitchen

    name = layout.__name__
    known = _layouts.get(name)
    if known is not None and _place(known) != _place(layout):
        raise PlanError(
            f"there is a layout `{name}` already, in `{known.__module__}`",
            hint="give yours another name",
            code="plan.layout_twice",
        )
    if known is None and _is_own_format(name, layout.__module__):
        raise PlanError(
            f"`{name}` is a storage format of cq, which is a layout already",
            hint="give yours another name, or register an operation for the format's own layout",
            code="plan.layout_twice",
        )
    _layouts[name] = layout
    kitchen.offer_layout(layout)


def _place(layout: type[QuantizedLayout]) -> tuple[str, str]:
    return layout.__module__, layout.__qualname__


def _is_own_format(name: str, module: str) -> bool:
    # An entry point or `--plugin` may have put this very layout into the catalogue.
    if module.startswith("cq.layouts.") or name not in catalog.names("formats"):
        return False
    origin = catalog.origin("formats", name)
    return ":" not in origin and origin != module


def layout_named(name: str | type[QuantizedLayout]) -> type[QuantizedLayout]:
    """The layout of that name: one that a class defined, or a storage format of the catalogue.

    Raises: PlanError with near names if there is none.
    """
    if isinstance(name, type):
        return name
    if name in _layouts:
        return _layouts[name]
    if name in catalog.names("formats"):
        from cq.layouts.formats import layout_of

        return layout_of(name)
    known = sorted({*_layouts, *catalog.names("formats")})
    near = difflib.get_close_matches(name, known, n=3)
    raise PlanError(
        f"there is no layout `{name}`",
        hint=(
            f"did you mean {' or '.join(f'`{n}`' for n in near)}?"
            if near
            else "import the module that defines it; there are: " + ", ".join(known)
        ),
        code="plan.no_layout",
    )


def register_layout_op(operation: Any, layout: str | type[QuantizedLayout]) -> Callable[[_H], _H]:
    """Decorate the function that runs `operation` on tensors of `layout`, a class or its name.

    `operation` is an ATen overload such as `torch.ops.aten.linear.default`; the function is called
    as `handler(operation, args, kwargs)`. Subclasses of the layout inherit it.
    `torch.nn.functional.linear` arrives as `aten.linear.default` with `(x, weight, bias)`, also
    outside of inference mode, where PyTorch would have split it before.

    Raises: PlanError if there is no such layout, or another function runs the operation already.
    """
    target = layout_named(layout)

    def register(handler: _H) -> _H:
        from cq.layouts import kitchen

        known = _handlers.setdefault(operation, {}).get(target)
        same = ("__module__", "__qualname__")
        if known is not None and any(
            getattr(known, a, None) != getattr(handler, a, None) for a in same
        ):
            raise PlanError(
                f"the layout `{target.__name__}` has a function for `{operation}` already",
                hint="register one function for each operation and layout",
                code="plan.layout_twice",
            )
        _handlers[operation][target] = handler
        for one in registered_layouts():
            if issubclass(one, target):
                kitchen.offer_layout(one)
        return handler

    return register


def handler_of(operation: Any, layout: type[QuantizedLayout]) -> Handler | None:
    """The function that runs `operation` on tensors of `layout` or of a base of it."""
    table = _handlers.get(operation)
    if table is None:
        return None
    return next((table[base] for base in layout.__mro__ if base in table), None)


def operations_of(layout: type[QuantizedLayout]) -> tuple[Any, ...]:
    """The operations that run on `layout` by a function of its own or of a base of it."""
    return tuple(operation for operation in _handlers if handler_of(operation, layout) is not None)


def registered_layouts() -> tuple[type[QuantizedLayout], ...]:
    """The layouts that classes have defined so far."""
    return tuple(_layouts.values())
