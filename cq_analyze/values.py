"""What only the bytes of a quantized checkpoint tell.

Owns the reading: scales and plain tensors that are not finite, what quantized layers decode to, and
how near that is to a reference. Works part by part through the engine, in bounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq.core.checkpoint import Checkpoint, Part, Piece
from cq.core.comfy import MARKER, WEIGHT
from cq.core.dtypes import DTYPES, TensorSpec
from cq.core.engine import local
from cq.core.source import largest_cut
from cq_analyze.metrics import Sums, pooled, sums
from cq_analyze.reference import Reference, Rows, segments
from cq_analyze.report import Comparison, Finding, finding
from cq_analyze.structure import Marked, Structure, is_code, is_scale

if TYPE_CHECKING:
    import torch

# A wrong decoding (a lost rotation, foreign scales) is off by as much as the weight itself;
# rounding, even to two bits, is not.
_UNLIKE = 0.5
# Per element of a segment: codes as float32, scaled, rotated, and a rotation's block
_BYTES_PER_ELEMENT = 4 + 4 + 4 + 4
_BYTES_METRICS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one task found: of a layer (then `layer` names it) or of plain tensors (`compared`)."""

    findings: tuple[Finding, ...] = ()
    layer: str | None = None
    fidelity: Sums | None = None
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
) -> list[Outcome]:
    """Read everything that has something to tell, once. The outcomes are in the order of the tasks,
    whichever worker was first."""
    tasks = list(_tasks(checkpoint, structure, reference))
    outcomes: list[Outcome | None] = [None] * len(tasks)

    def work(job: local.Job) -> None:
        outcomes[job.index] = tasks[job.index].work(job)
        job.advance(job.part.nbytes)

    local.run([task.part for task in tasks], work, settings)
    return [outcome for outcome in outcomes if outcome is not None]


