"""Calibration files by their headers: what was recorded of which layers, and what they fit.

Never imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cq.core import families, text
from cq.core.calibration import Calibration, is_calibration
from cq.core.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFile:
    """A calibration file: `layers` of which `inputs` are different ones. `columns` counts the
    inputs by their features, `rows` and `ranks` are the least and the most of one, `held_rows` the
    least that was held back. `few` are layers with less than two rows for each feature. `fits` are
    the titles of families that most layers are known to."""

    layers: int
    inputs: int
    columns: Mapping[int, int]
    rows: tuple[int, int]
    ranks: tuple[int, int]
    held_rows: int
    few: tuple[str, ...]
    fits: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "layers": self.layers,
            "inputs": self.inputs,
            "columns": {str(columns): count for columns, count in self.columns.items()},
            "rows": list(self.rows),
            "ranks": list(self.ranks),
            "held_rows": self.held_rows,
            "few": list(self.few),
            "fits": list(self.fits),
        }


def describe(checkpoint: Checkpoint) -> CalibrationFile | None:
    """What the calibration file is; None if it is none. Raises: InputError for a damaged one."""
    if checkpoint.stages or not is_calibration(checkpoint.metadata):
        return None
    layers = Calibration.of(checkpoint.sources[0]).layers
    inputs = {found.stored_as: found for found in layers.values()}
    rows = [found.rows for found in inputs.values()] or [0]
    ranks = [found.rank for found in inputs.values()] or [0]
    return CalibrationFile(
        layers=len(layers),
        inputs=len(inputs),
        columns=dict(sorted(Counter(found.columns for found in inputs.values()).items())),
        rows=(min(rows), max(rows)),
        ranks=(min(ranks), max(ranks)),
        held_rows=min((found.held_rows for found in inputs.values()), default=0),
        few=tuple(name for name, found in layers.items() if found.rows < 2 * found.columns),
        fits=tuple(_fits(layers)),
    )


def _fits(layers: Mapping[str, Any]) -> list[str]:
    counts = Counter(map(text.folded, layers))
    found = []
    for name in families.names():
        family = families.load(name)
        known = sum(
            count
            for layer, count in counts.items()
            if any(
                layer.startswith(prefix) and layer.removeprefix(prefix) in family.layers
                for prefix in families.PREFIXES
            )
        )
        if 2 * known > sum(counts.values()):
            found.append((-known, family.title))
    return [title for _, title in sorted(found)]
