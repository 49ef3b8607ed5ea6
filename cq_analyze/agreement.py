"""comfy-kitchen's decoding beside ours: what ComfyUI computes with must be what `verify` measures.

Owns the comparison of decoded row segments, and how a layer's scales are cut to a segment. Where
comfy-kitchen is not installed, or `CQ_KITCHEN=0` leaves it out, nothing is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from cq.core.packing import round_up
from cq.core.stored import SMOOTHING, Stored, matrix_specs
from cq.layouts import kitchen
from cq_analyze.report import Finding, finding

if TYPE_CHECKING:
    import torch

# Of the largest magnitude: sums of a rotation may be taken in another order.
_TOLERANCE = 1e-5
_TILE = 128
_SWIZZLED = frozenset({"nvfp4", "mxfp8"})
_TRANSPOSED = frozenset({"awq_w4a16"})
_WHOLE = frozenset({"weight_codebook"})


def version() -> str | None:
    """The version of comfy-kitchen that is used, None if none is."""
    if kitchen.tensors() is None:
        return None
    try:
        return metadata.version("comfy-kitchen")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "unknown"


class Agreement:
    """Compares one layer's decoded segments with comfy-kitchen's as they come: the first and the
    last of each matrix, which differ from the others by no more than where they lie."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._worst = 0.0
        self._largest = 0.0
        self._failed: str | None = None
        self._compares = kitchen.has_twin(stored.format.name)
        self._rows = matrix_specs({"weight": stored.weight})["weight"].shape[0]

    def wants(self, start: int, rows: int) -> bool:
        """Whether the segment is the first or the last, and there is anything to compare with."""
        if not self._compares or self._failed is not None:
            return False
        return start == 0 or start >= self._rows - rows

    def see(
        self,
        packed: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        value: torch.Tensor,
    ) -> None:
        """Compare the rows from `start` on: `packed` as stored, `value` as we decode them."""
        import torch

        if not value.numel():
            return
        try:
            other = self._decoded(packed, start, beside, value)
        except Exception as error:  # whatever another library raises is what is to be reported
            self._failed = f"{type(error).__name__}: {error}"
            return
        largest = float(value.abs().amax())
        self._largest = max(self._largest, largest if math.isfinite(largest) else 0.0)
        if torch.equal(other, value):  # the usual case, and cheap
            return
        other = other.float()
        # NaN in both is what both decode; that it is there is told of the values.
        alike = (other == value) | (other.isnan() & value.isnan())
        difference = (other - value).abs_().masked_fill_(alike, 0.0)
        worst = float(difference.amax())
        self._worst = max(self._worst, worst if math.isfinite(worst) else math.inf)

    def _decoded(
        self,
        packed: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        value: torch.Tensor,
    ) -> torch.Tensor:
        import torch

        from cq.layouts.formats import layout_of
        from cq.layouts.tensor import QuantizedTensor

        params: dict[str, Any] = {
            name: self._cut(name, tensor, start, packed.shape[0])
            for name, tensor in beside.items()
            if name != SMOOTHING
        }
        params |= {"marker": dict(self._stored.settings), "orig_dtype": torch.float32}
        layout = layout_of(self._stored.format.name)
        weight = QuantizedTensor(packed, layout, params, shape=tuple(value.shape))
        found: torch.Tensor = kitchen.twin(weight).dequantize()
        return found[: value.shape[0], : value.shape[1]]

    def _cut(self, name: str, tensor: torch.Tensor, start: int, rows: int) -> torch.Tensor:
        """The scales of rows `start` to `start + rows`."""
        if tensor.numel() <= 1 or name in _WHOLE:
            return tensor
        if self._stored.format.name in _TRANSPOSED:
            return tensor[:, start : start + rows]
        if self._stored.format.name in _SWIZZLED:
            rows = round_up(rows, _TILE)
        return tensor[start : start + rows]

    def finding(self) -> Finding | None:
        """What came of it."""
        layer = self._stored.layer
        if self._failed is not None:
            told = f"cannot be decoded by comfy-kitchen: {self._failed[:200]}"
            return finding("kitchen.disagrees", layer, told)
        if self._worst <= _TOLERANCE * self._largest:
            return None
        told = f"is decoded otherwise by comfy-kitchen: values differ by up to {self._worst:.3g}"
        return finding("kitchen.disagrees", layer, f"{told}, the largest is {self._largest:.3g}")
