"""Equalization: factors for the channels of layers' inputs, folded into what makes these inputs.

Owns the choice of factors and the rewriting of a checkpoint by them, both lazy: weights are read
twice, first for the factors, when a part that needs them is produced. Where factors can be folded
is the family's to say (`cq.core.folds`).

What is folded is handed on in float32, so that no weight is rounded before the rounding that was
asked for, and the model computes what it did. A weight that is then kept is rounded to the dtype
that it had; biases and gains, which are small, stay float32.

Source: SmoothQuant, arXiv 2211.10438 (absmax, alpha); the factors (rms x / rms w)^1/2 are QuIP's
diagonal rescaling, arXiv 2307.13304.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from cq.core import folds
from cq.core.calibration import Calibration
from cq.core.checkpoint import Checkpoint, Part, Piece, narrowed
from cq.core.comfy import WEIGHT
from cq.core.dtypes import TensorSpec, torch_dtype
from cq.core.errors import InputError, PlanError
from cq.core.folds import Found, Spot
from cq.core.knowledge import Knowledge
from cq.core.source import largest_cut
from cq.core.text import printable

if TYPE_CHECKING:
    import torch

_REACH = 5  # doublings to either side of the usual factor: a channel that was silent says little
_BYTES_CHANNEL = 64  # of the numbers that a factor is made of

Multiplier = Callable[[], "torch.Tensor"]
"""What each feature of a layer's inputs is multiplied by: float32 `(K,)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How factors are chosen: (a / w)^1/2 by root mean squares of inputs and weights, or with
    `alpha` a^alpha / w^(1 - alpha) by the largest ones."""

    alpha: float | None = None

    def size(self, value: torch.Tensor) -> torch.Tensor:
        """The size of each column of rows, so that those of segments can be added: the sum of
        squares, or the largest. Shapes: `(rows, K)` to float64 `(K,)`."""
        wide = value.double()
        return wide.square().sum(0) if self.alpha is None else wide.abs().amax(0)

    def joined(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The size of both together."""
        import torch

        return first + second if self.alpha is None else torch.maximum(first, second)

    def of_inputs(self, found: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
        """The size of recorded inputs, from their vectors, so that `joined` adds them up."""
        return found["diag"].double() * rows if self.alpha is None else found["absmax"].double()

    def exponents(self, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The factors' logarithms to base 2, around 0, for sizes whose common scale is any; 0 for
        channels of which nothing is known."""
        import torch

        a, w = inputs.log2(), weights.log2()
        raw = (a - w) / 4 if self.alpha is None else self.alpha * a - (1 - self.alpha) * w
        known = torch.isfinite(raw)
        if not bool(known.any()):
            return torch.zeros_like(raw)
        raw = torch.where(known, raw - raw[known].median(), 0)
        return raw.clamp_(-_REACH, _REACH)


class Factors:
    """The factors s of one fold: consumers' columns are multiplied by s, producers' channels
    divided. Computed when first asked for, once."""

    def __init__(
        self, found: Found, source: Checkpoint, recorded: Mapping[str, str], file: Calibration
    ) -> None:
        self.found = found
        self._source, self._recorded, self._file = source, recorded, file
        self._lock = threading.Lock()
        self._value: torch.Tensor | None = None
        parts = [source.part(spot.name) for spot in found.multiplied]
        specs = [source.specs[spot.name] for spot in found.multiplied]
        self.nbytes_peak = (
            2 * max(part.nbytes_peak for part in parts)
            + max(largest_cut(spec) for spec in specs) * 3 * 8
            + max(spec.shape[-1] for spec in specs) * _BYTES_CHANNEL
        )

    def value(self, rule: Rule) -> torch.Tensor:
        """Float32 `(channels,)`. Raises: InputError for weights not finite."""
        with self._lock:
            if self._value is None:
                exponents = rule.exponents(self._inputs(rule), self._weights(rule))
                if self.found.plus_one:
                    # At most 1, so that (1 + b) / s - 1 is no difference of nearly equal numbers,
                    # of which a bfloat16 runtime would keep few bits.
                    exponents = exponents - exponents.amax()
                self._value = exponents.exp2().float()
            return self._value

    def _inputs(self, rule: Rule) -> torch.Tensor:
        sizes = {}
        for spot in self.found.multiplied:
            own = self._recorded[spot.name.removesuffix(WEIGHT)]
            stored = self._file.layers[own].stored_as
            if stored not in sizes:  # layers of one input count once
                size = rule.of_inputs(self._file.vectors(own), self._file.layers[own].rows)
                sizes[stored] = size[spot.start : spot.stop]
        return _joined(rule, sizes.values())

    def _weights(self, rule: Rule) -> torch.Tensor:
        import torch

        sizes = []
        for spot in self.found.multiplied:
            for piece in self._source.pieces(spot.name):
                size = rule.size(piece.tensor[:, spot.start : spot.stop])
                if not bool(torch.isfinite(size).all()):
                    raise InputError(
                        f"tensor `{printable(spot.name)}` holds NaN or infinite values",
                        where=spot.name,
                        hint="mend the checkpoint, or leave `--equalize` and `--smoothquant` out",
                        code="input.nonfinite",
                    )
                sizes.append(size)
        return _joined(rule, sizes)


def _joined(rule: Rule, sizes: Iterable[torch.Tensor]) -> torch.Tensor:
    several = iter(sizes)
    whole = next(several)
    for size in several:
        whole = rule.joined(whole, size)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """A checkpoint whose layers' inputs are equalized. `inputs` are by layer what the features of
    its inputs are multiplied by compared with the original model; `kept` are the parts of changed
    weights, by name, in the dtype that they had. `places` counts the folds, of `missing` more the
    consumers were not recorded."""

    checkpoint: Checkpoint
    inputs: Mapping[str, Multiplier] = field(default_factory=dict)
    nbytes_peak: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, Part] = field(default_factory=dict)
    places: int = 0
    missing: int = 0


def equalized(source: Checkpoint, known: Knowledge, file: Calibration, rule: Rule) -> Equalized:
    """The checkpoint with factors folded wherever its family says that this is exact, and all the
    layers that read the inputs were recorded. Plans only; the stages of `source` stay as they are.

    Raises: PlanError if a layer has not as many input features as were recorded.
    """
    every = [
        found
        for match in known.matches
        for found in folds.find(match.family.folds, source.specs, match.prefix)
    ]
    layers = [n.removesuffix(WEIGHT) for n in source.specs if n.endswith(WEIGHT)]
    recorded = {layer: own for layer, own in file.matched(layers).items() if file.layers[own].rows}
    usable = [
        Factors(found, source, recorded, file)
        for found in every
        if all(s.name.removesuffix(WEIGHT) in recorded for s in found.multiplied)
    ]
    for factors in usable:
        for spot in factors.found.multiplied:
            _see_fit(source, file, recorded, spot)
    changed: dict[str, _Changed] = {}
    for factors in usable:
        for spot in factors.found.divided:
            changed.setdefault(spot.name, _Changed(source, spot.name, rule)).rows.append(
                (spot, factors)
            )
        for spot in factors.found.multiplied:
            changed.setdefault(spot.name, _Changed(source, spot.name, rule)).columns.append(
                (spot, factors)
            )
    inputs = {
        name.removesuffix(WEIGHT): partial(tensor.inputs, rule)
        for name, tensor in changed.items()
        if tensor.columns
    }
    return Equalized(
        checkpoint=replace(source, parts=tuple(_parts(source, changed))) if changed else source,
        inputs=inputs,
        nbytes_peak={n: changed[n + WEIGHT].nbytes_peak for n in inputs},
        kept={n: o.part(source.specs[n].dtype) for n, o in changed.items() if n.endswith(WEIGHT)},
        places=len(usable),
        missing=len(every) - len(usable),
    )


def _see_fit(
    source: Checkpoint, file: Calibration, recorded: Mapping[str, str], spot: Spot
) -> None:
    layer = spot.name.removesuffix(WEIGHT)
    had, has = file.layers[recorded[layer]].columns, source.specs[spot.name].shape[1]
    if had != has:
        raise PlanError(
            f"`{file.source.shown}` has {had} input features for `{printable(layer)}`, whose weight"
            f" has {has}",
            where=layer,
            hint="it belongs to another model",
            code="plan.calibration",
        )


def _parts(source: Checkpoint, changed: Mapping[str, _Changed]) -> Iterator[Part]:
    for part in source.parts:
        rest = [name for name in part.tensors if name not in changed]
        yield from (changed[name].part() for name in part.tensors if name in changed)
        if rest:
            yield part if len(rest) == len(part.tensors) else narrowed(part, rest)


class _Changed:
    """A tensor with factors on its rows, its columns, or both."""

    def __init__(self, source: Checkpoint, name: str, rule: Rule) -> None:
        self._source, self._name, self._rule = source, name, rule
        self.rows: list[tuple[Spot, Factors]] = []
        self.columns: list[tuple[Spot, Factors]] = []

    @property
    def nbytes_peak(self) -> int:
        """What computing its factors takes at most."""
        return max(factors.nbytes_peak for _, factors in (*self.rows, *self.columns))

    def part(self, dtype: str | None = None) -> Part:
        """The tensor as a part, in `dtype`; None is float32, or float64 if it was."""
        spec = self._source.specs[self._name]
        dtype = dtype or ("F64" if spec.dtype == "F64" else "F32")
        return Part(
            tensors={self._name: TensorSpec(dtype, spec.shape)},
            nbytes_peak=2 * self._source.part(self._name).nbytes_peak
            + largest_cut(spec) * 4 * 8
            + self.nbytes_peak,
            produce=partial(self._produce, dtype),
        )

    def inputs(self, rule: Rule) -> torch.Tensor:
        """What the features of its inputs are multiplied by: float32 `(K,)`."""
        return 1 / self._spread(self.columns, self._source.specs[self._name].shape[1], rule)

    def _produce(self, dtype: str) -> Iterator[Piece]:
        import torch

        spec = self._source.specs[self._name]
        rows = self._spread(self.rows, spec.shape[0], self._rule).double()
        columns = None
        if self.columns:
            columns = self._spread(self.columns, spec.shape[1], self._rule).double()
        ones = torch.zeros(spec.shape[0], dtype=torch.float64)
        for spot, _ in self.rows:
            ones[spot.start : spot.stop] = 1.0 if spot.plus_one else 0.0
        target = torch_dtype(dtype)
        for piece in self._source.pieces(self._name):
            span = slice(piece.start, piece.start + piece.tensor.shape[0])
            shape = (-1, *(1,) * (piece.tensor.ndim - 1))
            one = ones[span].view(shape)
            value = (piece.tensor.double() + one).div_(rows[span].view(shape)).sub_(one)
            if columns is not None:
                value *= columns
            yield Piece(self._name, piece.start, value.to(target))

    def _spread(self, spots: Sequence[tuple[Spot, Factors]], size: int, rule: Rule) -> torch.Tensor:
        import torch

        found = torch.ones(size)
        for spot, factors in spots:
            found[spot.start : spot.stop] *= factors.value(rule)
        return found
