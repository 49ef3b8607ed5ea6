"""Layouts as storage formats, and the modules that bring them: `cq quant --plugin FILE.py`.

Owns `LayoutFormat`, which makes a format of a layout, and `load_plugin`. Imports no torch: a plugin
that needs it imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cq.core import catalog
from cq.core.dtypes import DTYPES, TensorSpec, spec_of, torch_dtype
from cq.core.errors import CqError, InputError, InternalError, PlanError
from cq.core.formats import Fault, Format

if TYPE_CHECKING:
    import torch

    from cq.layouts.registry import QuantizedLayout

_FAILURES = (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError, KeyError)


class LayoutFormat(Format):
    """A layout as a storage format: what `quantize` returns is what is stored.

    The codes are the tensor `weight`, a parameter `scale` that is a tensor is `weight_scale`, and
    parameters that are plain JSON stand in the marker under `params`. The layout sees whole
    weights, in float32, and rounds by itself: optimizers have no say.
    """

    scalings = ("own",)
    first_comfyui = None
    whole = True  # `unpack` takes all rows at once: what a row's numbers depend on is not known

    def __init__(self, layout: type[QuantizedLayout]) -> None:
        self.layout = layout
        self.name = layout.__name__
        self.loader = layout.__module__
        self._planned = cache(partial(_plan, layout))

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Whatever keeps the layout from quantizing a weight of this shape, or a file from holding
        what it returns."""
        if len(weight.shape) != 2 or 0 in weight.shape:
            return f"its weight is {weight}, not a matrix"
        try:
            tensors, settings = self._planned(weight.shape)
        except (ValueError, RuntimeError, OverflowError) as error:
            return f"`{self.name}.quantize` fails on it ({type(error).__name__}: {error})"
        except CqError:
            raise
        except Exception as error:  # a mistake in the layout's own code, not in the weight's shape
            raise _failed(self.name, error) from error
        try:
            json.dumps(settings)
        except (TypeError, ValueError) as error:
            return f"`{self.name}.quantize` returns what is no plain JSON ({error})"
        strange = next((s for s in tensors.values() if s.dtype not in DTYPES), None)
        if strange is not None:
            return f"a file cannot hold {strange}"
        if tensors["weight"].is_float:
            return f"`{self.name}.quantize` returns codes in {tensors['weight'].dtype}"
        try:
            shape = self.shape(tensors, settings)
        except InputError as error:
            raise _failed(self.name, error) from error
        if shape == tensors["weight"].shape:
            return None  # which `shape` says as well if the layout looks at numbers
        if len(shape) != 2 or any(a < b for a, b in zip(shape, weight.shape, strict=True)):
            return f"`{self.name}.dequantize` makes {list(shape)} of it"
        return None

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """What `quantize` returns for a weight of this shape."""
        return dict(self._planned(weight.shape)[0])

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The layout's name, and its parameters that are not tensors."""
        return dict(self._planned(weight.shape)[1])

    def grid(self, weight: TensorSpec, scaling: str) -> None:
        """None: a layout rounds by itself."""

    def store(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `quantize` makes of the weight.

        Raises: PlanError if a parameter of the marker depends on the weight's numbers.
        """
        try:
            tensors, marker = _returned(self.layout, self.layout.quantize(weight))
        except Exception as error:  # whatever the layout's own code raises
            raise _failed(self.name, error) from error
        planned = self._planned(tuple(weight.shape))[1]
        if marker != planned:
            raise PlanError(
                f"the layout `{self.name}` returns parameters that depend on the weight and are not"
                f" tensors: {marker.get('params')}, planned as {planned.get('params')}",
                hint="return them from `quantize` as tensors",
                code="plan.layout",
            )
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """That the layout finds what it needs; ComfyUI itself does not know the format."""
        try:
            self.shape(stored, marker)
        except InputError as error:
            return [Fault("layout.tensors", f"does not fit together: {error.message}")]
        return []

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """What `dequantize` makes of tensors of these shapes; the codes' own shape if it has to see
        their numbers. Raises: InputError if a tensor is missing, or they do not fit together."""
        import torch

        empty = {
            name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta")
            for name, spec in stored.items()
        }
        qdata, params = self.layout.from_stored(empty, marker, torch.float32)
        try:
            return tuple(self.layout.dequantize(qdata, **params).shape)
        except NotImplementedError:
            return tuple(qdata.shape)
        except _FAILURES as error:
            if "meta" in str(error):
                return tuple(qdata.shape)
            raise InputError(
                f"`{self.name}.dequantize` fails on it ({type(error).__name__}: {error})",
                code="input.layout",
            ) from error

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """The whole weight, of which `rows` must be all rows."""
        import torch

        if start != 0:
            raise InternalError(f"the format `{self.name}` was asked for some rows of a weight")
        stored = {"weight": rows, **beside}
        qdata, params = self.layout.from_stored(stored, marker, torch.float32)
        return self.layout.dequantize(qdata, **params).float()


def _plan(
    layout: type[QuantizedLayout], shape: tuple[int, ...]
) -> tuple[dict[str, TensorSpec], dict[str, Any]]:
    """What a layout returns for a weight of `shape`, learnt without numbers if it lets us."""
    import torch

    try:
        found = layout.quantize(torch.empty(shape, device="meta"))
    except _FAILURES:
        # It looks at numbers. Ones have every sum, norm and quotient that it may ask for.
        found = layout.quantize(torch.ones(shape))
    tensors, marker = _returned(layout, found)
    return {name: spec_of(tensor) for name, tensor in tensors.items()}, marker


def _returned(layout: Any, found: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `quantize` returned, as a file holds it."""
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise TypeError(f"it returned {type(found).__name__}, not a pair of codes and parameters")
    stored: tuple[dict[str, torch.Tensor], dict[str, Any]] = layout.to_stored(*found)
    return stored


def _failed(name: str, error: Exception) -> PlanError:
    return PlanError(
        f"the layout `{name}` fails: {type(error).__name__}: {error}",
        hint="its `quantize` and `dequantize` are class methods: `quantize(cls, tensor)` returns"
        " codes and a dict of parameters, `dequantize(cls, qdata, **parameters)` the floats",
        code="plan.layout",
    )


@cache
def format_of(layout: Any) -> LayoutFormat:
    """The storage format of a layout; the same object every time.

    Its class is made for it, so that `cq plugins` tells the layout's module as its origin.
    """
    kind = type(layout.__name__, (LayoutFormat,), {"__module__": layout.__module__})
    found: LayoutFormat = kind(layout)
    return found


def load_plugin(name: str) -> tuple[str, ...]:
    """Import a module, by its name or the path of a `.py` file, and register the formats it brings:
    every `QuantizedLayout` that it defines, and its `PLUG`. The names of the formats.

    Only for names that a person gave on the command line or in a program: importing runs code.

    Raises: InputError if there is no such file, PlanError if the module cannot be imported, brings
    no format, or one whose name is taken.
    """
    module = _module(name)
    found: dict[str, Any] = {}
    for value in vars(module).values():
        defined = inspect.isclass(value) and value.__module__ == module.__name__
        if defined and getattr(value, "registered", False) is True and hasattr(value, "as_plug"):
            found[value.__name__] = value.as_plug()
    plug = getattr(module, "PLUG", None)
    if isinstance(plug, Format):
        found[plug.name] = plug
    if not found:
        raise PlanError(
            f"the plugin `{name}` brings no format",
            hint="define a subclass of `cq.layouts.QuantizedLayout`, or a `PLUG`",
            code="plan.plugin",
        )
    for own, one in found.items():
        catalog.register("formats", own, one)
    return tuple(found)


def _module(name: str) -> ModuleType:
    try:
        if name.endswith(".py") or os.sep in name:
            return _from_file(Path(name).absolute(), name)
        return importlib.import_module(name)
    except (PlanError, InputError):
        raise
    except Exception as error:  # whatever the plugin's own code raises
        raise PlanError(
            f"the plugin `{name}` cannot be imported: {type(error).__name__}: {error}",
            hint="mend the module, or name its file as `./FILE.py`",
            code="plan.plugin",
        ) from error


def _from_file(path: Path, shown: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no plugin `{shown}`", hint="name a `.py` file or a module")
    known = sys.modules.get(path.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        raise PlanError(
            f"the plugin `{shown}` has the name of the module `{path.stem}`, which is imported"
            " already",
            hint="rename the file",
            code="plan.plugin",
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
