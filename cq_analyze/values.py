"""What only the bytes of a quantized checkpoint tell.

Owns the reading: scales and plain tensors that are not finite, what quantized layers decode to, and
how near that is to a reference. Works part by part through the engine, in bounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.comfy import MARKER
from cq.core.dequantize import Decoder
from cq.core.dtypes import DTYPES, TensorSpec
from cq.core.engine import local
from cq.core.rows import Rows
from cq.core.source import largest_cut
from cq.core.stored import Stored, is_scale, matrix_specs
from cq_analyze.agreement import Agreement
from cq_analyze.diagnosis import diagnose
from cq_analyze.metrics import Sums, pooled, sums
from cq_analyze.reference import Reference
from cq_analyze.report import Comparison, Finding, finding
from cq_analyze.structure import Structure
from cq_analyze.survival import Survival, survival, together

if TYPE_CHECKING:
    import torch

# A wrong decoding (a lost rotation, foreign scales) is off by as much as the weight itself;
# rounding, even to two bits, is not.
_UNLIKE = 0.5
_BYTES_METRICS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one task found: of a layer (then `layer` names it) or of plain tensors (`compared`)."""

    findings: tuple[Finding, ...] = ()
    layer: str | None = None
    fidelity: Sums | None = None
    survival: Survival | None = None
    compared: tuple[Comparison, ...] = ()


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
            plain = _Plain(part, frozenset(told), structure.coded, reference)
            yield _Task(plain.part(), plain.inspect)


def _tells(name: str, spec: TensorSpec, structure: Structure, reference: Reference | None) -> bool:
    """Whether a tensor that no sound layer owns has something to tell."""
    if DTYPES[spec.dtype].torch_name is None or name.endswith(MARKER):
        return False
    if _may_be_nonfinite(spec.dtype):
        return True
    return (
        reference is not None and name not in structure.coded and reference.find(name) is not None
    )


def _may_be_nonfinite(dtype: str) -> bool:
    return DTYPES[dtype].is_float or dtype.startswith("F8_")


def _nonfinite(tensor: torch.Tensor) -> int:
    """Number of NaN and infinite elements."""
    import torch

    if tensor.element_size() == 1:
        tensor = tensor.float()
    # One pass in the usual case; a sum that overflows costs the exact count.
    if math.isfinite(float(tensor.sum())):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


class _ScaleFault:
    """Counts what a scale must not be, segment by segment."""

    def __init__(self) -> None:
        self._nonfinite = 0
        self._not_positive = 0

    def add(self, scale: torch.Tensor) -> None:
        """Count in `scale`. Block scales, which have fewer bits, are zero for equal weights."""
        self._nonfinite += _nonfinite(scale)
        bad = scale.float() < 0 if scale.element_size() < 4 else scale <= 0
        self._not_positive += int(bad.sum())

    def finding(self, name: str) -> Finding | None:
        """The finding about the tensor `name`, if there is one."""
        counts = [
            (self._nonfinite, "not finite"),
            (self._not_positive, "zero or negative"),
        ]
        told = " and ".join(f"{count} that are {what}" for count, what in counts if count)
        layer, _, own = name.rpartition(".")
        return finding("scale.value", layer, f"has scales in `{own}`, {told}") if told else None


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
        nbytes = decoder.nbytes_peak + _BYTES_METRICS + 4 * 4 * elements
        for other in (self.reference, self.base):
            found = None if other is None else other.find(self._weight)
            if other is not None and found is not None:
                nbytes += other.nbytes_peak(found) + largest_cut(other.spec(found)) * 8
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
        decoder = Decoder(self.checkpoint, self.stored, shape, agreement.see)
        segments, beside = decoder.read()
        faults = list(self._scale_faults(beside))
        if faults:
            return Outcome(findings=tuple(faults), layer=layer)
        comparison = _Comparison(self.reference, found, self._changed(shape, found))
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
        )

    def _scale_faults(self, beside: Mapping[str, torch.Tensor]) -> Iterator[Finding]:
        for own, whole in beside.items():
            if is_scale(own) and _may_be_nonfinite(self.stored.tensors[own].dtype):
                checked = _ScaleFault()
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
        if spec.shape == own or _is_padded(self.stored, spec):
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
        self, reference: Reference | None, found: str | None, base: Rows | None = None
    ) -> None:
        rows = None if reference is None or found is None else reference.rows(found)
        self._rows: Rows | None = rows
        self._base = base
        self._nonfinite = 0
        self._sums: list[Sums] = []
        self._survival: list[Survival] = []

    def add(self, value: torch.Tensor) -> None:
        """Look at the next segment."""
        self._nonfinite += _nonfinite(value)
        if self._rows is None:
            return
        other = self._rows.like(value)
        self._sums.append(sums(other, value))
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
    def unlike(self) -> bool:
        """Whether this is another weight than the reference's."""
        total = self.fidelity
        return total is not None and not total.relative_error <= _UNLIKE

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


