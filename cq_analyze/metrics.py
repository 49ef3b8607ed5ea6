"""How near one array is to another: sums that add up over segments, and what follows from them.

For a reference w and a value v with the error e = v - w:

    SQNR            10 log10(sum w^2 / sum e^2)      dB; infinite for equal arrays
    relative error  sqrt(sum e^2 / sum w^2)          0 for equal arrays
    cosine          sum wv / sqrt(sum w^2 sum v^2)
    mean shift      sum e / n                        what rounding adds to every weight on average

All sums are float64. Owns no file, format or threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Sums must not depend on how many threads there are. So they are of rows: torch splits rows among
# threads, never a row; and no BLAS dot products, whose order of summation differs. Several rows at
# a time, since workers wait for each other between the steps.
_ROW, _ROWS = 1 << 14, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """The sums over pairs of elements from which every metric follows."""

    count: int = 0
    reference_energy: float = 0.0
    value_energy: float = 0.0
    product: float = 0.0
    error_energy: float = 0.0
    error_sum: float = 0.0
    max_abs_error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every value equals its reference."""
        return self.error_energy == 0.0

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio.

        Units: dB; infinite if exact, minus infinity if the reference is zero and the value is not.

        >>> round(Sums(count=1, reference_energy=1.0, error_energy=1e-4).sqnr, 6)
        40.0
        """
        if self.exact:
            return math.inf
        if self.reference_energy == 0.0:
            return -math.inf
        return 10.0 * (math.log10(self.reference_energy) - math.log10(self.error_energy))

    @property
    def relative_error(self) -> float:
        """Root mean square of the error over that of the reference; infinite if only that is 0."""
        if self.exact:
            return 0.0
        if self.reference_energy == 0.0:
            return math.inf
        return math.sqrt(self.error_energy / self.reference_energy)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between both as vectors; None where one has no direction."""
        if self.exact:
            return 1.0
        norms = math.sqrt(self.reference_energy) * math.sqrt(self.value_energy)
        if not 0.0 < norms < math.inf:
            return None
        return max(-1.0, min(1.0, self.product / norms))

    @property
    def mean_shift(self) -> float:
        """The mean error."""
        return self.error_sum / self.count if self.count else 0.0

    def to_dict(self) -> dict[str, object]:
        """The metrics as plain JSON.

        What is infinite is null: `sqnr_db` of an exact pair (`exact` is true), and both ratios
        against a reference that is all zero (`exact` is false).
        """
        return {
            "exact": self.exact,
            "sqnr_db": finite(self.sqnr),
            "relative_error": finite(self.relative_error),
            "cosine": self.cosine,
            "max_abs_error": finite(self.max_abs_error),
            "mean_shift": finite(self.mean_shift),
        }


def finite(value: float | None) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def pooled(several: Iterable[Sums]) -> Sums:
    """The sums over all pairs of `several` together.

    >>> a, b = Sums(count=1, error_energy=1.0), Sums(count=3, error_energy=2.0)
    >>> pooled([a, b]).count, pooled([a, b]).error_energy
    (4, 3.0)
    """
    every = list(several)
    return Sums(
        count=sum(s.count for s in every),
        reference_energy=_total(s.reference_energy for s in every),
        value_energy=_total(s.value_energy for s in every),
        product=_total(s.product for s in every),
        error_energy=_total(s.error_energy for s in every),
        error_sum=_total(s.error_sum for s in every),
        max_abs_error=max((s.max_abs_error for s in every), default=0.0),
    )


def sums(reference: torch.Tensor, value: torch.Tensor) -> Sums:
    """The sums over two arrays of one shape and any real dtypes.

    NaN or an infinity in one of them makes its energy non-finite.
    """
    assert reference.shape == value.shape
    import torch

    norm = torch.linalg.vector_norm
    flat_reference, flat_value = reference.reshape(-1), value.reshape(-1)
    w2: list[float] = []
    v2: list[float] = []
    e2: list[float] = []
    shift: list[float] = []
    largest: list[float] = []
    for start, stop in _spans(flat_reference.numel()):
        shape = (-1, min(_ROW, stop - start))
        w = flat_reference[start:stop].view(shape).double()
        v = flat_value[start:stop].view(shape).double()
        e = v - w
        for own, energies in ((w, w2), (v, v2), (e, e2)):
            energies += [length * length for length in norm(own, dim=1).tolist()]
        shift += e.sum(1).tolist()
        low, high = torch.aminmax(e)
        largest.append(max(abs(float(low)), abs(float(high))))
    energy = [_total(each) for each in (w2, v2, e2)]
    return Sums(
        count=flat_reference.numel(),
        reference_energy=energy[0],
        value_energy=energy[1],
        # of e = v - w, so that the products need no pass of their own
        product=(energy[0] + energy[1] - energy[2]) / 2,
        error_energy=energy[2],
        error_sum=_total(shift),
        max_abs_error=max(largest, default=0.0),
    )


def _spans(count: int) -> Iterator[tuple[int, int]]:
    """Where to cut so many elements into whole rows, and what is left of a last one."""
    whole = count - count % _ROW
    for start in range(0, whole, _ROW * _ROWS):
        yield start, min(whole, start + _ROW * _ROWS)
    if whole < count:
        yield whole, count


def _total(values: Iterable[float]) -> float:
    """The sum; NaN where infinities of both signs meet."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan
