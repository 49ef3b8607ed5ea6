"""How much each adapter changes: ‖Δ‖ against ‖W‖, measured on the weights themselves.

Owns what `--explain` says beyond the plan. Reads the weights that change, and nothing else.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.engine import local
from cq.core.errors import InternalError
from cq.core.source import largest_cut
from cq_merge.changes import NBYTES_RUN, runs, squared
from cq_merge.notes import layer_of
from cq_merge.stage import MergePlan, MergeStage
from cq_merge.weights import Merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one adapter does to one tensor: norms of its change and of the rows it belongs to."""

    adapter: int
    tensor: str
    change: float
    weight: float

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖W‖; infinite for a change to zeros."""
        if self.weight:
            return self.change / self.weight
        return math.inf if self.change else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The effects of all adapters, tensor by tensor in the checkpoint's order."""

    effects: tuple[Effect, ...]
    adapters: int = field(default=0)

    def of(self, adapter: int) -> dict[str, Any]:
        """An adapter's relative size over all tensors that it changes, the tensor where it is
        largest, and those where it exceeds the weight, as plain JSON."""
        own = [effect for effect in self.effects if effect.adapter == adapter]
        most = max(own, key=lambda effect: effect.relative, default=None)
        weight = math.sqrt(sum(effect.weight**2 for effect in own))
        change = math.sqrt(sum(effect.change**2 for effect in own))
        saturated = [layer_of(effect.tensor) for effect in own if effect.relative > 1]
        return {
            "relative": _json(change / weight if weight else (math.inf if change else 0.0)),
            "largest": None if most is None else _json(most.relative),
            "largest_layer": None if most is None else layer_of(most.tensor),
            "saturated": saturated,
        }


def explain(
    merged: Checkpoint,
    base: Checkpoint,
    *,
    workers: int | None = None,
    memory_limit: int | None = None,
    on_progress: Callable[[local.Progress], None] | None = None,
) -> Explanation:
    """Measure what a merge does: `merged` is what `merge` made of `base`.

    Raises: as producing the merged weights.
    """
    plan = _plan(merged, base)
    found: dict[str, list[Effect]] = {}
    lock = threading.Lock()

    def work(job: local.Job) -> None:
        own = list(_effects(plan.merged[job.part.name]))
        with lock:
            found[job.part.name] = own
        job.advance(job.part.nbytes)

    settings = local.Settings(workers=workers, memory_limit=memory_limit, on_progress=on_progress)
    local.run([_part(plan, name) for name in plan.merged], work, settings)
    effects = (effect for name in plan.merged for effect in found[name])
    return Explanation(effects=tuple(effects), adapters=len(plan.adapters))


def _plan(merged: Checkpoint, base: Checkpoint) -> MergePlan:
    """The plan of the last merge, on what it was applied to: the base, perhaps dequantized."""
    source = base
    for stage in merged.stages[len(base.stages) :]:
        if isinstance(stage, MergeStage):
            return stage.plan(source)
        source = stage.apply(source)
    raise InternalError("a checkpoint without a merge is to be explained")


def _part(plan: MergePlan, name: str) -> Part:
    merged = plan.merged[name]

    def nothing() -> Iterator[Piece]:
        return iter(())

    # Beside what merging holds: the change of one adapter at a time, as large as the rows.
    beside = merged.after.numel if merged.whole else largest_cut(merged.before)
    return Part(
        tensors={name: merged.after},
        nbytes_peak=merged.nbytes_peak + beside * merged.itemsize + NBYTES_RUN,
        produce=nothing,
    )


def _effects(merged: Merged) -> Iterator[Effect]:
    """Each adapter's change by itself, made to the weight as it was."""
    import torch

    change: dict[int, float] = defaultdict(float)
    weight: dict[int, float] = defaultdict(float)
    loaded = merged.load()
    for start, base in merged.spans():
        for number in sorted({own.placed.adapter for own in loaded}):
            delta = torch.zeros_like(base)
            covered = torch.zeros(len(base), dtype=torch.bool)
            for own in loaded:
                if own.placed.adapter == number:
                    merged.add(own, base, delta, start)
                    low = max(0, own.placed.start - start)
                    covered[low : max(0, own.placed.start + own.placed.count - start)] = True
            change[number] += squared(delta)
            for first, stop in runs(*base.shape):
                weight[number] += squared(base[first:stop][covered[first:stop]])
    for number, size in change.items():
        yield Effect(
            adapter=number,
            tensor=merged.name,
            change=math.sqrt(size),
            weight=math.sqrt(weight[number]),
        )


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
