"""The storage formats of the catalogue as layouts, each under its format's name.

Owns how a format quantizes and dequantizes a tensor at run time. Which numbers are chosen is the
format's grid and the optimizer `rtn`, which codes mean what is `Format.unpack`: nothing of a format
is repeated here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import torch

from cq.core import catalog, rotation
from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import InputError, PlanError
from cq.core.formats import Format
from cq.core.rounding import stored_tensors
from cq.core.source import cuts
from cq.core.stored import SMOOTHING
from cq.layouts.registry import QuantizedLayout

_PLAIN = frozenset({"marker", "orig_dtype"})


class FormatLayout(QuantizedLayout, registered=False):
    """The base of every format's layout. The parameters are the stored tensors beside `weight`, by
    their local names, the layer's `marker`, and `orig_dtype`."""

    plug: ClassVar[Format]

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        *,
        scaling: str | None = None,
        group: int | None = None,
        search: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Round to nearest, as `cq quant --optimizer rtn` does.

        `scaling` None is the format's default. `group` is the rotation group; a format that is
        always rotated takes the largest that divides K by itself. `search` chooses scales of least
        error where the format can.

        Raises: PlanError if the format cannot store the tensor so, or the tensor is not finite.
        """
        if kwargs:
            raise PlanError(
                f"the layout `{cls.__name__}` has no option `{next(iter(kwargs))}`",
                hint="it has `scaling`, `group` and `search`",
                code="plan.layout",
            )
        plug, spec = cls.plug, spec_of(tensor)
        scaling = cls._scaling(scaling)
        group = cls._group(spec, group)
        reason = (
            f"it is {spec.dtype}, not floating point"
            if not spec.is_float
            else plug.refuse(spec, scaling, group)
        )
        if reason is None and not bool(torch.isfinite(tensor).all()):
            reason = "it holds values that are not finite"
        if reason is not None:
            raise PlanError(
                f"a tensor {spec} cannot be held as `{plug.name}`: {reason}", code="plan.layout"
            )
        stored = _store(plug, tensor.cpu(), scaling, group, search=search)
        params: dict[str, Any] = {
            name: value.to(tensor.device) for name, value in stored.items() if name != "weight"
        }
        params["marker"] = plug.marker(spec, scaling, group)
        params["orig_dtype"] = tensor.dtype
        return stored["weight"].to(tensor.device), params

    @classmethod
    def _scaling(cls, scaling: str | None) -> str:
        if scaling is None:
            return cls.plug.scalings[0]
        if scaling not in cls.plug.scalings:
            raise PlanError(
                f"format `{cls.plug.name}` has no scaling `{scaling}`",
                hint="it has " + " and ".join(f"`{s}`" for s in cls.plug.scalings),
                code="plan.scaling",
            )
        return scaling

    @classmethod
    def _group(cls, weight: TensorSpec, group: int | None) -> int | None:
        if cls.plug.rotation == "never" and group is not None:
            raise PlanError(f"the format `{cls.plug.name}` is never rotated", code="plan.rotate")
        if group is not None and not rotation.is_group(group):
            raise PlanError(
                f"a rotation group must be a power of 4, not {group}", code="plan.rotation"
            )
        if cls.plug.rotation == "always" and group is None and len(weight.shape) == 2:
            return rotation.group_for(weight.shape[1], rotation.GROUPS[0])
        return group

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, **params: Any) -> torch.Tensor:
        """The weight in `orig_dtype`, with padding; computed in float32, segment by segment."""
        marker, dtype = params["marker"], params["orig_dtype"]
        smoothing = params.pop(SMOOTHING, None)
        if smoothing is not None:  # activations are multiplied by it, so the weight's columns are
            plain = cls.dequantize(qdata, **{**params, "orig_dtype": torch.float32})
            columns = smoothing.numel() if smoothing.numel() > 1 else plain.shape[-1]
            value: torch.Tensor = plain[..., :columns] * smoothing.float().reshape(-1)
            return value.to(dtype)
        beside = {name: value for name, value in params.items() if name not in _PLAIN}
        if qdata.ndim == 3:  # stacked experts: every tensor has a leading E
            return torch.stack(
                [
                    _unpacked(
                        cls.plug, qdata[i], {n: t[i] for n, t in beside.items()}, marker, dtype
                    )
                    for i in range(qdata.shape[0])
                ]
            )
        return _unpacked(cls.plug, qdata, beside, marker, dtype)

    @classmethod
    def to_stored(
        cls, qdata: torch.Tensor, params: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors as they are, and the marker."""
        beside = {name: value for name, value in params.items() if name not in _PLAIN}
        return {"weight": qdata, **beside}, dict(params["marker"])

    @classmethod
    def from_stored(
        cls,
        stored: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The tensors as they are. Raises: InputError if they do not fit together."""
        if "weight" not in stored:
            raise InputError("there is no `weight`", code="input.layout")
        specs = {name: spec_of(tensor) for name, tensor in stored.items()}
        if stored["weight"].ndim == 3:
            specs = {n: TensorSpec(s.dtype, s.shape[1:]) for n, s in specs.items()}
        smoothing = specs.pop(SMOOTHING, None)
        columns = cls.plug.shape(specs, marker)[-1]
        if smoothing is not None and not smoothing.numel <= columns:
            raise InputError(
                f"a `{SMOOTHING}` of shape {list(smoothing.shape)} does not fit K={columns}",
                code="input.scale",
            )
        beside = {name: value for name, value in stored.items() if name != "weight"}
        return stored["weight"], {**beside, "marker": dict(marker), "orig_dtype": dtype}


@cache
def layout_of(name: str) -> type[QuantizedLayout]:
    """The layout of the format `name`; the layout itself if the format was made of one.

    Raises: PlanError for a plain dtype, which needs none.
    """
    importlib.import_module("cq.layouts.operations")  # registers what runs on every format
    plug: Format = catalog.load("formats", name)
    own: type[QuantizedLayout] | None = getattr(plug, "layout", None)
    if own is not None:
        return own
    if plug.casts:
        raise PlanError(
            f"`{name}` is a plain dtype, not a quantized layout",
            hint="cast the tensor with `.to(dtype)`",
            code="plan.layout",
        )
    return type(name, (FormatLayout,), {"plug": plug, "__doc__": plug.__doc__}, registered=False)


def _store(
    plug: Format, weight: torch.Tensor, scaling: str, group: int | None, *, search: bool
) -> dict[str, torch.Tensor]:
    """The stored tensors of a whole weight, chosen segment by segment as `cq quant` chooses."""
    spec = spec_of(weight)

    def segments() -> Iterator[torch.Tensor]:
        for start, stop in cuts(spec):
            rows = weight[start:stop].float()
            yield rows if group is None else rotation.rotate(rows, group)

    fit = catalog.load("optimizers", "rtn").fit
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in stored_tensors(plug, spec, scaling, segments, fit, search=search):
        found.setdefault(name, []).append(tensor)
    return {name: t[0] if len(t) == 1 else torch.cat(t) for name, t in found.items()}


def _unpacked(
    plug: Format,
    qdata: torch.Tensor,
    beside: Mapping[str, torch.Tensor],
    marker: Mapping[str, Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    whole = plug.whole
    spans = [(0, qdata.shape[0])] if whole else cuts(spec_of(qdata))
    # Formats make their tables on the default device.
    value: torch.Tensor | None = None
    with torch.device(qdata.device):
        for start, stop in spans:
            rows = plug.unpack(qdata[start:stop], start, beside, marker)
            if stop - start == qdata.shape[0]:
                return rows.to(dtype)
            if value is None:
                value = torch.empty(qdata.shape[0], *rows.shape[1:], dtype=dtype)
            value[start:stop] = rows
    assert value is not None, "a quantized weight has rows"
    return value
