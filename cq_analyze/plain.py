"""Tensors that no sound quantized layer owns: biases, norms, layers that kept their precision.

Owns what is wrong with their values, and whether they are the reference's. Works part by part, in
bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cq.core.checkpoint import Part, Piece
from cq.core.dtypes import TensorSpec
from cq.core.engine import local
from cq.core.rows import Rows
from cq.core.source import largest_cut
from cq.core.stored import is_scale
from cq_analyze.faults import BYTES_METRICS, Outcome, ScaleFault, may_be_nonfinite, nonfinite
from cq_analyze.metrics import Sums, pooled, sums
from cq_analyze.reference import Reference
from cq_analyze.report import Comparison, Finding, finding

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Plain:
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
        nbytes = self.source.nbytes_peak + BYTES_METRICS
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
        self._scale = ScaleFault() if is_faulty_scale else None
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

        if may_be_nonfinite(self._spec.dtype):
            if self._scale is not None:
                self._scale.add(piece.tensor)
            else:
                self._nonfinite += nonfinite(piece.tensor)
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
