"""What kinds of change share: alphas, sums of whole tensors, changes that do nothing, and errors.

Owns which alpha counts for a layer without an alpha tensor, and the guard against multipliers that
float32 cannot hold. Knows no kind; each of those is a file in `cq_merge.adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.text import printable
from cq_merge.adapters import Additive, Apply, Parameter, Reading
from cq_merge.contents import Contents

if TYPE_CHECKING:
    import torch

ALPHA = ".alpha"
LARGEST_RUN = 1 << 18  # elements that are computed at a time where that needs memory beside them
NBYTES_RUN = 4 * LARGEST_RUN * 8  # what a few steps in float64 hold of a run of common rows
UNCHANGED = " and leaves them unchanged"  # how remarks end on what ComfyUI does not apply at all
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a layer's factors are multiplied by: `alpha / rank`, 1 without an alpha.

    `tensors` names the alpha's tensor, if it comes from one.
    """

    rank: int | None
    alpha: float | None
    tensors: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The multiplier."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


def scale_of(contents: Contents, reading: Reading, key: str, rank: int) -> Scale:
    """The scale of the layer `key` with factors of `rank`.

    Source: ComfyUI `comfy/weight_adapter/*.py`: scale 1 where there is no alpha tensor, whatever
    the metadata says; PEFT `tuners/lora/layer.py:update_layer` (`lora_alpha / r`).

    Raises: InputError if the alpha is not one finite number.
    """
    if key + ALPHA in contents:
        name = key + ALPHA
        return Scale(rank=rank, alpha=contents.scalar(name), tensors=(name,))
    if reading.alpha == "tensors":
        return Scale(rank=rank, alpha=None)
    if reading.alpha is None:
        alpha, place = contents.metadata_alpha(key, rank), contents.metadata_shown
    else:
        alpha, place = float(reading.alpha), "given here"
    if alpha is None:
        return Scale(rank=rank, alpha=None)
    remark = f"ComfyUI ignores the alpha {alpha:g} {place} and applies the factors at scale 1"
    return Scale(
        rank=rank,
        alpha=None if reading.as_comfyui else alpha,
        remarks=() if alpha == rank else (remark,),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(Additive):
    """The fields of a change that is made of factors and has a scale."""

    contents: Contents
    key: str
    tensors: tuple[str, ...]
    scale: Scale
    said: tuple[str, ...] = ()

    @property
    def rank(self) -> int | None:
        """The rank of the factors."""
        return self.scale.rank

    @property
    def alpha(self) -> float | None:
        """The alpha that counts."""
        return self.scale.alpha

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the scale and the kind have to say."""
        return (*self.scale.remarks, *self.said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference(Additive):
    """A tensor of the target's own shape that is added to it, `factor` times."""

    contents: Contents
    key: str
    name: str
    parameter: Parameter = field()  # without this, the property above would be the default
    factor: float = 1.0
    said: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.name,)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the kind has to say."""
        return self.said

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the shapes differ in more than trailing ones."""
        return unlike(self.contents, self.name, weight)

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """Rows of the difference."""
        return self.contents.nbytes_rows(self.name, rows * columns, itemsize)

    def load(self, dtype: torch.dtype) -> Apply:
        """Nothing is read before the rows that need it."""

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            stop = first + len(rows)
            own = self.contents.matrix(self.name, dtype, start=first, stop=stop)
            rows.add_(own, alpha=bounded(strength * self.factor, rows))

        return apply


@dataclass(frozen=True, slots=True, kw_only=True)
class Inert(Additive):
    """Tensors that ComfyUI reads, or logs an error for, and then changes nothing by."""

    key: str
    tensors: tuple[str, ...]
    parameter: Parameter = field(default="weight")
    said: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Why nothing is done."""
        return self.said

    def refuse(self, weight: TensorSpec) -> str | None:
        """Never: nothing is done to it."""
        return None

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """Nothing."""
        return 0

    def load(self, dtype: torch.dtype) -> Apply:
        """A function that does nothing."""

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            return None

        return apply


def bounded(multiplier: float, rows: torch.Tensor) -> float:
    """`multiplier`, or infinity where the dtype of `rows` cannot hold it.

    torch refuses such a factor outright; infinity fails the check of the result, which can name the
    weight.
    """
    if rows.element_size() == 4 and abs(multiplier) > _LARGEST_FLOAT32:
        return math.copysign(math.inf, multiplier)
    return multiplier


def add_towards(
    base: torch.Tensor, rows: torch.Tensor, value: torch.Tensor, strength: float
) -> None:
    """Add `strength` times the way from `base` to `value` to `rows`.

    At strength 1, numbers that are still as in `base` become those of `value` to the bit.
    """
    import torch

    way = value - base
    if strength == 1.0:
        torch.where(rows == base, value, way.add_(rows), out=rows)
    else:
        rows.add_(way, alpha=bounded(strength, rows))


def nbytes_towards(rows: int, columns: int, itemsize: int) -> int:
    """What `add_towards` holds beside its arguments: the way, and where rows are as they were."""
    return rows * columns * (itemsize + 1)


def runs(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut `count` rows or columns of `size` elements into runs `(start, stop)` of at most
    `LARGEST_RUN` elements, at least one row or column."""
    step = max(1, LARGEST_RUN // max(1, size))
    for start in range(0, count, step):
        yield start, min(count, start + step)


def nbytes_run(count: int, size: int, itemsize: int) -> int:
    """Bytes of the largest of `runs`."""
    return min(count * size, max(LARGEST_RUN, size)) * itemsize


def inner(one: torch.Tensor, other: torch.Tensor) -> float:
    """The sum of products of two matrices `(N, K)`, in float64 and run by run."""
    total = 0.0
    for start, stop in runs(len(one), one.shape[1]):
        total += float((one[start:stop].double() * other[start:stop].double()).sum())
    return total


def squared(matrix: torch.Tensor) -> float:
    """The squared norm of a matrix `(N, K)`, in float64 and run by run."""
    return inner(matrix, matrix)


def matrices(contents: Contents, names: Sequence[str]) -> list[TensorSpec]:
    """The specs of factors of two or more dimensions.

    Raises: PlanError if one is not floating point, InputError if one has fewer dimensions, or none
    along one of them.
    """
    specs = [contents.floating(name) for name in names]
    if any(len(spec.shape) < 2 or not spec.numel for spec in specs):
        raise contradiction(contents, names, "share no rank")
    return specs


def contradiction(contents: Contents, names: Sequence[str], what: str) -> InputError:
    """The error for tensors whose shapes cannot belong together."""
    return InputError(
        f"the {_listed(contents, names)} of `{contents.shown}` {what}",
        where=contents.shown,
        hint="the file is damaged, or a tool wrote it wrongly",
        code="input.adapter_shape",
    )


def makes(contents: Contents, names: Sequence[str], made: tuple[int, int]) -> str:
    """A sentence on what factors make, for a refusal."""
    return f"the {_listed(contents, names)} make {made[0]} x {made[1]}"


def unlike(contents: Contents, name: str, weight: TensorSpec) -> str | None:
    """Why the tensor `name` has not the shape of `weight`, but for ones; None if it has."""
    spec = contents.spec(name)
    same = (spec.shape[:1] or (1,), spec.numel) == (weight.shape[:1] or (1,), weight.numel)
    return None if same else f"tensor `{printable(name)}` is {spec}"


def _listed(contents: Contents, names: Sequence[str]) -> str:
    shown = [f"`{printable(name)}` {contents.spec(name)}" for name in names]
    return "factors " + " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
