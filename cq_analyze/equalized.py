"""The weights that were rounded, where these are not the reference's: `cq quant --equalize` and
`--smoothquant` fold factors into weights first.

Owns the way back: the history of a file says that it was equalized, and by which calibration; the
quantize stage then does to the reference what it did before it rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cq.core import catalog
from cq.core.calibration import Calibration
from cq.core.checkpoint import Checkpoint
from cq.core.errors import PlanError
from cq.core.source import FINGERPRINT
from cq.core.text import printable

_ASKED = ("equalize", "smoothquant")


class Rounded(NamedTuple):
    """The checkpoint whose weights were rounded, and by layer what the features of its inputs were
    multiplied by compared with the reference's; a note for the user."""

    checkpoint: Checkpoint
    inputs: Mapping[str, Any] = {}
    note: str | None = None


def rounded(
    reference: Checkpoint,
    history: Mapping[str, Any],
    calibration: Calibration | None,
    *,
    has_base: bool,
) -> Rounded:
    """What was rounded to make a checkpoint with that history from `reference`: itself, or with
    factors folded into it.

    Raises: PlanError if it was equalized, and that cannot be done again.
    """
    stages = [s for s in history["stages"] if isinstance(s, dict) and s.get("op") == "quant"]
    equalizing = [stage for stage in stages if any(stage.get(key) for key in _ASKED)]
    if not equalizing:
        return Rounded(reference)
    stage = equalizing[-1]
    told = stage.get("calibration")
    file: Mapping[str, Any] = told if isinstance(told, dict) else {}
    shown = printable(str(file.get("name", "the calibration that made it")))
    if calibration is None:
        raise PlanError(
            "the inputs of layers were equalized before weights were rounded, so that these are not"
            " the reference's",
            hint=f"add `--calibration` with the file that was used, `{shown}`",
            code="plan.equalized",
        )
    print_ = calibration.source.fingerprint()
    if any(file.get(key) != print_[key] for key in FINGERPRINT):
        raise PlanError(
            f"weights were equalized by another calibration, `{shown}`, than"
            f" `{calibration.source.shown}`",
            where=calibration.source.shown,
            hint="give the one that was used",
            code="plan.equalized",
        )
    if has_base:
        raise PlanError(
            "`--base` cannot be compared with weights that were equalized",
            hint="leave `--base` out, or quantize without `--equalize` and `--smoothquant`",
            code="plan.equalized",
        )
    again = {key: stage[key] for key in ("family", *_ASKED) if key in stage}
    again["calibration"] = {"path": str(calibration.source.path), **print_}
    found = catalog.load("stages", "quant").from_arguments(again).before_rounding(reference)
    note = "the weights are compared with the reference's after the same equalization"
    return Rounded(found.checkpoint, found.inputs, note)
