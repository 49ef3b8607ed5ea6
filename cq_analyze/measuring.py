"""One layer's weights through every candidate, row segment by row segment.

Owns the reading and the arithmetic: the weight is read once, and once more for the candidates whose
scales reach over all rows, together. Errors are measured in the basis that is rounded in: the
rotation is orthonormal, so they are the weight's own but for float32 rounding (about 1e-7 of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Queue
from typing import TYPE_CHECKING, Any

from cq.core import catalog, rotation
from cq.core.checkpoint import Checkpoint, Part
from cq.core.dtypes import TensorSpec
from cq.core.engine import local
from cq.core.formats import Format
from cq.core.grid import Grid, Scales
from cq.core.rows import segments as rows_of
from cq.core.source import cuts, largest_cut
from cq_analyze.candidates import Considered, Option
from cq_analyze.metrics import Sums, pooled

if TYPE_CHECKING:
    import torch

# Below the 2^15 elements from which torch splits a sum among threads.
_BLOCK_ELEMENTS = 1 << 14
# Per weight of a segment: float32 rows, each basis, what a rotation works in; then codes, levels,
# their error and its square; and one segment in the hands of those who survey.
_BYTES_ROWS, _BYTES_ROTATION, _BYTES_ERROR = 4, 4 + 4 + 4, 2 + 4 + 4 + 4
_Basis = int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """How uneven a weight is, which is what costs precision.

    `peak` is the largest magnitude over the root mean square; `kurtosis` the excess one (0 for
    normal numbers); `row_spread` the largest row's absmax over the median row's, which a scale per
    tensor pays for; `column_spread` the largest column's root mean square over the median one's,
    which a rotation evens out. None where that is no number, as for a weight of zeros.
    """

    peak: float | None
    kurtosis: float | None
    row_spread: float | None
    column_spread: float | None

    def to_dict(self) -> dict[str, float | None]:
        """As plain JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the weights of one layer tell: `errors` by option, in their order, None where there is
    nothing to measure; `broken` is what is wrong with the weight itself."""

    outliers: Outliers
    errors: tuple[Sums | None, ...]
    broken: str | None = None


def task(checkpoint: Checkpoint, layer: Considered) -> Part:
    """The layer as the engine sees it: what is read, and what it holds at most."""
    source = checkpoint.part(layer.name)
    matrix = _matrix(layer)
    options = [o for o in layer.options if o.refused is None]
    bases = {o.group for o in options}
    grids = [g for o in options if (g := _grid(o, matrix)) is not None]
    work = _BYTES_ROWS + _BYTES_ERROR + 2 * 8 + max((g.nbytes_work for g in grids), default=8)
    # The rotated rows of all bases stay while the candidates are gone through; what a survey gets
    # waits in its queue meanwhile.
    work += _BYTES_ROTATION * len(bases) + (_BYTES_ROWS * len(bases) if grids else 0)
    elements = min(largest_cut(matrix), matrix.numel)
    sides = 16 * (layer.spec.shape[0] + sum(layer.spec.shape))
    return Part(
        tensors={layer.name: layer.spec},
        nbytes_peak=2 * source.nbytes_peak + elements * work + sides + (1 << 20),
        produce=source.produce,
    )


def inspect(job: local.Job, checkpoint: Checkpoint, layer: Considered) -> Outcome:
    """All candidates of a layer."""
    runs = [
        _Run(option, _matrix(layer)) if option.refused is None else None for option in layer.options
    ]
    weight = _Weight(job, checkpoint, layer)
    shapes = _Shapes()
    surveying = [run for run in runs if run is not None and run.surveys]
    shared = weight.surveyed(surveying) if surveying else iter(())
    for index, segments in enumerate(weight.matrices(advance=True)):
        scales = next(shared, {})
        for run in runs:
            if run is not None:
                run.begin(scales.get(id(run), {}))
        for rows in segments:
            if not shapes.add(index, rows):
                return Outcome(
                    outliers=shapes.outliers(),
                    errors=tuple(None for _ in runs),
                    broken="holds values that are not finite",
                )
            segment = _Segment(rows)
            for run in runs:
                if run is not None:
                    run.add(segment.rows(run.group), segment.energy(run.group))
    return Outcome(
        outliers=shapes.outliers(),
        errors=tuple(None if run is None else run.sums() for run in runs),
    )


def _matrix(layer: Considered) -> TensorSpec:
    """One weight matrix of the layer: itself, or an expert's share of stacked ones."""
    spec = layer.spec
    return TensorSpec(spec.dtype, spec.shape[1:]) if len(spec.shape) == 3 else spec


