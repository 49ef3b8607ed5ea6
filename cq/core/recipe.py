"""Rules to per-layer decisions, each with its reason, from names and shapes alone.

Owns which layers are quantized and which keep their precision. Knows nothing of how: formats refuse
shapes, optimizers round. The rules for models that nothing is known of are data
(`cq/core/models/generic.toml`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cq.core import catalog, select
from cq.core.comfy import WEIGHT
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError

_SMALLEST_SIDE = 64
_BLOCK = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What happens to one weight: it is quantized, or kept for a reason."""

    layer: str
    weight: TensorSpec
    quantize: bool
    reason: str


@dataclass(frozen=True, slots=True)
class _Keep:
    reason: str
    firm: bool
    tests: tuple[Callable[[str], bool], ...]


@cache
def _generic() -> tuple[tuple[str, ...], tuple[_Keep, ...]]:
    data: dict[str, Any] = catalog.load("models", "generic")
    rules = tuple(
        _Keep(
            rule["reason"],
            rule.get("firm", False),
            tuple(select.matcher(pattern) for pattern in rule["patterns"]),
        )
        for rule in data["keep"]
    )
    return tuple(data["prefixes"]), rules


def without_prefix(layer: str) -> str:
    """The layer's name without the prefix under which checkpoints nest a model.

    >>> without_prefix("model.diffusion_model.img_in")
    'img_in'
    """
    prefixes, _ = _generic()
    prefix = next((p for p in prefixes if layer.startswith(p)), "")
    return layer.removeprefix(prefix)


def choose(
    specs: Mapping[str, TensorSpec],
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    refuse: Callable[[TensorSpec], str | None],
) -> list[Choice]:
    """Decide for every `.weight` of a checkpoint, in the checkpoint's order.

    `only` restricts quantization to layers that match and overrides advice (first, last and small
    layers), not what ComfyUI cannot load; `skip` keeps layers; `refuse` says why a shape cannot be
    stored.

    Raises: PlanError if a pattern matches no weight.
    """
    weights = {
        name.removesuffix(WEIGHT): spec for name, spec in specs.items() if name.endswith(WEIGHT)
    }
    wanted = select.select(only, weights, what="layer") if only else {}
    skipped = select.select(skip, weights, what="layer") if skip else {}
    choices = []
    for layer, spec in weights.items():
        reason = _impossible(layer, spec)
        if reason is None and layer in skipped:
            reason = f"`--skip {skipped[layer]}`"
        if reason is None and only and layer not in wanted:
            reason = "not named by `--only`"
        if reason is None and not only:
            reason = _advice(layer, spec)
        if reason is None:
            refusal = refuse(spec)
            reason = None if refusal is None else f"the format refuses it: {refusal}"
        choices.append(
            Choice(
                layer=layer,
                weight=spec,
                quantize=reason is None,
                reason=reason
                or (f"`--only {wanted[layer]}`" if only else "a linear layer of a block"),
            )
        )
    if not any(choice.quantize for choice in choices):
        raise PlanError(
            "there is no layer to quantize",
            hint=_why_nothing(choices),
            code="plan.nothing",
        )
    return choices


def _why_nothing(choices: Sequence[Choice]) -> str:
    if not choices:
        return "the checkpoint has no tensor that ends in `.weight`"
    reasons: dict[str, int] = {}
    for choice in choices:
        reasons[choice.reason] = reasons.get(choice.reason, 0) + 1
    told = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.items())
    return f"{told}. name layers with `--only PATTERN`"


def _impossible(layer: str, spec: TensorSpec) -> str | None:
    if len(spec.shape) != 2:
        return f"its weight is {len(spec.shape)}-D; only linear layers are quantized"
    if not spec.is_float:
        return f"its weight is {spec.dtype}, not floating point"
    return _kept(layer, firm=True)


def _advice(layer: str, spec: TensorSpec) -> str | None:
    reason = _kept(layer, firm=False)
    if reason is not None:
        return reason
    if not _BLOCK.search(without_prefix(layer)):
        return "outside the model's repeated blocks, so an input or output layer"
    if min(spec.shape) < _SMALLEST_SIDE:
        return f"a side is under {_SMALLEST_SIDE}: nothing to gain"
    return None


def _kept(layer: str, *, firm: bool) -> str | None:
    bare = without_prefix(layer)
    _, rules = _generic()
    return next(
        (rule.reason for rule in rules if rule.firm == firm and any(t(bare) for t in rule.tests)),
        None,
    )
