"""What became of layers that were rounded by a calibration, counted while they are computed.

Owns the figures and the sentence about them. Safe to fill from any thread; a layer that is computed
again counts once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cq_quant.optimizers import Rounded


class Tally:
    """The figures of a run: an `Outcome` of a checkpoint."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[str, list[Rounded]] = {}
        self.expected: frozenset[str] = frozenset()

    def expect(self, layers: Iterable[str]) -> None:
        """Say which layers there will be figures of, if all are computed."""
        self.expected = frozenset(layers)

    def begin(self, layer: str) -> Callable[[Rounded], None]:
        """What takes the figures of a layer that is computed from its first row on."""
        found: list[Rounded] = []
        with self._lock:
            self._layers[layer] = found
        return found.append

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON: for each layer the rows, those that kept the calibrated rounding, and the
        output error against that of nearest rounding, by inputs held back."""
        with self._lock:
            layers = {name: list(found) for name, found in sorted(self._layers.items())}
        return {
            "kind": "calibration",
            "expected": len(self.expected),
            "layers": [
                {
                    "layer": name,
                    "rows": sum(r.rows for r in found),
                    "taken": sum(r.taken for r in found),
                    "error": _ratio(found),
                }
                for name, found in layers.items()
                if found
            ],
        }

    def handed_over(self) -> dict[str, list[dict[str, Any]]]:
        """The figures of layers that were computed here; they are forgotten here."""
        with self._lock:
            layers, self._layers = self._layers, {}
        return {name: [asdict(each) for each in found] for name, found in layers.items()}

    def take_over(self, known: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """Count layers that another process has computed."""
        from cq_quant.optimizers import Rounded

        with self._lock:
            self._layers |= {n: [Rounded(**each) for each in found] for n, found in known.items()}

    def remarks(self) -> list[str]:
        """What a user is told of it."""
        layers = self.to_dict()["layers"]
        if not layers:
            return []
        rows = sum(layer["rows"] for layer in layers)
        kept = rows - sum(layer["taken"] for layer in layers)
        errors = [max(layer["error"], 1e-9) for layer in layers]
        mean = math.exp(sum(map(math.log, errors)) / len(errors))
        worst = max(layers, key=lambda layer: layer["error"])
        told = (
            f"by inputs held back, calibration leaves {mean:.2f} of nearest rounding's output error"
            f" (mean of {len(layers)} layers; at most {worst['error']:.2f}, `{worst['layer']}`);"
            f" {kept} of {rows} rows keep nearest rounding, which loses less there"
        )
        if len(layers) < len(self.expected):
            told += f"; {len(layers)} of {len(self.expected)} layers were computed in this run"
        return [told]


def _ratio(found: list[Rounded]) -> float:
    nearest = sum(r.nearest for r in found)
    kept = sum(r.kept for r in found)
    return math.sqrt(kept / nearest) if nearest > 0 else 1.0
