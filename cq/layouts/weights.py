"""A layer's stored tensors as a quantized weight: the one way from a file to the run time.

Owns what is checked on that way. Knows no file and no module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cq.core.dtypes import TensorSpec, spec_of
from cq.core.errors import CqError, InputError
from cq.core.formats import Format
from cq.core.stored import SMOOTHING, format_of
from cq.core.text import printable
from cq.layouts.registry import layout_named, registered_layouts

if TYPE_CHECKING:
    import torch

    from cq.layouts.tensor import QuantizedTensor

_BYTES = frozenset({"I8", "U8"})
# Of what ComfyUI would trip over, what would fail here as well, at the first use.
_UNUSABLE = frozenset({"convrot.group", "group.size", "codebook.shape", "marker.linear_dtype"})


def quantized_weight(
    layer: str,
    stored: Mapping[str, torch.Tensor],
    marker: Mapping[str, Any],
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> QuantizedTensor:
    """The weight of `layer`, of the model's `shape` and showing `dtype`.

    `stored` are the tensors by local name, `weight` among them; `marker` names the format. What a
    format does not know, such as `input_scale`, is left out.

    Raises: InputError naming the layer for an unknown format, a missing or misfit tensor, or a
    shape that is not the model's.
    """
    from cq.layouts.tensor import QuantizedTensor

    name = marker.get("format")
    if not isinstance(name, str):
        raise _bad(layer, "has a marker that names no `format`")
    try:
        layout = layout_named(_layout_name(name))
        own = {n: t for n, t in stored.items() if n == "weight" or _matters(n)}
        qdata, params = layout.from_stored(own, marker, dtype)
    except CqError as error:
        raise _bad(layer, f"cannot be read as `{name}`: {error.message}", error.hint) from error
    plug: Format | None = getattr(layout, "plug", None)
    specs = {local: spec_of(tensor) for local, tensor in own.items()}
    if plug is not None:
        _see_fit(layer, plug, specs, marker, shape)
    found = QuantizedTensor(qdata, layout, params, shape=shape, dtype=dtype)
    if plug is None:
        _see_decodes(layer, found)
    return found


def _layout_name(label: str) -> str:
    if any(layout.__name__ == label for layout in registered_layouts()):
        return label
    return format_of(label) or label


def _matters(local: str) -> bool:
    """Whether a tensor beside the weight is part of its value."""
    return local == SMOOTHING or (local.startswith("weight_") and local != "weight_scalar")


def _see_fit(
    layer: str,
    plug: Format,
    specs: Mapping[str, TensorSpec],
    marker: Mapping[str, Any],
    shape: tuple[int, ...],
) -> None:
    """The codes are those of a weight of `shape`: nothing else tells padding from columns."""
    stored = specs["weight"]
    if len(shape) not in {2, 3}:
        raise _bad(layer, f"is quantized, and the model's weight is {len(shape)}-D")
    stack, matrix = (shape[:1], shape[1:]) if len(shape) == 3 else ((), shape)
    wanted = [
        plug.tensors(TensorSpec("F32", matrix), scaling)["weight"] for scaling in plug.scalings
    ]
    inner = {n: TensorSpec(s.dtype, s.shape[1:]) if stack else s for n, s in specs.items()}
    fits = stored.shape in {(*stack, *w.shape) for w in wanted}
    if not fits and plug.shape(inner, marker) != matrix:
        raise _bad(
            layer,
            f"stores a weight of shape {list(stored.shape)} as `{plug.name}`, which is not how the"
            f" model's {list(shape)} is stored",
        )
    for slug, sentence in plug.check(inner, marker):
        if slug in _UNUSABLE:
            raise _bad(layer, sentence)
    dtypes = {w.dtype for w in wanted}
    if stored.dtype in dtypes:
        return
    # Packed codes are bytes whatever they are called; of single codes the sign would be lost.
    if stored.dtype in _BYTES and dtypes <= _BYTES and stored.shape[-1] != shape[-1]:
        return
    raise _bad(layer, f"stores its weight as {stored.dtype}; `{plug.name}` is {wanted[0].dtype}")


def _see_decodes(layer: str, weight: QuantizedTensor) -> None:
    """A layout of somebody else's says only by `dequantize` what shape its codes stand for."""
    value = weight._with(lambda tensor: tensor.to("meta"))
    try:
        found = tuple(value.layout_class.dequantize(value._qdata, **value._layout_params).shape)
    except NotImplementedError:
        return  # it looks at numbers; the first use will tell
    except Exception as error:  # whatever the layout's own code raises
        if "meta" in str(error):
            return
        said = f"{type(error).__name__}: {printable(str(error))}"
        raise _bad(layer, f"cannot be read as `{weight._layout_type}` ({said})") from error
    if len(found) != weight.ndim or any(a < b for a, b in zip(found, weight.shape, strict=True)):
        raise _bad(
            layer,
            f"holds a weight of shape {list(found)} as `{weight._layout_type}`; the model has"
            f" {list(weight.shape)}",
        )


def see_floats(layer: str, weight: TensorSpec) -> None:
    """See that a weight without a marker holds numbers, not codes.

    Raises: InputError if not. Plain FP8 casts, which many models are distributed as, are numbers.
    """
    if not weight.is_float and not weight.dtype.startswith("F8_"):
        raise _bad(
            layer,
            f"stores its weight as {weight.dtype} and no marker says what the codes mean",
            "quantize the original checkpoint again, with markers",
        )


def _bad(layer: str, what: str, hint: str | None = None) -> InputError:
    return InputError(f"the layer `{layer}` {what}", where=layer, hint=hint, code="input.layer")
