"""What a checkpoint's numbers are for: parameters and bytes by dtype and by role.

Owns the division of tensors into roles, from names and shapes. Reads markers at most; never imports
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cq.core import comfy, recipe, stored
from cq.core.checkpoint import Checkpoint
from cq.core.components import Component, component_of
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.knowledge import Knowledge

ROLES = {
    "linear": "linear layers",
    "keep": "layers that the family keeps",
    "modulation": "modulation, for 8 bits at least",
    "optional": "linear layers, kept where quality goes first",
    "embedding": "embedding tables",
    "convolution": "convolutions",
    "norm": "norms",
    "bias": "biases",
    "text encoder": "text encoders beside the model",
    "VAE": "the VAE beside the model",
    "other": "everything else",
}
_NORM_ENDINGS = (".weight", ".scale", ".gamma")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """So many tensors, of so many parameters and bytes. Scales and markers are bytes without
    parameters."""

    tensors: int
    parameters: int
    nbytes: int

    def to_dict(self) -> dict[str, int]:
        """As plain JSON."""
        return {"tensors": self.tensors, "parameters": self.parameters, "nbytes": self.nbytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Amounts by dtype and by role, and all together; the largest first."""

    total: Amount
    dtypes: Mapping[str, Amount]
    roles: Mapping[str, Amount]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            **self.total.to_dict(),
            "dtypes": {name: amount.to_dict() for name, amount in self.dtypes.items()},
            "roles": {name: amount.to_dict() for name, amount in self.roles.items()},
        }


def take(
    checkpoint: Checkpoint, known: Knowledge, components: tuple[Component, ...], *, coded: bool
) -> Inventory:
    """The inventory of a checkpoint; `coded` says that layers of it may be quantized."""
    parameters = _parameters(checkpoint) if coded else {}
    beside = {c.prefix: c.kind for c in components} if _has_main_model(components) else {}
    by_both: dict[tuple[str, str], list[int]] = {}
    for name, spec in checkpoint.specs.items():
        key = spec.dtype, _role(name, spec, known, beside)
        counts = by_both.get(key)
        if counts is None:
            counts = by_both[key] = [0, 0, 0]
        counts[0] += 1
        counts[1] += parameters.get(name, spec.numel)
        counts[2] += spec.nbytes
    by_dtype: dict[str, list[int]] = {}
    by_role: dict[str, list[int]] = {}
    for (dtype, role), counts in by_both.items():
        _add(by_dtype.setdefault(dtype, [0, 0, 0]), counts)
        _add(by_role.setdefault(role, [0, 0, 0]), counts)
    every = [sum(column) for column in zip(*by_dtype.values(), strict=True)] or [0, 0, 0]
    return Inventory(
        total=_amount(every),
        dtypes={k: _amount(by_dtype[k]) for k in sorted(by_dtype, key=lambda k: -by_dtype[k][2])},
        roles={k: _amount(by_role[k]) for k in sorted(by_role, key=lambda k: -by_role[k][2])},
    )


def _add(counts: list[int], more: list[int]) -> None:
    counts[:] = (a + b for a, b in zip(counts, more, strict=True))


def _amount(counts: list[int]) -> Amount:
    return Amount(tensors=counts[0], parameters=counts[1], nbytes=counts[2])


def _has_main_model(components: tuple[Component, ...]) -> bool:
    return any(component.kind == "diffusion model" for component in components)


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Numbers that a quantized layer's tensors stand for, where that is not one an element."""
    found: dict[str, int] = {}
    with suppress(InputError):  # what cannot be read is a finding elsewhere
        for clue in stored.clues(checkpoint):
            with suppress(InputError):
                layer = stored.resolve(clue, "")
                found.update(dict.fromkeys(layer.owned, 0))
                found[layer.names["weight"]] = TensorSpec("U8", layer.shape).numel
    return found


def _role(name: str, spec: TensorSpec, known: Knowledge, beside: Mapping[str, str]) -> str:
    if beside:
        place = component_of(name)
        if place.kind is not None and beside.get(place.prefix) in {"VAE", "text encoder"}:
            return beside[place.prefix]
    if name.endswith(".bias"):
        return "bias"
    layer, _, local = name.rpartition(".")
    if len(spec.shape) == 1 and name.endswith(_NORM_ENDINGS):
        return "norm"
    if recipe.has_role(layer, "embedding"):
        return "embedding"
    matrix = name.endswith(comfy.WEIGHT) or stored.is_scale(local) or name.endswith(comfy.MARKER)
    if not matrix:
        return "other"
    stacked = len(spec.shape) == 3 and recipe.has_role(layer, "experts")
    if local == "weight" and len(spec.shape) > 2 and not stacked:
        return "convolution"
    role = known.role(layer)
    return "linear" if role is None else role.name
