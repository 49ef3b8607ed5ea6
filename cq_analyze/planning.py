"""What `cq quant` would do: its plan, asked of the quantize stage that the catalogue names.

Owns the words of a plan's settings, for the commands that look. Knows no rule of quantizing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cq.core import catalog, comfy
from cq.core.checkpoint import Checkpoint
from cq.core.errors import PlanError
from cq.core.formats import Format, loaded_by
from cq.core.knowledge import AUTO
from cq.core.recipe import Rule
from cq.core.recipe_file import load_recipe

DEFAULT_FORMAT = "int8_tensorwise"


@dataclass(frozen=True, kw_only=True)  # no slots: a recipe is read once
class Settings:
    """What is asked of the quantize stage; the fields are those of `cq_quant.quantize`. None and
    empty ones leave the choice to it."""

    format: str | None = None
    scaling: str | None = None
    optimizer: str | None = None
    rotate: str | None = None
    family: str = AUTO
    recipe: str | os.PathLike[str] | Sequence[Rule] = ()
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    requantize: bool = False
    allow_custom_loader: bool = False

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The recipe's rules. Raises: InputError for a recipe that is none."""
        recipe = self.recipe
        return load_recipe(recipe) if isinstance(recipe, str | os.PathLike) else tuple(recipe)

    @property
    def asked(self) -> bool:
        """Whether a plan is asked for, rather than merely one of the defaults."""
        chosen = (self.format, self.scaling, self.optimizer, self.rotate)
        others = (self.recipe, self.only, self.skip, self.requantize)
        return any(word is not None for word in chosen) or any(map(bool, others))

    def arguments(self) -> dict[str, Any]:
        """The quantize stage's arguments. Raises: InputError for a recipe that is none."""
        return {
            "format": self.format or DEFAULT_FORMAT,
            "scaling": self.scaling,
            "optimizer": self.optimizer,
            "rotate": self.rotate or "auto",
            "family": self.family,
            "rules": [rule.to_dict() for rule in self.rules],
            "only": list(self.only),
            "skip": list(self.skip),
            "allow_custom_loader": self.allow_custom_loader,
        }


def planned(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """The checkpoint that `cq quant` would make; nothing is computed.

    Raises: PlanError or InputError as `cq quant` does.
    """
    again = settings.requantize and bool(comfy.find_quantized(checkpoint))
    arguments = settings.arguments() | ({"requantize": True} if again else {})
    stage = catalog.load("stages", "quant").from_arguments(arguments)
    try:
        found: Checkpoint = stage.again(checkpoint) if again else stage.apply(checkpoint)
    except PlanError as error:
        if error.code == "plan.already_quantized":
            error.hint = "`cq analyze FILE` alone describes it; add `--requantize` for a plan"
        raise
    return found


def loaders(model: Checkpoint) -> str:
    """Who loads a planned checkpoint."""
    names = sorted({n["format"] for n in model.notes if n["action"] == "quantize"})
    plugs: list[Format] = [catalog.load("formats", name) for name in names]
    return loaded_by(plugs)