def _grid(option: Option, matrix: TensorSpec) -> Grid | None:
    plug: Format = catalog.load("formats", option.candidate.format)
    return None if plug.casts else plug.grid(matrix, option.candidate.scaling)


class _Segment:
    """Rows in every basis, each computed when it is first asked for."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows: dict[_Basis, torch.Tensor] = {None: rows}
        self._energies: dict[_Basis, float] = {}

    def rows(self, group: _Basis) -> torch.Tensor:
        """The rows, rotated by `group`."""
        if group is not None and group not in self._rows:
            self._rows[group] = rotation.rotate(self._rows[None], group)
        return self._rows[group]

    def energy(self, group: _Basis) -> float:
        """The sum of their squares."""
        if group not in self._energies:
            rows = self.rows(group)
            self._energies[group] = _dots(rows, rows)
        return self._energies[group]


class _Weight:
    """A layer's weight as float32 matrices, each as row segments."""

    def __init__(self, job: local.Job, checkpoint: Checkpoint, layer: Considered) -> None:
        self._job = job
        self._part = checkpoint.part(layer.name)
        self._layer = layer
        self._spans = list(cuts(_matrix(layer)))

    def matrices(self, *, advance: bool = False) -> Iterator[Iterable[torch.Tensor]]:
        """Each matrix once; its segments must be taken before the next matrix is."""
        pieces = self._pieces(advance=advance)
        if len(self._layer.spec.shape) == 2:
            yield (piece.float() for piece in pieces)
            return
        for piece in pieces:
            for matrix in piece:
                yield (matrix[start:stop].float() for start, stop in self._spans)

    def _pieces(self, *, advance: bool) -> Iterator[torch.Tensor]:
        for tensor in rows_of(self._part, self._layer.name):
            if self._job.stop.is_set():
                raise local.Stop
            yield tensor
            if advance:
                self._job.advance(tensor.nbytes)

    def surveyed(self, runs: Sequence[_Run]) -> Iterator[dict[int, Scales]]:
        """The shared scales of each matrix, by the run that they are for."""
        for segments in self.matrices():
            found = _survey_together(runs, segments)
            yield {id(run): scales for run, scales in zip(runs, found, strict=True)}


def _survey_together(runs: Sequence[_Run], segments: Iterable[torch.Tensor]) -> list[Scales]:
    """The surveys of several grids in one pass over the segments.

    A survey takes segments as it likes, so each has a thread of its own, which waits for the next
    one: what is held is a segment or two.
    """
    from concurrent.futures import ThreadPoolExecutor

    queues: list[Queue[torch.Tensor | None]] = [Queue(maxsize=1) for _ in runs]

    def survey(run: _Run, queue: Queue[torch.Tensor | None]) -> Scales:
        portions = _taken(queue)
        try:
            return run.survey(portions)
        finally:
            for _ in portions:  # so that whoever fills the queue never waits for one that failed
                pass

    with ThreadPoolExecutor(len(runs)) as pool:
        waiting = [pool.submit(survey, *pair) for pair in zip(runs, queues, strict=True)]
        try:
            for rows in segments:
                segment = _Segment(rows)
                for run, queue in zip(runs, queues, strict=True):
                    queue.put(segment.rows(run.group))
        finally:
            for queue in queues:
                queue.put(None)
    return [future.result() for future in waiting]