def _tasks(
    checkpoint: Checkpoint, structure: Structure, reference: Reference | None
) -> Iterator[_Task]:
    done: set[str] = set()
    for marked in structure.marked:
        if marked.sound and marked.format is not None:
            layer = _Layer(checkpoint, marked, reference)
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
    return DTYPES[dtype].is_float or dtype.startswith(("F8_E4M3", "F8_E5M2"))


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
        """Count in `scale`. A block scale in 8 bits is zero for a block of zeros."""
        self._nonfinite += _nonfinite(scale)
        bad = scale.float() < 0 if scale.element_size() == 1 else scale <= 0
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
    marked: Marked
    reference: Reference | None

    @property
    def weight(self) -> str:
        return self.marked.layer + WEIGHT

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that make up the weight, by full name."""
        return {
            f"{self.marked.layer}.{name}": spec
            for name, spec in self.marked.stored.items()
            if is_code(name)
        }

    @property
    def held(self) -> bool:
        """Whether codes must be held until their scales come, because one part produces both."""
        return any(
            n in self.specs for n in self.checkpoint.part(self.weight).tensors if n != self.weight
        )

    def part(self) -> Part:
        """The task as the engine sees it."""
        specs, source = self.specs, self.checkpoint.part(self.weight)
        nbytes_scales = sum(spec.nbytes for name, spec in specs.items() if name != self.weight)
        nbytes = source.nbytes_peak + 2 * nbytes_scales + _BYTES_METRICS
        if self.held:
            nbytes += specs[self.weight].nbytes
        elements = largest_cut(specs[self.weight])
        found = None if self.reference is None else self.reference.find(self.weight)
        if self.reference is not None and found is not None:
            nbytes += self.reference.nbytes_peak(found)
            elements = max(elements, largest_cut(self.reference.spec(found)))
        return Part(
            tensors=specs,
            nbytes_peak=nbytes + elements * _BYTES_PER_ELEMENT,
            produce=source.produce,
        )

    def inspect(self, job: local.Job) -> Outcome:
        """The scales, then the weight segment by segment."""
        segments, others = self._read()
        faults: list[Finding] = []
        for name, whole in others.items():
            if is_scale(name.rpartition(".")[2]) and _may_be_nonfinite(self.specs[name].dtype):
                checked = _ScaleFault()
                checked.add(whole)
                fault = checked.finding(name)
                faults += [] if fault is None else [fault]
        if faults:
            return Outcome(findings=tuple(faults), layer=self.marked.layer)
        rows, mismatch = self._counterpart()
        total, faults = self._decode(job, segments, others, rows)
        faults += [] if mismatch is None else [mismatch]
        return Outcome(findings=tuple(faults), layer=self.marked.layer, fidelity=total)

    def _read(self) -> tuple[Iterable[torch.Tensor], dict[str, torch.Tensor]]:
        """The weight's segments, and the whole tensors beside it; each part is produced once."""
        import torch

        weight_part = self.checkpoint.part(self.weight)
        pieces: dict[str, list[torch.Tensor]] = {name: [] for name in self.specs}
        parts = {id(part): part for part in map(self.checkpoint.part, self.specs)}
        if not self.held:
            del parts[id(weight_part)]
        for part in parts.values():
            for piece in local.checked(part):
                if piece.name in pieces:
                    pieces[piece.name].append(piece.tensor)
        codes = pieces.pop(self.weight)
        others = {n: p[0] if len(p) == 1 else torch.cat(p) for n, p in pieces.items()}
        return (codes if self.held else segments(weight_part, self.weight)), others

    def _counterpart(self) -> tuple[Rows | None, Finding | None]:
        """The reference's rows of this weight, or why there are none to compare with."""
        if self.reference is None:
            return None, None
        found = self.reference.find(self.weight)
        if found is None:
            return None, finding("reference.missing", self.marked.layer, "is not in the reference")
        spec, own = self.reference.spec(found), self.specs[self.weight]
        if len(spec.shape) != 2 or spec.shape[0] != own.shape[0]:
            return None, self._other_shape(list(own.shape), spec)
        return self.reference.rows(found), None

    def _other_shape(self, own: list[int], other: TensorSpec) -> Finding:
        told = f"has the shape {own}, but {list(other.shape)} in the reference"
        return finding("reference.shape", self.marked.layer, told)

    def _decode(
        self,
        job: local.Job,
        segments: Iterable[torch.Tensor],
        others: dict[str, torch.Tensor],
        rows: Rows | None,
    ) -> tuple[Sums | None, list[Finding]]:
        """Decode every segment; the sums against the reference, if the comparison is sound."""
        start = nonfinite = 0
        found: list[Sums] = []
        for codes in segments:
            if job.stop.is_set():
                raise local.Stop
            bad, features, measured = self._segment(codes, start, others, rows)
            if rows is not None and measured is None:
                assert self.reference is not None
                other = self.reference.spec(self.reference.find(self.weight) or self.weight)
                own = [self.specs[self.weight].shape[0], features]
                return None, [self._other_shape(own, other)]
            nonfinite += bad
            found += [] if measured is None else [measured]
            start += codes.shape[0]
        if nonfinite:
            told = f"decodes to {nonfinite} values that are not finite"
            return None, [finding("values.range", self.marked.layer, told)]
        return (None, []) if rows is None else self._judged(pooled(found))

    def _segment(
        self, codes: torch.Tensor, start: int, others: dict[str, torch.Tensor], rows: Rows | None
    ) -> tuple[int, int, Sums | None]:
        """Of the rows from `start` on: how many values are not finite, K, and the sums.

        The sums are None if there is nothing of that K to compare with.

        A function of its own, so that one segment's float tensors are gone before the next's come.
        """
        assert self.marked.format is not None
        total_rows, stop = self.specs[self.weight].shape[0], start + codes.shape[0]
        stored = {"weight": codes}
        for name, tensor in others.items():
            by_row = tensor.shape[:1] == (total_rows,)
            stored[name.rpartition(".")[2]] = tensor[start:stop] if by_row else tensor
        value = self.marked.format.unpack(stored, self.marked.settings)
        expected = None if rows is None else rows.like(value)
        comparable = expected is not None and expected.shape == value.shape
        measured = sums(expected, value) if expected is not None and comparable else None
        return _nonfinite(value), value.shape[1], measured

    def _judged(self, total: Sums) -> tuple[Sums | None, list[Finding]]:
        if not math.isfinite(total.reference_energy):
            told = "has values in the reference that are not finite"
            return None, [finding("reference.nonfinite", self.marked.layer, told)]
        if total.relative_error <= _UNLIKE:
            return total, []
        cosine = "" if total.cosine is None else f", cosine {total.cosine:.3f}"
        told = (
            "decodes to something else than the reference's weight"
            f" (relative error {total.relative_error:.3g}{cosine})"
        )
        return total, [finding("values.unlike", self.marked.layer, told)]


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
