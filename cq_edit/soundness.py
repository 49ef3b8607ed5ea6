"""Whether an edit leaves every layer as whole as it was.

Owns the comparison of before and after; what is wrong with a checkpoint is said by the installed
checks (entry points in `cq.checks`), the very ones that `cq verify` reports, so that nothing which
an edit accepts is a finding there that was none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from cq.core import catalog
from cq.core.checkpoint import Checkpoint
from cq.core.errors import PlanError
from cq.core.stored import by_layer
from cq.core.text import printable

_OF_THE_MODEL = frozenset({"layers.missing", "tensors.missing", "bias.missing"})


class Finding(Protocol):
    """What a check found: a slug, the layer or tensor (None for the whole), and what to do.

    As text it is a sentence.
    """

    @property
    def name(self) -> str:
        """The slug."""
        ...

    @property
    def layer(self) -> str | None:
        """The layer."""
        ...

    @property
    def mend(self) -> str:
        """What to do."""
        ...


def findings(checkpoint: Checkpoint) -> list[Finding]:
    """What is wrong with a checkpoint by names, shapes and markers."""
    found: list[Finding] = []
    for name in catalog.names("checks"):
        found += catalog.load("checks", name)(checkpoint).findings
    return found


def of_layers(checkpoint: Checkpoint, layers: Collection[str]) -> dict[str, Finding]:
    """The first finding of each of `layers` that has one."""
    return {
        finding.layer: finding
        for finding in reversed(findings(checkpoint))
        if finding.layer is not None and finding.layer in layers
    }


def refuse_worse(before: Checkpoint, after: Checkpoint, moved: Mapping[str, str]) -> None:
    """Raises: PlanError for a finding that was none before; `moved` says of renamed layers and
    tensors what they were called."""
    found = findings(after)
    if not found:
        return
    known = findings(before)
    were = {(finding.name, finding.layer) for finding in known}
    # What is told of layers that are not there has no name to follow.
    names = {*by_layer(before), *before.specs}
    absent = {finding.name for finding in known if finding.layer not in names}
    there = {*by_layer(after), *after.specs}
    worse = [
        finding
        for finding in found
        if (finding.name, finding.layer and moved.get(finding.layer, finding.layer)) not in were
        and (finding.layer in there or finding.name not in absent)
    ]
    if worse:
        raise _broken(worse)


def _broken(worse: Sequence[Finding]) -> PlanError:
    first = worse[0]
    more = f", and {len(worse) - 1} more of the kind" if len(worse) > 1 else ""
    if first.name in _OF_THE_MODEL:
        hint = "leave what the model needs"
    else:
        hint = (
            "take or leave a quantized layer as a whole (its weight, scales and marker), or make it"
            " plain with `cq quant --format bf16`"
        )
    return PlanError(
        f"this edit would make what `cq verify` calls broken: {first}{more} (`{first.name}`)",
        where=None if first.layer is None else printable(first.layer),
        hint=f"{hint}; `--allow-broken` does it all the same",
        code="plan.broken_layer",
    )
