"""The one dtype table, and `TensorSpec`: what is known of a tensor before a byte of it is read.

Source: safetensors' `Dtype` enum (`safetensors/src/tensor.rs`). The enum's order matters: its
writer sorts tensors by it, descending, then by name, and `cq.core.header` must lay files out in the
same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cq.core.errors import ResourceError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """One safetensors dtype: its header name, size in bits, torch attribute and place in the file
    order."""

    name: str
    bits: int
    torch_name: str | None
    rank: int
    is_float: bool


def _table() -> dict[str, DType]:
    # (name, bits, torch attribute, usable as ordinary floating-point weights), in safetensors' enum
    # order.
    rows = [
        ("BOOL", 8, "bool", False),
        ("F4", 4, None, False),
        ("F6_E2M3", 6, None, False),
        ("F6_E3M2", 6, None, False),
        ("U8", 8, "uint8", False),
        ("I8", 8, "int8", False),
        ("F8_E5M2", 8, "float8_e5m2", False),
        ("F8_E4M3", 8, "float8_e4m3fn", False),
        ("F8_E8M0", 8, "float8_e8m0fnu", False),
        ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", False),
        ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", False),
        ("I16", 16, "int16", False),
        ("U16", 16, "uint16", False),
        ("F16", 16, "float16", True),
        ("BF16", 16, "bfloat16", True),
        ("I32", 32, "int32", False),
        ("U32", 32, "uint32", False),
        ("F32", 32, "float32", True),
        ("C64", 64, "complex64", False),
        ("F64", 64, "float64", True),
        ("I64", 64, "int64", False),
        ("U64", 64, "uint64", False),
    ]
    return {
        name: DType(name, bits, torch_name, rank, is_float)
        for rank, (name, bits, torch_name, is_float) in enumerate(rows)
    }


DTYPES: dict[str, DType] = _table()


@dataclass(frozen=True)  # no slots: sizes are computed once, of a spec that many tensors share
class TensorSpec:
    """Dtype and shape of a tensor. A linear layer's weight has shape `(N out, K in)`.

    >>> TensorSpec("BF16", (3072, 64)).nbytes
    393216
    """

    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @cached_property
    def is_float(self) -> bool:
        """Whether the values are ordinary floating-point numbers (F16, BF16, F32, F64)."""
        return DTYPES[self.dtype].is_float

    @cached_property
    def row_numel(self) -> int:
        """Elements per row, a row being one index of dimension 0; 1 for a 0-d tensor."""
        return math.prod(self.shape[1:])

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that stores the safetensors dtype `name`."""
    import torch

    attribute = DTYPES[name].torch_name
    found = getattr(torch, attribute, None) if attribute else None
    if found is None:
        raise ResourceError(
            f"this torch ({torch.__version__}) has no dtype for `{name}`",
            hint="install a newer torch, or leave tensors of this dtype untouched",
            code="resource.dtype",
        )
    assert isinstance(found, torch.dtype)
    return found


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a torch tensor. A dtype that no file can hold keeps torch's name for it."""
    attribute = str(tensor.dtype).removeprefix("torch.")
    name = next((d.name for d in DTYPES.values() if d.torch_name == attribute), attribute)
    return TensorSpec(name, tuple(tensor.shape))
