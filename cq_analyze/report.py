"""What `verify` found, as values: findings, layers, fidelity, gates, and their JSON."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cq.core.dtypes import TensorSpec
from cq.core.text import printable
from cq_analyze.metrics import Sums, finite, pooled

WORST_LAYERS = 10
WORST_TENSORS = 5
_NUMBER = re.compile(r"([0-9]{1,18})")
_AGAIN = "quantize the original checkpoint again with `cq quant`"
_MENDS = {
    "marker.missing": f"{_AGAIN}, which writes a marker beside every quantized weight; or make this"
    " one anew with `cq quant --requantize`",
    "detection.packed": f"{_AGAIN}, which keeps such layers or takes a format that keeps the shape",
    "embedding.format": f"{_AGAIN}, with `int8_tensorwise` or `float8_e4m3fn` for embedding tables",
    "experts.format": f"{_AGAIN}, with a format that ComfyUI takes for stacked experts, such as"
    " `int8_tensorwise`",
    "experts.rotation": f"{_AGAIN}, which leaves stacked experts unrotated",
    "names.diffusers": "quantize the checkpoint with the model's own names, as ComfyUI has it",
    "header.invalid": "remove the metadata entry; the `comfy_quant` tensors say the same",
    "header.disagrees": "remove the metadata entry `_quantization_metadata`; ComfyUI lets it"
    " override the `comfy_quant` tensors",
    "values.nonfinite": "mend or exchange the checkpoint that the tensor came from",
    "values.unlike": "see that the reference is what the file was made from; if it is, the layer's"
    f" scales or its rotation flag are lost: {_AGAIN}",
    "reference.missing": "give the checkpoint that the file was made from, in the same naming",
    "reference.shape": "give the checkpoint that the file was made from",
    "reference.nonfinite": "mend or exchange the reference",
    "bias.missing": "copy the bias from the reference; ComfyUI leaves a missing one uninitialized",
}


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
    return Finding(name=name, layer=layer, sentence=sentence, mend=mend or _MENDS.get(name, _AGAIN))


def natural(name: str) -> tuple[str | int, ...]:
    """A sort key that counts: `blocks.2` before `blocks.10`.

    >>> sorted(["b.10", "b.2", "a"], key=natural)
    ['a', 'b.2', 'b.10']
    """
    return tuple(int(t) if i % 2 else t for i, t in enumerate(_NUMBER.split(name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer that says it is quantized. `format`, `weight` are None where the file does not tell;
    `fidelity` where it was not measured."""

    layer: str
    format: str | None
    settings: Mapping[str, Any]
    weight: TensorSpec | None
    nbytes: int
    fidelity: Sums | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "layer": self.layer,
            "format": self.format,
            "settings": dict(self.settings),
            "dtype": None if self.weight is None else self.weight.dtype,
            "shape": None if self.weight is None else list(self.weight.shape),
            "nbytes": self.nbytes,
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
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
    """A limit that every quantized layer must keep, and the layers that do not, worst first."""

    name: str
    limit: float
    measured: int
    failures: tuple[tuple[str, float], ...]

    @property
    def holds(self) -> bool:
        """Whether every layer keeps it. A gate that saw no layer has shown nothing: no."""
        return self.measured > 0 and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "name": self.name,
            "limit": self.limit,
            "holds": self.holds,
            "measured": self.measured,
            "failures": [
                {"layer": layer, "value": finite(value)} for layer, value in self.failures
            ],
        }


def gates(layers: Iterable[Layer], min_sqnr: float | None, max_error: float | None) -> list[Gate]:
    """The gates that were asked for, judged."""
    measured = [(layer.layer, layer.fidelity) for layer in layers if layer.fidelity is not None]
    found = []
    if min_sqnr is not None:
        low = [(name, sums.sqnr) for name, sums in measured if not sums.sqnr >= min_sqnr]
        low.sort(key=lambda failure: failure[1])
        found.append(
            Gate(name="min_sqnr", limit=min_sqnr, measured=len(measured), failures=tuple(low))
        )
    if max_error is not None:
        high = [
            (name, sums.relative_error)
            for name, sums in measured
            if not sums.relative_error <= max_error
        ]
        high.sort(key=lambda failure: -failure[1])
        found.append(
            Gate(name="max_error", limit=max_error, measured=len(measured), failures=tuple(high))
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of `verify`. Layers and findings are in natural order of names, whatever computed
    them: equal checkpoints give equal reports.

    `first_comfyui` is the first ComfyUI release that knows all formats, None without a format of
    which that can be said; `custom_loaders` what the other formats need, by format.
    """

    checkpoint: str
    against: str | None
    header_only: bool
    tensors: int
    nbytes: int
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    first_comfyui: str | None = None
    custom_loaders: Mapping[str, str] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    unquantized: Unquantized | None = None
    gates: tuple[Gate, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there is no finding and every gate holds."""
        return not self.findings and all(gate.holds for gate in self.gates)

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
            "header_only": self.header_only,
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "formats": self.formats,
            "first_comfyui": self.first_comfyui,
            "custom_loaders": dict(self.custom_loaders),
            "findings": [found.to_dict() for found in self.findings],
            "gates": [gate.to_dict() for gate in self.gates],
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "unquantized": None if self.unquantized is None else self.unquantized.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
        }
