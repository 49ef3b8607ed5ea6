"""How a linear and an embedding run on the layouts of storage formats.

Owns the choice: comfy-kitchen's kernels where it is installed, the int8 product in plain PyTorch,
else the float weight; and the gradient, which goes through the float weight in any case.

Source: the arithmetic of the int8 product is comfy-kitchen's, `backends/eager/quantization.py`
(`int8_linear`, `quantize_int8_rowwise`, `dequantize_int8_embedding`), bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

from cq.core import rotation
from cq.core.dtypes import spec_of
from cq.core.formats.int8_tensorwise import convrot_group
from cq.core.stored import SMOOTHING
from cq.layouts import kitchen
from cq.layouts.formats import FormatLayout
from cq.layouts.registry import register_layout_op
from cq.layouts.tensor import QuantizedTensor, floats

aten = torch.ops.aten

Product = Callable[[torch.Tensor, QuantizedTensor, torch.Tensor | None], torch.Tensor]

_INT8 = "int8_tensorwise"
_SMALLEST_SCALE = 1e-30
_CHUNK_ELEMENTS = 1 << 24  # of a product, that float32 scales are spread over at a time
_EXACT_COLUMNS = 1024  # products of int8 numbers summed exactly in float32: 2^14 x 2^10 = 2^24
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8  # what cuBLASLt's int8 product asks of shapes


@register_layout_op(aten.linear.default, FormatLayout)
def linear(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x W^T + b` for a weight in a storage format.

    With comfy-kitchen, its kernel; `int8_tensorwise` without it and on CPUs, an integer product
    with the activations quantized to int8, a scale for each row; else, and where the marker asks
    for `full_precision_matrix_mult`, a float product with the float weight.
    """
    x, weight, bias = (*args, None)[:3]
    x, bias = floats((x, bias))
    product = _product(x, weight) if isinstance(weight, QuantizedTensor) else None
    if product is None:
        return functional.linear(x, floats(weight), bias)
    smoothing = weight._layout_params.get(SMOOTHING)
    if smoothing is not None:
        x = x * smoothing.to(x.dtype).reshape(-1)
    if torch.is_grad_enabled() and x.requires_grad:
        value: torch.Tensor = _ThroughFloats.apply(x, weight, product)  # type: ignore[no-untyped-call]
        return value if bias is None else value + bias.to(value.dtype)
    return product(x, weight, bias)


def _product(x: torch.Tensor, weight: QuantizedTensor) -> Product | None:
    """What computes with the codes; None for the float weight."""
    if weight._layout_params["marker"].get("full_precision_matrix_mult"):
        return None
    # On a CPU ours is equal to the last bit, and faster: comfy-kitchen copies the weight each time.
    if kitchen.runs(x, weight) and not (weight._layout_type == _INT8 and x.device.type == "cpu"):
        return kitchen.linear
    return int8_linear if weight._layout_type == _INT8 else None


class _ThroughFloats(torch.autograd.Function):
    """A quantized product whose gradient is that of the float weight: rounding has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedTensor, product: Product) -> Any:
        ctx.weight = weight
        return product(x, weight, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight = ctx.weight.dequantize().to(gradients[0].dtype)
        return gradients[0] @ weight, None, None


def int8_linear(
    x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product of an `int8_tensorwise` weight with activations that are rounded to int8.

    Activations are rotated as the weight is, in their own dtype; each row is rounded to
    absmax / 127; the integer sums, which are exact, are scaled in float32 and cast to the
    activations' dtype; the bias is added in that.

    Shapes: x `(..., K)`, weight `(N, K)`, bias `(N,)`; the result is `(..., N)`.
    """
    params = weight._layout_params
    codes, group = weight._qdata, convrot_group(params["marker"])
    scale = params["weight_scale"].float().reshape(1, -1)
    if group is not None:
        h = rotation.hadamard(group).to(device=x.device, dtype=x.dtype)
        x = torch.matmul(x.reshape(-1, x.shape[-1] // group, group), h).reshape(x.shape)
    rounded, row_scale = _rounded_rows(x.reshape(-1, x.shape[-1]))
    sums = int8_product(rounded, codes)
    value = torch.empty(sums.shape, dtype=x.dtype, device=x.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, sums.shape[1]))
    for start in range(0, sums.shape[0], step):
        rows = slice(start, start + step)
        value[rows] = sums[rows].float().mul_(row_scale[rows] * scale)
    if bias is not None:
        value += bias.to(value.dtype)
    return value.reshape(*x.shape[:-1], codes.shape[0])


def _rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales `(rows, 1)`. Division is in x's dtype, as in comfy-kitchen."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127.0).clamp_(min=_SMALLEST_SCALE)
    divisor = scale.to(x.dtype)
    divisor = torch.where(divisor == 0, torch.finfo(x.dtype).tiny, divisor)
    return (x / divisor).round_().clamp_(-128, 127).to(torch.int8), scale


def int8_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The exact `left right^T` of int8 matrices.

    Shapes: `(M, K)` and `(N, K)` to int32 `(M, N)`.
    """
    rows, columns = left.shape[0], right.shape[0]
    if left.is_cuda:
        left = _padded(left, max(_CUDA_ROWS, rows), _CUDA_MULTIPLE)
        right = _padded(right, -(-columns // _CUDA_MULTIPLE) * _CUDA_MULTIPLE, _CUDA_MULTIPLE)
    elif left.device.type != "cpu" or left.shape[1] == 1:
        # Other devices have no such product, and that of CPUs is wrong for one column (torch 2.13).
        return _summed_in_floats(left, right)
    # An internal name, the only one that PyTorch has for this product.
    return torch._int_mm(left, right.t())[:rows, :columns]


def _padded(matrix: torch.Tensor, rows: int, multiple: int) -> torch.Tensor:
    missing = -matrix.shape[1] % multiple, rows - matrix.shape[0]
    return functional.pad(matrix, (0, missing[0], 0, missing[1])) if any(missing) else matrix


def _summed_in_floats(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same for devices without an int8 product: float32 sums over as many columns as stay
    exact, added as integers."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for start in range(0, left.shape[1], _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        total += (left[:, columns].float() @ right[:, columns].float().t()).int()
    return total


@register_layout_op(aten.embedding.default, FormatLayout)
def embedding(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of an embedding table, of which only those that are asked for are dequantized.

    Shapes: table `(V, D)`, indices of any shape; the result is `(*indices.shape, D)`.
    """
    table, indices, *_ = args
    if not (isinstance(table, QuantizedTensor) and _holds_rows(table)):
        return operation(*floats(args), **floats(kwargs))
    flat, (count, width) = indices.reshape(-1), table.shape
    if not flat.numel():
        return table._qdata.new_empty((*indices.shape, width), dtype=table.dtype)
    params = {
        name: _rows(value, flat)
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == count > 1
        else value
        for name, value in table._layout_params.items()
    }
    found = table.layout_class.dequantize(_rows(table._qdata, flat), **params)
    return found.to(table.dtype).reshape(*indices.shape, width)


def _holds_rows(table: QuantizedTensor) -> bool:
    """Whether each row is stored by itself: in formats that ComfyUI takes for embedding tables."""
    plug = getattr(table.layout_class, "plug", None)
    return bool(plug is not None and plug.embeddings and spec_of(table._qdata).shape == table.shape)


def _rows(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    # Looked up as bytes, which every device has; an index out of range is PyTorch's own error.
    raw = values.contiguous().view(torch.int8).reshape(values.shape[0], -1)
    found = functional.embedding(indices, raw).view(values.dtype)
    return found.reshape(indices.shape[0], *values.shape[1:])
