"""What only the bytes of a quantized checkpoint tell.

Owns the order of the reading, and the quantized layers: their scales, what they decode to, and how
near that is to a reference. Works part by part through the engine, in bounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cq.core.checkpoint import Checkpoint, Part
from cq.core.comfy import MARKER
from cq.core.dequantize import Decoder
from cq.core.dtypes import DTYPES, TensorSpec
from cq.core.engine import local
from cq.core.rows import Rows
from cq.core.source import largest_cut
from cq.core.stored import Stored, is_scale
from cq_analyze.agreement import Agreement
from cq_analyze.diagnosis import diagnose
from cq_analyze.faults import BYTES_METRICS, Outcome, ScaleFault, may_be_nonfinite, nonfinite
from cq_analyze.metrics import Sums, pooled, sums
from cq_analyze.outputs import Judge, OutputError
from cq_analyze.plain import Plain
from cq_analyze.reference import Reference, is_padded
from cq_analyze.report import UNLIKE, Finding, finding
from cq_analyze.structure import Structure
from cq_analyze.survival import Survival, survival, together

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Task:
    """Work for the engine, which knows it by a part: what it reads and what it holds at most."""

    part: Part
    work: Callable[[local.Job], Outcome]


def inspect(
    checkpoint: Checkpoint,
    structure: Structure,
    reference: Reference | None,
    settings: local.Settings,
    *,
    base: Reference | None = None,
) -> list[Outcome]:
    """Read everything that has something to tell, once. The outcomes are in the order of the tasks,
    whichever worker was first."""
    tasks = list(_tasks(checkpoint, structure, reference, base))
    outcomes: list[Outcome | None] = [None] * len(tasks)

    def work(job: local.Job) -> None:
        outcomes[job.index] = tasks[job.index].work(job)
        job.advance(job.part.nbytes)

    local.run([task.part for task in tasks], work, settings)
    return [outcome for outcome in outcomes if outcome is not None]


def _tasks(
    checkpoint: Checkpoint,
    structure: Structure,
    reference: Reference | None,
    base: Reference | None,
) -> Iterator[_Task]:
    done: set[str] = set()
    for marked in structure.marked:
        if marked.stored is not None:
            layer = _Layer(checkpoint, marked.stored, reference, base)
            task = layer.part()
            done.update(task.tensors)
            yield _Task(task, layer.inspect)
    for part in checkpoint.parts:
        names = [name for name in part.tensors if name not in done]
        told = {name for name in names if _tells(name, part.tensors[name], structure, reference)}
        if told:
            plain = Plain(part, frozenset(told), structure.coded, reference)
            yield _Task(plain.part(), plain.inspect)


def _tells(name: str, spec: TensorSpec, structure: Structure, reference: Reference | None) -> bool:
    """Whether a tensor that no sound layer owns has something to tell."""
    if DTYPES[spec.dtype].torch_name is None or name.endswith(MARKER):
        return False
    if may_be_nonfinite(spec.dtype):
        return True
    return (
        reference is not None and name not in structure.coded and reference.find(name) is not None
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """A sound layer: its scales are checked, its weight is decoded and compared."""

    checkpoint: Checkpoint
    stored: Stored
    reference: Reference | None
    base: Reference | None

    @property
    def _weight(self) -> str:
        return self.stored.names["weight"]

    def part(self) -> Part:
        """The task as the engine sees it."""
        names = self.stored.names
        decoder = Decoder(self.checkpoint, self.stored, self.stored.shape)
        # A decoded segment and what became of it, the share of it of comfy-kitchen, and those of
        # the reference and the base
        elements = largest_cut(TensorSpec("F32", self.stored.shape))
        nbytes = decoder.nbytes_peak + BYTES_METRICS + 4 * 4 * elements
        for other in (self.reference, self.base):
            found = None if other is None else other.find(self._weight)
            if other is not None and found is not None:
                nbytes += other.nbytes_peak(found) + largest_cut(other.spec(found)) * 8
        nbytes += 0 if self.reference is None else self.reference.nbytes_judging(self.stored.layer)
        return Part(
            tensors={name: self.stored.tensors[own] for own, name in names.items()},
            nbytes_peak=nbytes,
            produce=self.checkpoint.part(self._weight).produce,
        )

    def inspect(self, job: local.Job) -> Outcome:
        """The scales, then the weight segment by segment."""
        layer = self.stored.layer
        found, shape, mismatch = self._counterpart()
        agreement = Agreement(self.stored)
        decoder = Decoder(self.checkpoint, self.stored, shape, agreement)
        segments, beside = decoder.read()
        faults = list(self._scale_faults(beside))
        if faults:
            return Outcome(findings=tuple(faults), layer=layer)
        judge = None
        if self.reference is not None and found is not None:
            judge = self.reference.judge(layer, shape)
        comparison = _Comparison(self.reference, found, self._changed(shape, found), judge)
        for value in decoder.rows(segments, beside):
            if job.stop.is_set():
                raise local.Stop
            comparison.add(value)
        faults = [f for f in (comparison.fault(layer), mismatch, agreement.finding()) if f]
        if comparison.unlike and found is not None and self.reference is not None:
            rows = partial(self.reference.rows, found)
            why = diagnose(self.checkpoint, self.stored, shape, rows)
            faults = faults if why is None else [why, *faults[1:]]
        return Outcome(
            findings=tuple(faults),
            layer=layer,
            fidelity=comparison.fidelity,
            survival=comparison.survival,
            output=comparison.output,
        )

    def _scale_faults(self, beside: Mapping[str, torch.Tensor]) -> Iterator[Finding]:
        for own, whole in beside.items():
            if is_scale(own) and may_be_nonfinite(self.stored.tensors[own].dtype):
                checked = ScaleFault()
                checked.add(whole)
                fault = checked.finding(self.stored.names[own])
                if fault is not None:
                    yield fault

    def _counterpart(self) -> tuple[str | None, tuple[int, ...], Finding | None]:
        """The reference's name for this weight, or why there is none to compare with; and the
        weight's shape, which the reference knows without padding."""
        layer, own = self.stored.layer, self.stored.shape
        if self.reference is None:
            return None, own, None
        found = self.reference.find(self._weight)
        if found is None:
            return None, own, finding("reference.missing", layer, "is not in the reference")
        spec = self.reference.spec(found)
        if spec.shape == own or is_padded(self.stored, spec):
            return found, spec.shape, None
        told = f"has the shape {list(own)}, but {list(spec.shape)} in the reference"
        return None, own, finding("reference.shape", layer, told)

    def _changed(self, shape: tuple[int, ...], found: str | None) -> Rows | None:
        """The base's rows of this weight, if there is a reference that may have changed them."""
        if self.base is None or found is None:
            return None
        name = self.base.find(self._weight)
        if name is None or self.base.spec(name).shape != shape:
            return None
        return self.base.rows(name)


