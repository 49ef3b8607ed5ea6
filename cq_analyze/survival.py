"""What remains of a LoRA, or of any other change, after quantization.

For a base b, the changed weight w and the decoded value v, with the change d = w - b:

    share   sum (v - b) d / sum d^2      1: the change is there in full; 0: rounding swallowed it
    SNR     10 log10(sum d^2 / sum (v - w)^2)   dB; the change against what rounding adds

Sums in float64 that add up over segments. Owns no file, format or threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq_analyze.metrics import finite

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 14  # as in `metrics`: below what torch splits among threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """The sums over triples of elements from which share and SNR follow."""

    change_energy: float = 0.0
    kept: float = 0.0
    error_energy: float = 0.0

    @property
    def share(self) -> float | None:
        """The projection of what is left of the change on the change; None if nothing changed."""
        return self.kept / self.change_energy if self.change_energy > 0 else None

    @property
    def snr(self) -> float | None:
        """The change against the error of rounding.

        Units: dB; infinite without error, None if nothing changed.
        """
        if not self.change_energy > 0:
            return None
        if self.error_energy == 0:
            return math.inf
        return 10.0 * (math.log10(self.change_energy) - math.log10(self.error_energy))

    def to_dict(self) -> dict[str, object]:
        """As plain JSON."""
        return {"share": finite(self.share), "snr_db": finite(self.snr)}


def together(several: Iterable[Survival]) -> Survival:
    """The sums over all triples of `several`.

    >>> one = Survival(change_energy=1.0, kept=1.0, error_energy=0.5)
    >>> together([one, Survival(change_energy=3.0)]).share
    0.25
    """
    every = list(several)
    return Survival(
        change_energy=math.fsum(s.change_energy for s in every),
        kept=math.fsum(s.kept for s in every),
        error_energy=math.fsum(s.error_energy for s in every),
    )


def survival(base: torch.Tensor, changed: torch.Tensor, value: torch.Tensor) -> Survival:
    """The sums over three arrays of one shape and any real dtypes."""
    assert base.shape == changed.shape == value.shape
    flat = [tensor.reshape(-1) for tensor in (base, changed, value)]
    blocks = []
    for start in range(0, flat[0].numel(), _BLOCK_ELEMENTS):
        b, w, v = (tensor[start : start + _BLOCK_ELEMENTS].double() for tensor in flat)
        d, e = w - b, v - w
        blocks.append(
            Survival(
                change_energy=float((d * d).sum()),
                kept=float((v - b).mul_(d).sum()),
                error_energy=float((e * e).sum()),
            )
        )
    return together(blocks)