def _is_padded(stored: Stored, reference: TensorSpec) -> bool:
    """Whether the stored weight is the reference's with padding."""
    weight, plug = stored.weight, stored.format
    if len(reference.shape) != len(weight.shape) or len(weight.shape) not in {2, 3}:
        return False
    if len(weight.shape) == 3:
        if reference.shape[0] != weight.shape[0]:
            return False
        reference = TensorSpec(reference.dtype, reference.shape[1:])
    own = matrix_specs(stored.tensors)["weight"].shape
    return any(
        plug.refuse(reference, scaling, None) is None
        and plug.tensors(reference, scaling)["weight"].shape == own
        for scaling in plug.scalings
    )


@dataclass(frozen=True, slots=True)
class _Plain:
    """Tensors of one part that no sound layer owns: they must be finite, and are compared if the
    reference has them."""

    source: Part
    names: frozenset[str]
    coded: frozenset[str]
    reference: Reference | None

    def part(self) -> Part:
        """The task as the engine sees it."""
        tensors = {n: spec for n, spec in self.source.tensors.items() if n in self.names}
        found = [name for name in map(self._counterpart, tensors) if name is not None]
        nbytes = self.source.nbytes_peak + _BYTES_METRICS
        nbytes += 2 * max(largest_cut(spec) * 4 for spec in tensors.values())
        if self.reference is not None:
            nbytes += sum(map(self.reference.nbytes_peak, found))
        return Part(tensors=tensors, nbytes_peak=nbytes, produce=self.source.produce)

    def _counterpart(self, name: str) -> str | None:
        if self.reference is None or name in self.coded:
            return None
        return self.reference.find(name)

    def inspect(self, job: local.Job) -> Outcome:
        """All tensors in one pass over the part."""
        states = {
            name: _PlainTensor(
                name, self.source.tensors[name], self.coded, self.reference, self._counterpart(name)
            )
            for name in self.source.tensors
            if name in self.names
        }
        for piece in local.checked(self.source):
            if job.stop.is_set():
                raise local.Stop
            if piece.name in states:
                states[piece.name].add(piece)
        findings = [found for state in states.values() for found in state.findings()]
        compared = [found for state in states.values() if (found := state.compared()) is not None]
        return Outcome(findings=tuple(findings), compared=tuple(compared))


class _PlainTensor:
    """One tensor on its way through `_Plain.inspect`."""

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        coded: frozenset[str],
        reference: Reference | None,
        counterpart: str | None,
    ) -> None:
        self._name = name
        self._spec = spec
        is_faulty_scale = name in coded and is_scale(name.rpartition(".")[2])
        self._scale = _ScaleFault() if is_faulty_scale else None
        self._nonfinite = 0
        self._same = True
        self._sums: list[Sums] = []
        self._other: TensorSpec | None = None
        self._rows: Rows | None = None
        if reference is not None and counterpart is not None:
            self._other = reference.spec(counterpart)
            if self._other.shape == spec.shape:
                self._rows = reference.rows(counterpart)

    def add(self, piece: Piece) -> None:
        """Look at the next segment."""
        import torch

        if _may_be_nonfinite(self._spec.dtype):
            if self._scale is not None:
                self._scale.add(piece.tensor)
            else:
                self._nonfinite += _nonfinite(piece.tensor)
        if self._rows is None:
            return
        other = self._rows.like(piece.tensor)
        if other.dtype != piece.tensor.dtype or not torch.equal(_raw(other), _raw(piece.tensor)):
            self._same = False
        if not other.is_complex() and not piece.tensor.is_complex():
            self._sums.append(sums(other, piece.tensor))

    def findings(self) -> Iterator[Finding]:
        """What is wrong with the tensor."""
        if self._scale is not None:
            found = self._scale.finding(self._name)
            if found is not None:
                yield found
        if self._nonfinite:
            told = f"holds {self._nonfinite} values that are not finite"
            yield finding("values.nonfinite", self._name, told)
        if self._other is not None and self._other.shape != self._spec.shape:
            own, other = list(self._spec.shape), list(self._other.shape)
            told = f"has the shape {own}, but {other} in the reference"
            yield finding("reference.shape", self._name, told)

    def compared(self) -> Comparison | None:
        """The comparison, if there was one."""
        if self._rows is None or self._other is None:
            return None
        return Comparison(
            name=self._name,
            dtype=self._spec.dtype,
            reference_dtype=self._other.dtype,
            same=self._same,
            fidelity=pooled(self._sums) if self._sums else None,
        )


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.reshape(-1).view(torch.uint8)
