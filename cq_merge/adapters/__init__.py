"""Kinds of adapter, one file each, named by the kind. Owns the protocol that they keep.

A plug finds its changes in an adapter file by names, shapes and the few scalars among the tensors.
It knows neither the base's layers (`cq.core.names` maps them) nor the strengths (`cq_merge.stage`
gives them). It imports torch only where it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from cq.core import catalog
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.text import printable
from cq_merge.contents import Contents

if TYPE_CHECKING:
    import torch

Parameter = Literal["weight", "bias"]

# Adds strength times the change to rows of a weight: `apply(base, rows, first, strength)`. `base`
# holds rows of the weight as it was, flattened to `(n, K)`, and is not written to; to `rows`, of
# the same shape, the change is added; `first` is the number of the first of them. `base` and `rows`
# may be one tensor. A change with `whole` is called once, with all rows.
Apply = Callable[["torch.Tensor", "torch.Tensor", int, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How adapter files are to be understood where there is more than one way.

    `as_comfyui` is ComfyUI's way also where it drops or errs. `alpha` stands for LoRA-like changes
    without an alpha tensor: None takes it from the file's metadata or the `adapter_config.json`
    beside it, where there is one; `tensors` takes scale 1; a number is that alpha.
    """

    as_comfyui: bool = False
    alpha: float | Literal["tensors"] | None = None


class Change(Protocol):
    """What an adapter does to one parameter of a layer.

    `key` is the prefix under which the adapter file knows the layer, `parameter` which of its
    tensors is meant, `tensors` the names in the file that the change is made of. `rank` and `alpha`
    are for reports, None where the kind or the file has none; `remarks` tell where ComfyUI does
    something else, or what is odd. `reads_base` says that the change depends on the weight's own
    values, `whole` that it also mixes its rows.
    """

    @property
    def key(self) -> str:
        """The prefix in the file."""
        ...

    @property
    def parameter(self) -> Parameter:
        """The layer's tensor that is changed."""
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

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences without a full stop, the same for every layer that they hold for."""
        ...

    @property
    def reads_base(self) -> bool:
        """Whether `base` is looked at."""
        ...

    @property
    def whole(self) -> bool:
        """Whether all rows must come at once."""
        ...

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The weight's shape after the change: its own, unless the adapter makes the layer grow."""
        ...

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the change does not fit rows of the shape of `weight`, as a sentence that names its
        tensors and their shapes, or None if it does."""
        ...

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes that the loaded change holds at most while it is added to `rows` rows of `columns`
        at a time, computed in elements of `itemsize` bytes."""
        ...

    def load(self, dtype: torch.dtype) -> Apply:
        """Read the change, to be computed in `dtype`. Raises: InputError for non-finite values."""
        ...


class Additive:
    """What most kinds of change say alike: a delta of the weight's shape, whatever its values."""

    __slots__ = ()

    @property
    def parameter(self) -> Parameter:
        """The weight."""
        return "weight"

    @property
    def rank(self) -> int | None:
        """None."""
        return None

    @property
    def alpha(self) -> float | None:
        """None."""
        return None

    @property
    def remarks(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def reads_base(self) -> bool:
        """False: a delta is the same for every weight."""
        return False

    @property
    def whole(self) -> bool:
        """False: each row is made by itself."""
        return False

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The weight's own."""
        return weight


class Adapter(Protocol):
    """A kind of adapter. `kind` is its name and the file's."""

    @property
    def kind(self) -> str:
        """The kind's name."""
        ...

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """The changes of this kind that the file holds whole, in a fixed order.

        A key that two kinds claim goes to the change made of more tensors: a kind that extends
        another one claims the other's tensors together with its own.

        Raises: InputError if values or shapes contradict each other.
        """
        ...

    def partner(self, name: str) -> str | None:
        """The tensor without which `name` means nothing, or None if the kind knows no `name`."""
        ...


def claim_all(source: Contents, reading: Reading) -> list[tuple[str, Change]]:
    """Every change in an adapter file, each with its kind, ordered by key.

    Raises: InputError if a tensor's partner is missing; PlanError if a tensor belongs to no kind
    that there is a plug for, or if there is nothing in the file.
    """
    plugs = [plug for plug in _plugs() if plug.kind != CHECKPOINT]
    claims = [(plug.kind, change) for plug in plugs for change in plug.claim(source, reading)]
    claims.sort(key=lambda claim: (-len(claim[1].tensors), claim[1].key, claim[1].tensors))
    left = {*source.names}  # in this package `set` is a kind
    if not claims and not any(plug.partner(name) for plug in plugs for name in left):
        # Nothing in it is an adapter's: then it is a model.
        model: Adapter = catalog.load("adapters", CHECKPOINT)
        claims = [(CHECKPOINT, change) for change in model.claim(source, reading)]
        if claims:  # position ids and the like are no weights
            left.intersection_update(name for _, change in claims for name in change.tensors)
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


def is_adapter(names: Collection[str]) -> bool:
    """Whether most of these tensors are an adapter's, by their names alone."""
    plugs = [plug for plug in _plugs() if plug.kind != CHECKPOINT]
    known = (n for n in names if n.endswith(".alpha") or any(plug.partner(n) for plug in plugs))
    return 2 * sum(1 for _ in known) > len(names)


CHECKPOINT = "checkpoint"  # the kind whose tensors are whole weights of a second model


def _plugs() -> list[Adapter]:
    return [catalog.load("adapters", name) for name in catalog.names("adapters")]


def _left_over(
    source: Contents, plugs: Sequence[Adapter], left: set[str]
) -> InputError | PlanError:
    # An alpha tells nothing of its kind, so another tensor names what is wrong if there is one.
    ordered = sorted(left, key=lambda name: (name.endswith(".alpha"), name))
    for name in ordered:
        partners = [p for plug in plugs if (p := plug.partner(name)) is not None]
        if partners and not any(partner in source.names for partner in partners):
            return InputError(
                f"`{source.shown}` holds `{printable(name)}` without `{printable(partners[0])}`",
                where=source.shown,
                hint="the file is incomplete; get it again from where it came",
                code="input.adapter_half",
            )
    first = ordered[0]
    rest = len(left) - 1
    more = f" and {rest} more {'tensor' if rest == 1 else 'tensors'}" if rest else ""
    return PlanError(
        f"`{source.shown}` holds `{printable(first)}`{more}"
        " of a kind that this version does not merge",
        where=source.shown,
        hint="kinds that it merges: "
        + ", ".join(f"`{plug.kind}`" for plug in plugs)
        + "; merging a part of an adapter would not give what it was trained to do",
        code="plan.adapter_kind",
    )
