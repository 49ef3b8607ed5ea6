"""`cq template` as a function: the decisions of a plan as a recipe, a rule for every layer.

Owns how a decision is said so that `cq quant --recipe` repeats it. Never imports torch.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cq.core import catalog, comfy
from cq.core.checkpoint import Checkpoint
from cq.core.families import Match
from cq.core.formats import Format
from cq.core.knowledge import AUTO, know
from cq.core.recipe import Rule, layer_of
from cq.core.text import as_text
from cq.version import VERSION
from cq_analyze.planning import Settings, planned


def template(
    checkpoint: Checkpoint,
    *,
    family: str = AUTO,
    format: str | None = None,
    scaling: str | None = None,
    optimizer: str | None = None,
    rotate: str | None = None,
    recipe: str | os.PathLike[str] | Sequence[Rule] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    requantize: bool = False,
    allow_custom_loader: bool = False,
) -> dict[str, Any]:
    """The recipe that says what `cq_quant.quantize` with these words would do, layer by layer.

    Each rule names one layer and says its format, scaling, optimizer and rotation, or that it is
    kept, with the reason; comments tell dtype, shape and sizes.

    Raises: PlanError or InputError as `cq_quant.quantize`.
    """
    settings = Settings(
        format=format,
        scaling=scaling,
        optimizer=optimizer,
        rotate=rotate,
        family=family,
        recipe=recipe,
        only=only,
        skip=skip,
        requantize=requantize,
        allow_custom_loader=allow_custom_loader,
    )
    model = planned(checkpoint, settings)
    matches = know(checkpoint.specs, family).matches
    return document(checkpoint, matches, rules(model.notes))


def document(
    checkpoint: Checkpoint, matches: Iterable[Match], found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The recipe of the rules `found` for `checkpoint`, with comments on what it is for."""
    families = [
        match.family.name + (f" ({match.variant})" if match.variant else "") for match in matches
    ]
    return {
        "cq": 1,
        "kind": "recipe",
        "_made_by": f"cq {VERSION}",
        "_model": [as_text(source.path.name) for source in checkpoint.sources],
        "_family": families,
        "rules": [dict(rule) for rule in found],
    }


def rules(decisions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rules that repeat the decisions of a plan (the notes of the quantize stage)."""
    by_layer: dict[str, list[Mapping[str, Any]]] = {}
    for decision in decisions:
        by_layer.setdefault(layer_of(decision["tensor"]), []).append(decision)
    return [_rule(layer, own) for layer, own in by_layer.items()]


def exactly(layer: str) -> str:
    """The pattern that matches the name `layer` alone.

    >>> exactly("blocks.0.mlp"), exactly("odd[1]"), exactly("re:x")
    ('blocks.0.mlp', 'odd[[]1]', '[r]e:x')
    """
    escaped = glob.escape(layer)
    return f"[r]{escaped[1:]}" if escaped.startswith("re:") else escaped


def text(recipe: Mapping[str, Any]) -> str:
    """A recipe as JSON that is easy to read and to edit: a line for each rule.

    >>> print(text({"cq": 1, "rules": [{"layers": "a", "skip": True}, {"layers": "b"}]}))
    {"cq": 1,
     "rules": [
      {"layers": "a", "skip": true},
      {"layers": "b"}
     ]}
    """
    head = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in recipe.items() if k != "rules"]
    lines = ",\n  ".join(json.dumps(rule) for rule in recipe["rules"])
    body = f'"rules": [\n  {lines}\n ]' if lines else '"rules": []'
    return "{" + ",\n ".join([*head, body]) + "}"


def written(recipe: Mapping[str, Any]) -> str:
    """A recipe as a file has it."""
    return text(recipe) + "\n"


def _rule(layer: str, decisions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rule of a layer. A plain dtype stores its bias as well: one rule is for all its
    tensors."""
    # What is so already keeps its rule: elsewhere it may not be.
    changed = [decision for decision in decisions if "format" in decision]
    ordered = sorted(changed or decisions, key=lambda d: not d["tensor"].endswith(comfy.WEIGHT))
    first = ordered[0]
    rule: dict[str, Any] = {"layers": exactly(layer)}
    rule |= _settings(first) if changed else {"skip": True}
    rule |= {"reason": first["reason"], "_shape": first["shape"], "_dtype": first["dtype"]}
    before = sum(decision["nbytes"] for decision in decisions)
    after = sum(decision.get("nbytes_after", decision["nbytes"]) for decision in decisions)
    return rule | {"_nbytes": before, "_nbytes_after": after}


def _settings(decision: Mapping[str, Any]) -> dict[str, str]:
    if decision.get("optimizer") is None:
        return {"format": decision["format"]}
    found: dict[str, str] = {"format": decision["format"], "scaling": decision["scaling"]}
    found["optimizer"] = decision["optimizer"]
    plug: Format = catalog.load("formats", decision["format"])
    if decision["rotation"] is not None:
        found["rotate"] = str(decision["rotation"])
    elif plug.rotation != "always" and not catalog.load("optimizers", found["optimizer"]).rotates:
        found["rotate"] = "off"
    return found
