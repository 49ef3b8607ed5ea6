"""What `verify` found, as values: findings, layers, fidelity, gates, and their JSON."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cq.core import select
from cq.core.dtypes import TensorSpec
from cq.core.text import printable
from cq_analyze import findings
from cq_analyze.metrics import Sums, finite, pooled
from cq_analyze.outputs import OutputError, mean_error
from cq_analyze.survival import Survival, together

if TYPE_CHECKING:
    from cq_analyze.images import Pictures
    from cq_analyze.renders import Renders

WORST_LAYERS = 10
WORST_TENSORS = 5
# A wrong decoding (a lost rotation, foreign scales) is off by as much as the weight itself;
# rounding, even to two bits, is not.
UNLIKE = 0.5
_NUMBER = re.compile(r"([0-9]{1,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Why a checkpoint does not verify, and what to do.

    `name` is a slug, `layer` the layer or tensor, None for the file as a whole. `sentence` is a
    predicate whose subject is the layer ("has no `weight_scale`"), or a whole sentence if there is
    none.
    """

    name: str
    layer: str | None
    sentence: str
    mend: str

    def __str__(self) -> str:
        return self.sentence if self.layer is None else f"`{printable(self.layer)}` {self.sentence}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "name": self.name,
            "layer": self.layer,
            "sentence": self.sentence,
            "mend": self.mend,
        }


def finding(name: str, layer: str | None, sentence: str, mend: str | None = None) -> Finding:
    """The finding `name`, with the usual advice for its kind unless `mend` gives another."""
    return Finding(name=name, layer=layer, sentence=sentence, mend=mend or findings.mend(name))


