"""Kinds of adapter, one file each, named by the kind. Owns the protocol that they keep.

A plug finds its changes in an adapter file by names, shapes and the few scalars among the tensors.
It knows neither the base's layers (`cq_merge.keys` maps them) nor the strengths (`cq_merge.stage`
gives them). It imports torch only where it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from cq.core import catalog
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.source import Source
from cq.core.text import printable

if TYPE_CHECKING:
    import torch

# Adds a change to rows of a weight, in place. Called with those rows `(n, K)` in the dtype that is
# computed in, the number of the first of them, and the strength.
Apply = Callable[["torch.Tensor", int, float], None]


class Change(Protocol):
    """What an adapter does to one weight.

    `key` is the prefix under which the adapter file knows the layer, `tensors` the names in the
    file that the change is made of. `rank` and `alpha` are for reports, None where the kind or the
    file has none.
    """

    @property
    def key(self) -> str:
        """The prefix in the file."""
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names in the file."""
        ...

    @property
    def rank(self) -> int | None:
        """The rank."""
        ...

    @property
    def alpha(self) -> float | None:
        """The alpha."""
        ...

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the change does not fit `weight`, as a sentence that names its tensors and their
        shapes, or None if it does."""
        ...

    def nbytes_peak(self, rows: int, itemsize: int) -> int:
        """Bytes that the loaded change holds at most while it is added to `rows` rows at a time,
        computed in elements of `itemsize` bytes."""
        ...

    def load(self, dtype: torch.dtype) -> Apply:
        """Read the change, to be computed in `dtype`. Raises: InputError for non-finite values."""
        ...


class Adapter(Protocol):
    """A kind of adapter. `kind` is its name and the file's."""

    @property
    def kind(self) -> str:
        """The kind's name."""
        ...

    def claim(self, source: Source) -> Sequence[Change]:
        """The changes of this kind that the file holds whole, in a fixed order.

        A key that two kinds claim goes to the change made of more tensors: a kind that extends
        another one claims the other's tensors together with its own.

        Raises: InputError if values or shapes contradict each other.
        """
        ...

    def partner(self, name: str) -> str | None:
        """The tensor without which `name` means nothing, or None if the kind knows no `name`."""
        ...


def claim_all(source: Source) -> list[tuple[str, Change]]:
    """Every change in an adapter file, each with its kind, ordered by key.

    Raises: InputError if a tensor's partner is missing; PlanError if a tensor belongs to no kind
    that there is a plug for, or if there is nothing in the file.
    """
    plugs: list[Adapter] = [catalog.load("adapters", name) for name in catalog.names("adapters")]
    claims = [(plug.kind, change) for plug in plugs for change in plug.claim(source)]
    claims.sort(key=lambda claim: (-len(claim[1].tensors), claim[1].key, claim[1].tensors))
    left = set(source.owner)
    chosen = []
    for kind, change in claims:
        if left.issuperset(change.tensors):
            left.difference_update(change.tensors)
            chosen.append((kind, change))
    if left:
        raise _left_over(source, plugs, left)
    if not chosen:
        raise PlanError(
            f"`{source.shown}` holds no tensor, so it is no adapter",
            where=source.shown,
            code="plan.adapter_empty",
        )
    return sorted(chosen, key=lambda claim: (claim[1].key, claim[1].tensors))


def _left_over(source: Source, plugs: Sequence[Adapter], left: set[str]) -> InputError | PlanError:
    # An alpha tells nothing of its kind, so another tensor names what is wrong if there is one.
    ordered = sorted(left, key=lambda name: (name.endswith(".alpha"), name))
    for name in ordered:
        partners = [p for plug in plugs if (p := plug.partner(name)) is not None]
        if partners and not any(partner in source.owner for partner in partners):
            return InputError(
                f"`{source.shown}` holds `{printable(name)}` without `{printable(partners[0])}`",
                where=source.shown,
                hint="the file is incomplete; get it again from where it came",
                code="input.adapter_half",
            )
    first = ordered[0]
    more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
    return PlanError(
        f"`{source.shown}` holds `{printable(first)}`{more}"
        " of a kind that this version does not merge",
        where=source.shown,
        hint="kinds that it merges: "
        + ", ".join(f"`{plug.kind}`" for plug in plugs)
        + "; merging a part of an adapter would not give what it was trained to do",
        code="plan.adapter_kind",
    )
