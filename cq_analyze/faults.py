"""What values must not be, and what a task that reads them tells.

Owns the outcome of a task, and the counting of values that are not finite and of scales that are
none. Torch only inside functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq.core.dtypes import DTYPES
from cq_analyze.metrics import Sums
from cq_analyze.outputs import OutputError
from cq_analyze.report import Comparison, Finding, finding
from cq_analyze.survival import Survival

if TYPE_CHECKING:
    import torch

BYTES_METRICS = 4 << 20  # what sums over a segment hold beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one task found: of a layer (then `layer` names it) or of plain tensors (`compared`)."""

    findings: tuple[Finding, ...] = ()
    layer: str | None = None
    fidelity: Sums | None = None
    survival: Survival | None = None
    output: OutputError | None = None
    compared: tuple[Comparison, ...] = ()


def may_be_nonfinite(dtype: str) -> bool:
    return DTYPES[dtype].is_float or dtype.startswith("F8_")


def nonfinite(tensor: torch.Tensor) -> int:
    """Number of NaN and infinite elements."""
    import torch

    if tensor.element_size() == 1:
        tensor = tensor.float()
    # One pass in the usual case; a sum that overflows costs the exact count.
    if math.isfinite(float(tensor.sum())):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


class ScaleFault:
    """Counts what a scale must not be, segment by segment."""

    def __init__(self) -> None:
        self._nonfinite = 0
        self._not_positive = 0

    def add(self, scale: torch.Tensor) -> None:
        """Count in `scale`. Block scales, which have fewer bits, are zero for equal weights."""
        self._nonfinite += nonfinite(scale)
        bad = scale.float() < 0 if scale.element_size() < 4 else scale <= 0
        self._not_positive += int(bad.sum())

    def finding(self, name: str) -> Finding | None:
        """The finding about the tensor `name`, if there is one."""
        counts = [
            (self._nonfinite, "not finite"),
            (self._not_positive, "zero or negative"),
        ]
        told = " and ".join(f"{count} that are {what}" for count, what in counts if count)
        layer, _, own = name.rpartition(".")
        return finding("scale.value", layer, f"has scales in `{own}`, {told}") if told else None
