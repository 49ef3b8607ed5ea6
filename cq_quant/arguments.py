"""The quantize stage's arguments, as options, Python and manifests give them, well typed.

Owns what of them is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cq.core.errors import InputError, UsageError
from cq.core.recipe import Rule
from cq_quant.guidance import (
    CalibrationFile,
    LoraFile,
    check_setting,
    opened_calibration,
    opened_lora,
)

NO_BF16 = "usage.bf16"  # the code of an error


def texts(value: Sequence[str]) -> tuple[str, ...]:
    """Patterns; a single one need not stand in a list."""
    return (value,) if isinstance(value, str) else tuple(value)


def paths(
    value: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
) -> tuple[str | os.PathLike[str], ...]:
    return (value,) if isinstance(value, str | os.PathLike) else tuple(value)


def settings_of(value: Any) -> dict[str, float]:
    """Numbers by `optimizer.name`. Raises: UsageError for a name or number that there is not."""
    if not isinstance(value, Mapping):
        raise _ill_typed("settings", value)
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _ill_typed("settings", value)
        check_setting(name, number)
    return {name: float(number) for name, number in sorted(value.items())}


def seed_of(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise UsageError(
            f"`{value!r}` is not a seed", hint="give a whole number from 0 on", code="usage.seed"
        )
    return value


def see_bf16_used(asked: bool, guided: Sequence[str]) -> None:
    """Raises: UsageError if bfloat16 is asked for and the rounding of no layer is guided."""
    if asked and not guided:
        raise UsageError(
            "`--bf16-compute on` is of products that only rounding by a calibration takes",
            hint="add `--calibration FILE` and an optimizer that takes one, or leave it out",
            code=NO_BF16,
        )


def _loras(value: Any) -> tuple[LoraFile, ...]:
    if not isinstance(value, list):
        raise _ill_typed("calibration_loras", value)
    return tuple(opened_lora(entry) for entry in value)


def _calibration(value: Any) -> CalibrationFile:
    if not isinstance(value, Mapping):
        raise _ill_typed("calibration", value)
    return opened_calibration(value)


def _bf16(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _ill_typed("bf16", value)
    return value


GUIDING: dict[str, Callable[[Any], Any]] = {
    "calibration": _calibration,
    "calibration_loras": _loras,
    "settings": settings_of,
    "seed": seed_of,
    "bf16": _bf16,
}


def _ill_typed(key: str, value: Any) -> InputError:
    return InputError(
        f"the quant stage's argument `{key}` cannot be `{value!r}`", code="input.manifest"
    )


def typed(key: str, value: Any, default: Any) -> Any:
    if key == "rules" and isinstance(value, list):
        return tuple(
            Rule.from_dict(rule, where=f"rule {i + 1} of the quant stage")
            for i, rule in enumerate(value)
        )
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif type(value) is type(default) or (default is None and isinstance(value, str)):
        return value
    raise _ill_typed(key, value)