class _Comparison:
    """A decoded weight beside its reference and its base, segment by segment."""

    def __init__(
        self,
        reference: Reference | None,
        found: str | None,
        base: Rows | None,
        judge: Judge | None,
    ) -> None:
        rows = None if reference is None or found is None else reference.rows(found)
        self._rows: Rows | None = rows
        self._base = base
        self._judge = judge
        self._nonfinite = 0
        self._sums: list[Sums] = []
        self._survival: list[Survival] = []

    def add(self, value: torch.Tensor) -> None:
        """Look at the next segment."""
        self._nonfinite += nonfinite(value)
        if self._rows is None:
            return
        other = self._rows.like(value)
        self._sums.append(sums(other, value))
        if self._judge is not None:
            self._judge.add(other, value)
        if self._base is not None:
            self._survival.append(survival(self._base.like(value), other, value))

    @property
    def _total(self) -> Sums | None:
        return pooled(self._sums) if self._sums else None

    @property
    def fidelity(self) -> Sums | None:
        """The sums against the reference, if both are finite."""
        total = self._total
        if total is None or self._nonfinite or not math.isfinite(total.reference_energy):
            return None
        return total

    @property
    def survival(self) -> Survival | None:
        """What remains of the change from the base to the reference, if there is one."""
        if not self._survival or self.fidelity is None:
            return None
        return together(self._survival)

    @property
    def output(self) -> OutputError | None:
        """The error of the layer's output, if its inputs were recorded."""
        return None if self._judge is None or self.fidelity is None else self._judge.found

    @property
    def unlike(self) -> bool:
        """Whether this is another weight than the reference's."""
        total = self.fidelity
        return total is not None and not total.relative_error <= UNLIKE

    def fault(self, layer: str) -> Finding | None:
        """What is wrong with the values."""
        if self._nonfinite:
            told = f"decodes to {self._nonfinite} values that are not finite"
            return finding("values.range", layer, told)
        total = self._total
        if total is not None and not math.isfinite(total.reference_energy):
            told = "has values in the reference that are not finite"
            return finding("reference.nonfinite", layer, told)
        if total is None or not self.unlike:
            return None
        cosine = "" if total.cosine is None else f", cosine {total.cosine:.3f}"
        told = (
            "decodes to something else than the reference's weight"
            f" (relative error {total.relative_error:.3g}{cosine})"
        )
        return finding("values.unlike", layer, told)
