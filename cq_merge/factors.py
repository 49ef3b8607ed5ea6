"""What adapter files hold: scalars, read without torch while planning, and factors.

Owns the promise that no non-finite number of an adapter reaches a weight.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

from cq.core.errors import InputError, PlanError
from cq.core.source import Source
from cq.core.text import printable

if TYPE_CHECKING:
    import torch

_SCALAR_CODES = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}
# Small adapters are also published in plain 8-bit floats, which convert without a scale.
_FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


def scalar(source: Source, name: str) -> float:
    """The one number that the tensor `name` holds, read without torch.

    Raises: InputError if it holds more than one, is of a dtype that no scalar has, or not finite.
    """
    file = source.owner[name]
    entry = file.header.entries[name]
    spec = entry.spec
    if spec.numel != 1 or (spec.dtype != "BF16" and spec.dtype not in _SCALAR_CODES):
        raise InputError(
            f"tensor `{printable(name)}` of `{source.shown}` is {spec}, not one number",
            where=source.shown,
            code="input.adapter_scalar",
        )
    raw = bytearray(spec.nbytes)
    file.read_into(memoryview(raw), file.header.data_start + entry.start, tensor=name)
    if spec.dtype == "BF16":  # the upper half of a float32
        value = struct.unpack("<f", b"\0\0" + bytes(raw))[0]
    else:
        value = struct.unpack(_SCALAR_CODES[spec.dtype], raw)[0]
    if not math.isfinite(value):
        raise _nonfinite(source, name)
    return float(value)


def check_dtype(source: Source, name: str) -> None:
    """Check that a factor is made of floating-point numbers. Raises: PlanError if not."""
    spec = source.spec(name)
    if spec.dtype not in _FACTOR_DTYPES:
        raise PlanError(
            f"tensor `{printable(name)}` of `{source.shown}` is {spec}, not floating point",
            where=source.shown,
            code="plan.adapter_dtype",
        )


def matrix(
    source: Source, name: str, dtype: torch.dtype, *, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Rows `start` to `stop` of a factor in `dtype`.

    Shapes: `(N, a, b, ...)` comes as `(stop - start, a * b * ...)`.

    Raises: InputError naming file and tensor if a value is not finite.
    """
    spec = source.spec(name)
    last = spec.shape[0] if stop is None else stop
    rows = source.owner[name].rows(name, start, last).to(dtype)
    if not all_finite(rows):
        raise _nonfinite(source, name)
    return rows.view(last - start, spec.row_numel)


def all_finite(tensor: torch.Tensor, *, stored_as: torch.dtype | None = None) -> bool:
    """Whether every value is finite, also after a cast to `stored_as`.

    One reduction without a temporary: the extremes carry any NaN, and as rounding is monotonic, the
    cast overflows exactly if it overflows for one of them.
    """
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    if stored_as is not None:
        low, high = low.to(stored_as), high.to(stored_as)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _nonfinite(source: Source, name: str) -> InputError:
    return InputError(
        f"tensor `{printable(name)}` of `{source.shown}` holds NaN or infinite values",
        where=source.shown,
        hint="the adapter is damaged, or its training diverged",
        code="input.nonfinite",
    )