def natural(name: str) -> tuple[str | int, ...]:
    """A sort key that counts: `blocks.2` before `blocks.10`.

    >>> sorted(["b.10", "b.2", "a"], key=natural)
    ['a', 'b.2', 'b.10']
    """
    return tuple(int(t) if i % 2 else t for i, t in enumerate(_NUMBER.split(name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer that says it is quantized. `format`, `weight` are None where the file does not tell;
    `fidelity` where it was not measured, `survival` without a base, `output` where its inputs were
    not recorded. `role` is what it is in its
    model: `linear`, `embedding`, or what the family says."""

    layer: str
    role: str
    format: str | None
    settings: Mapping[str, Any]
    weight: TensorSpec | None
    nbytes: int
    fidelity: Sums | None = None
    survival: Survival | None = None
    output: OutputError | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "layer": self.layer,
            "role": self.role,
            "format": self.format,
            "settings": dict(self.settings),
            "dtype": None if self.weight is None else self.weight.dtype,
            "shape": None if self.weight is None else list(self.weight.shape),
            "nbytes": self.nbytes,
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "survival": None if self.survival is None else self.survival.to_dict(),
            "output": None if self.output is None else self.output.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The quantized layers against the reference; `layers` are those that were measured."""

    layers: tuple[Layer, ...]

    @property
    def overall(self) -> Sums:
        """All layers as one array: big layers count more."""
        return pooled(self._sums())

    @property
    def mean_sqnr(self) -> float | None:
        """Mean over layers, each counting the same, exact ones left out.

        Units: dB.
        """
        values = [s.sqnr for s in self._sums() if math.isfinite(s.sqnr)]
        return math.fsum(values) / len(values) if values else None

    @property
    def min_sqnr(self) -> float | None:
        """The worst layer's; infinite if every layer is exact.

        Units: dB.
        """
        return min((s.sqnr for s in self._sums()), default=None)

    @property
    def worst(self) -> tuple[Layer, ...]:
        """Up to ten layers that are not exact, worst SQNR first."""
        inexact = [layer for layer in self.layers if layer.fidelity and not layer.fidelity.exact]
        inexact.sort(key=lambda layer: layer.fidelity.sqnr if layer.fidelity else 0.0)
        return tuple(inexact[:WORST_LAYERS])

    @property
    def roles(self) -> dict[str, Sums]:
        """All layers of a role as one array, by role."""
        roles = sorted({layer.role for layer in self.layers})
        return {
            role: pooled(x.fidelity for x in self.layers if x.role == role and x.fidelity)
            for role in roles
        }

    @property
    def survival(self) -> Survival | None:
        """What remains of the change from the base, over all layers; None without a base."""
        found = [layer.survival for layer in self.layers if layer.survival is not None]
        return together(found) if found else None

    @property
    def worst_outputs(self) -> tuple[tuple[Layer, OutputError], ...]:
        """Up to ten layers whose outputs are not exact, the largest output error first."""
        found = [(x, x.output) for x in self.layers if x.output and x.output.lost > 0]
        return tuple(sorted(found, key=lambda one: -one[1].relative_error)[:WORST_LAYERS])

    @property
    def outputs(self) -> tuple[OutputError, ...]:
        """Of the layers whose inputs were recorded."""
        return tuple(layer.output for layer in self.layers if layer.output is not None)

    def _sums(self) -> list[Sums]:
        return [layer.fidelity for layer in self.layers if layer.fidelity is not None]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            **self.overall.to_dict(),
            "layers": len(self.layers),
            "mean_sqnr_db": self.mean_sqnr,
            "min_sqnr_db": finite(self.min_sqnr),
            "worst": [
                {"layer": layer.layer, **layer.fidelity.to_dict()}
                for layer in self.worst
                if layer.fidelity is not None
            ],
            "roles": {role: sums.to_dict() for role, sums in self.roles.items()},
            "survival": None if self.survival is None else self.survival.to_dict(),
            "output": self._output(),
        }

    def _output(self) -> dict[str, Any] | None:
        found = self.outputs
        if not found:
            return None
        return {
            "layers": len(found),
            "mean_error": mean_error(found),
            "worst": [{"layer": x.layer, **error.to_dict()} for x, error in self.worst_outputs],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A tensor that is not quantized, in the checkpoint and in the reference. `same` is equality of
    dtype and bytes; `fidelity` is None for dtypes without an order, such as C64."""

    name: str
    dtype: str
    reference_dtype: str
    same: bool
    fidelity: Sums | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "tensor": self.name,
            "dtype": self.dtype,
            "reference_dtype": self.reference_dtype,
            "relative_error": self.fidelity and finite(self.fidelity.relative_error),
            "max_abs_error": self.fidelity and finite(self.fidelity.max_abs_error),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Unquantized:
    """The tensors that are not quantized against the reference's: counts, and the changed ones, the
    largest relative error first."""

    same: int
    changed: tuple[Comparison, ...]
    only_here: int
    only_in_reference: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "same": self.same,
            "changed": len(self.changed),
            "only_here": self.only_here,
            "only_in_reference": self.only_in_reference,
            "worst": [changed.to_dict() for changed in self.changed[:WORST_TENSORS]],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A limit that every quantized layer, or every picture, must keep, and those that do not, worst
    first; a NaN stands for one that could not be measured. `of` is `layers` or `pictures`."""

    name: str
    limit: float
    measured: int
    failures: tuple[tuple[str, float], ...]
    of: str = "layers"

    @property
    def holds(self) -> bool:
        """Whether every layer keeps it. A gate that saw no layer has shown nothing: no."""
        return self.measured > 0 and not self.failures

    @property
    def count(self) -> int:
        """Those that must keep it."""
        return self.measured + sum(math.isnan(value) for _, value in self.failures)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "name": self.name,
            "of": self.of,
            "limit": self.limit,
            "holds": self.holds,
            "measured": self.measured,
            "failures": [
                {"layer": layer, "value": finite(value)} for layer, value in self.failures
            ],
        }


def gates(
    layers: Iterable[Layer],
    min_sqnr: float | None,
    max_error: float | None,
    max_output_error: float | None = None,
) -> list[Gate]:
    """The gates that were asked for, judged."""
    asked = list(layers)
    every = [layer for layer in asked if layer.fidelity is not None]
    unknown = tuple((layer.layer, math.nan) for layer in asked if layer.fidelity is None)
    levels = [(layer.layer, layer.fidelity.sqnr) for layer in every if layer.fidelity is not None]
    errors = [(x.layer, x.fidelity.relative_error) for x in every if x.fidelity is not None]
    outputs = [(x.layer, x.output.relative_error) for x in every if x.output is not None]
    found = []
    if min_sqnr is not None:
        low = sorted((f for f in levels if not f[1] >= min_sqnr), key=lambda failure: failure[1])
        found.append(
            Gate(name="min_sqnr", limit=min_sqnr, measured=len(levels), failures=(*unknown, *low))
        )
    for name, limit, measured in (
        ("max_error", max_error, errors),
        ("max_output_error", max_output_error, outputs),
    ):
        if limit is not None:
            high = sorted((f for f in measured if not f[1] <= limit), key=lambda f: -f[1])
            found.append(
                Gate(name=name, limit=limit, measured=len(measured), failures=(*unknown, *high))
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of `verify`. Layers and findings are in natural order of names, whatever computed
    them: equal checkpoints give equal reports.

    `checkpoint` is None where only pictures were compared. `first_comfyui` is the first ComfyUI
    release that knows all formats, None without a format of which that can be said;
    `custom_loaders` what the other formats need, by format; `kitchen` the version of comfy-kitchen
    that decoded the layers, too. `fail_on` are the patterns of the findings that count, None for
    all; `history` are the
    sources and stages that made the file, as its header has them.
    """

    checkpoint: str | None = None
    against: str | None = None
    base: str | None = None
    header_only: bool = False
    tensors: int = 0
    nbytes: int = 0
    layers: tuple[Layer, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    kitchen: str | None = None
    history: Mapping[str, Any] | None = None
    first_comfyui: str | None = None
    custom_loaders: Mapping[str, str] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    unquantized: Unquantized | None = None
    gates: tuple[Gate, ...] = ()
    fail_on: tuple[str, ...] | None = None
    pictures: Pictures | None = None
    renders: Renders | None = None

    @property
    def failing(self) -> tuple[Finding, ...]:
        """The findings that count."""
        if self.fail_on is None:
            return self.findings
        tests = [select.matcher(pattern) for pattern in self.fail_on]
        return tuple(f for f in self.findings if any(test(f.name) for test in tests))

    @property
    def passed(self) -> bool:
        """Whether no finding counts and every gate holds."""
        return not self.failing and all(gate.holds for gate in self.gates)

    def with_pictures(
        self,
        pictures: Pictures | None,
        *,
        renders: Renders | None = None,
        min_psnr: float | None = None,
    ) -> Report:
        """The report with a comparison of pictures, and what is found in it."""
        if pictures is None:
            return self
        found = replace(
            self,
            pictures=pictures,
            renders=renders or self.renders,
            findings=(*self.findings, *pictures.findings),
            notes=(*self.notes, *pictures.notes),
        )
        if min_psnr is None:
            return found
        low = [(p.name, p.psnr) for p in pictures.pictures if not p.psnr >= min_psnr]
        low.sort(key=lambda failure: failure[1])
        gate = Gate(
            name="min_psnr",
            limit=min_psnr,
            measured=len(pictures.pictures),
            failures=tuple(low),
            of="pictures",
        )
        return replace(found, gates=(*found.gates, gate))

    @property
    def formats(self) -> dict[str, int]:
        """Number of layers by format, by name; layers of no known format are left out."""
        counts = Counter(layer.format for layer in self.layers if layer.format is not None)
        return dict(sorted(counts.items()))

    def to_dict(self) -> dict[str, Any]:
        """The report as the JSON object that `--json` prints."""
        return {
            "cq": 1,
            "kind": "verify",
            "passed": self.passed,
            "checkpoint": self.checkpoint,
            "against": self.against,
            "base": self.base,
            "fail_on": None if self.fail_on is None else list(self.fail_on),
            "header_only": self.header_only,
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "formats": self.formats,
            "first_comfyui": self.first_comfyui,
            "custom_loaders": dict(self.custom_loaders),
            "kitchen": self.kitchen,
            "findings": [found.to_dict() for found in self.findings],
            "gates": [gate.to_dict() for gate in self.gates],
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "unquantized": None if self.unquantized is None else self.unquantized.to_dict(),
            "pictures": None if self.pictures is None else self.pictures.to_dict(),
            "renders": None if self.renders is None else self.renders.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "history": None if self.history is None else dict(self.history),
            "notes": list(self.notes),
        }
