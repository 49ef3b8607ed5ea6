"""Optimizers: what chooses codes, one file each. Owns what they keep to.

An optimizer never names a format: it sees float32 rows, a grid, and the moment of the layer's
inputs if one was recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from cq.core.grid import Grid, Scales
from cq.core.moment import Moment
from cq.core.rounding import Fit

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A number that a user may set, by `--set OPTIMIZER.NAME=NUMBER`: what it does, its bounds, and
    its default; None if that depends on the layer. `calibrated` says that it is nothing without a
    calibration."""

    help: str
    least: float
    most: float
    default: float | None
    whole: bool = False
    calibrated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """How rows were rounded: so many, `taken` by the optimizer's way and the rest to nearest; and
    the summed losses of nearest rounding and of what was kept, by inputs held back."""

    rows: int
    taken: int
    nearest: float
    kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A layer to be rounded: its shape, its moment and that of inputs held back, both in the basis
    that is rounded in and None without calibration; the user's numbers by the options' names, the
    seed, and its rows, which may be asked for again. Moments and rows are on `device`. `bf16` asks
    for products along sketches in bfloat16. `tell` takes what became of rows."""

    shape: tuple[int, int]
    rows: Callable[[], Iterator[torch.Tensor]]
    moment: Moment | None = None
    held: Moment | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    tell: Callable[[Rounded], None] = lambda rounded: None


class Optimizer(ABC):
    """Chooses codes. `rotates` says whether it works in the rotated basis, `calibrates` whether it
    uses a moment, `note` what a user should know of how it works without one. Plugs inherit the
    defaults."""

    name: str
    rotates: bool = False
    calibrates: bool = False
    note: str | None = None
    options: ClassVar[Mapping[str, Option]] = {}

    @abstractmethod
    def fit(
        self, weight: torch.Tensor, grid: Grid, shared: Scales, *, search: bool
    ) -> tuple[torch.Tensor, Scales]:
        """Codes and the rows' own scales for a float32 row segment `(rows, K)`, without a moment.

        `shared` are the scales that reach beyond the segment. `search` asks for scales of least
        error rather than the format's plain rule.
        """
        ...

    def prepare(self, task: Task) -> Fit:
        """What rounds the rows of a layer: computed once, called for all its segments."""
        return self.fit

    def segments(self, weights: int, rank: int) -> int:
        """Row segments, of so many weights, that are rounded together; `rank` as below."""
        return 1

    def nbytes_work(self, columns: int, rank: int, weights: int) -> int:
        """Bytes that rounding holds beside rows, scales and codes, if K is `columns`, `rank` the
        directions of both moments (0 without them), and `weights` are rounded together."""
        return 0