def _taken(queue: Queue[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    while (portion := queue.get()) is not None:
        yield portion


class _Run:
    """One candidate on its way through a layer."""

    def __init__(self, option: Option, matrix: TensorSpec) -> None:
        self._plug: Format = catalog.load("formats", option.candidate.format)
        self._grid = _grid(option, matrix)
        name = option.candidate.optimizer
        self._optimizer: Any = None if name is None else catalog.load("optimizers", name)
        self.group = option.group
        self._shared: Scales = {}
        self._found: list[Sums] = []

    @property
    def surveys(self) -> bool:
        """Whether there are shared scales."""
        return self._grid is not None and self._grid.surveys

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """The shared scales of one matrix."""
        assert self._grid is not None
        return self._grid.survey(segments)

    def begin(self, shared: Scales) -> None:
        """A matrix begins, with its shared scales."""
        self._shared = shared

    def add(self, rows: torch.Tensor, energy: float) -> None:
        """The next segment in the candidate's basis, and the sum of its squares."""
        if self._plug.casts:
            value = self._plug.store(rows)["weight"].float()
        elif self._grid is None:
            return
        else:
            codes, own = self._optimizer.fit(rows, self._grid, self._shared, search=True)
            value = self._grid.values(codes, {**self._shared, **own})
        self._found.append(_sums(rows, energy, value))

    def sums(self) -> Sums | None:
        """The errors of all segments; None if the format takes whole weights only, or overflows."""
        total = pooled(self._found)
        return total if self._found and math.isfinite(total.error_energy) else None


def _sums(weight: torch.Tensor, energy: float, value: torch.Tensor) -> Sums:
    """The sums that energies and the angle follow from. Single products are float32, their sums
    float64: near 1e-7 of the sum, in a third of the time that float64 products take."""
    error = value - weight
    product, noise = _dots(weight, error), _dots(error, error)
    return Sums(
        count=weight.numel(),
        reference_energy=energy,
        value_energy=energy + 2.0 * product + noise,
        product=energy + product,
        error_energy=noise,
    )


def _dots(left: torch.Tensor, right: torch.Tensor) -> float:
    import torch

    flat, other = left.reshape(-1), right.reshape(-1)
    whole = flat.numel() // _BLOCK_ELEMENTS * _BLOCK_ELEMENTS
    products = flat * other
    blocks = products[:whole].view(-1, _BLOCK_ELEMENTS).sum(1, dtype=torch.float64).tolist()
    total = math.fsum([*blocks, float(products[whole:].sum(dtype=torch.float64))])
    if left.dtype == torch.float64 or (math.isfinite(total) and abs(total) > _SMALLEST_SUM):
        return total
    return _dots(left.double(), right.double())  # float32 overflowed, or lost what is there


_SMALLEST_SUM = 2.0**-100  # a sum of float32 products near it has lost some of them
_SMALL = 2.0**-24


@dataclass(slots=True)
class _Shapes:
    """The outlier measures on their way, matrix by matrix."""

    _powers: list[list[float]] = field(default_factory=list)
    _count: int = 0
    _peak: float = 0.0
    _matrix: int = -1
    _rows: list[float] = field(default_factory=list)
    _columns: torch.Tensor | None = None
    _spreads: list[tuple[float | None, float | None]] = field(default_factory=list)

    def add(self, matrix: int, rows: torch.Tensor) -> bool:
        """The next segment of the matrix of that number. False if it holds what is not finite."""
        import torch

        if matrix != self._matrix:
            self._close()
            self._matrix = matrix
        total = float(rows.sum(dtype=torch.float64))
        if not math.isfinite(total):
            return False
        largest = float(torch.maximum(rows.amax(), -rows.amin()))
        if not _SMALL < largest < 1 / _SMALL:  # whose fourth powers float32 does not hold
            rows = rows.double()
        square = rows * rows
        self._powers.append([total, _dots(rows, rows), _dots(square, rows), _dots(square, square)])
        self._count += rows.numel()
        absmax = torch.maximum(rows.amax(1), -rows.amin(1))
        self._peak = max(self._peak, float(absmax.amax()))
        # As plain numbers, and in place: small tensors that outlive a segment would lie between its
        # large ones in memory, and the next large ones no longer fit where the last ones were.
        self._rows += absmax.tolist()
        columns = square.sum(0, dtype=torch.float64)
        self._columns = columns if self._columns is None else self._columns.add_(columns)
        return True

    def _close(self) -> None:
        import torch

        if self._columns is not None:
            rows = torch.tensor(self._rows)
            self._spreads.append((_over_median(rows), _over_median(self._columns.sqrt())))
        self._rows, self._columns = [], None

    def outliers(self) -> Outliers:
        """The measures of all segments; of several matrices the largest spreads."""
        self._close()
        s1, s2, s3, s4 = (math.fsum(p[i] for p in self._powers) for i in range(4))
        n = max(self._count, 1)
        mean, second = s1 / n, s2 / n
        variance = second - mean * mean
        fourth = s4 / n - 4 * mean * s3 / n + 6 * mean * mean * second - 3 * mean**4
        # A variance lost in rounding is that of a constant, which has no kurtosis.
        varies = variance > 1e-12 * second
        return Outliers(
            peak=_number(self._peak / math.sqrt(second)) if second > 0 else None,
            kurtosis=_number(fourth / variance**2 - 3) if varies else None,
            row_spread=max((r for r, _ in self._spreads if r is not None), default=None),
            column_spread=max((c for _, c in self._spreads if c is not None), default=None),
        )


def _over_median(values: torch.Tensor) -> float | None:
    median = float(values.median())
    return _number(float(values.amax()) / median) if median > 0 else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
