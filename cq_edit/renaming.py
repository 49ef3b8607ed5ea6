"""Other names: `--rename`.

Owns what a rule means: it acts on the names of layers, so that a layer moves as a whole, and on
full names where no layer's name changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cq.core import comfy, select
from cq.core.errors import PlanError, UsageError
from cq.core.expressions import Expression
from cq.core.stored import is_owned
from cq.core.text import printable
from cq_edit.draft import Draft, Layer


@dataclass(frozen=True, slots=True)
class Renaming:
    """A rule as it was written: what is sought, and what stands in its place; the `expression` that
    is sought, if it is one."""

    text: str
    sought: str
    instead: str
    expression: Expression | None

    @classmethod
    def parse(cls, text: str) -> Renaming:
        """The rule `A=B` or `re:A=B`; what follows the last `=` is the new name.

        Raises: UsageError if it is no rule.

        >>> Renaming.parse("model.diffusion_model.=").instead
        ''
        """
        sought, equals, instead = text.rpartition("=")
        if not equals or sought in {"", "re:"}:
            raise UsageError(
                f"`{printable(text)}` is not a rule to rename by",
                hint="write `OLD=NEW` for a tensor, a layer or a prefix, or `re:OLD=NEW`;"
                " `re:^=PREFIX.` puts a prefix before all names",
                code="usage.rename",
            )
        try:
            f"{sought}{instead}".encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"`{printable(text)}` is not text") from error
        expression = Expression(sought[3:]) if sought.startswith("re:") else None
        return cls(text, sought, instead, expression)

    def new(self, name: str) -> str:
        """What `name`, a tensor's or a layer's, becomes. Raises: UsageError for a replacement that
        speaks of a group that the expression does not have, or one that takes seconds."""
        if self.expression is not None:
            return self.expression.replaced(self.instead, name)
        if name == self.sought:
            return self.instead
        prefix = self.sought if self.sought.endswith(".") else self.sought + "."
        if not name.startswith(prefix):
            return name
        rest = name[len(prefix) :]
        if self.sought.endswith(".") or not self.instead:
            return self.instead + rest
        return f"{self.instead}.{rest}"


def rename(draft: Draft, rule: Renaming, *, allow_broken: bool) -> None:
    """Carry a rule out.

    Raises: PlanError if it changes no name, two tensors would have one name, or a quantized layer
    would be torn apart.
    """
    names: dict[str, str] = {}
    for name in draft.specs:
        layer, dot, local = name.rpartition(".")
        moved = rule.new(layer) if layer else layer
        new = rule.new(name) if moved == layer else f"{moved}{dot}{local}" if moved else local
        if new != name:
            names[name] = new
    if not names:
        raise PlanError(
            f"`--rename {printable(rule.text)}` changes no name of {draft.shown}",
            hint=select.nearest(rule.sought, draft.specs),
            code="plan.pattern",
        )
    for name, new in names.items():
        if new in {"", "__metadata__"}:
            raise PlanError(
                f"`--rename {printable(rule.text)}` leaves `{printable(name)}` no name",
                where=name,
                hint="no tensor can be called so",
                code="plan.rename",
            )
    if not allow_broken:
        for quantized in draft.layers().values():
            _refuse_torn(draft, rule, quantized, names)
        _refuse_foreign(draft, rule, names)
    draft.rename(names, f"`--rename {rule.text}`")


def _refuse_torn(draft: Draft, rule: Renaming, layer: Layer, names: dict[str, str]) -> None:
    """Raises: PlanError if not all that belongs to a quantized layer moves as one."""
    own = layer.owned
    if len(own) == 1 and layer.evidence == "dtype":
        return  # a plain 8-bit float, which any name may have
    new = {local: names.get(name, name) for local, name in own.items()}
    prefixes = {n.removesuffix(local) for local, n in new.items() if n.endswith(f".{local}")}
    if len(prefixes) == 1 and all(n.endswith(f".{local}") for local, n in new.items()):
        return
    first = next(name for name in own.values() if name in names)
    raise PlanError(
        f"`--rename {printable(rule.text)}` takes `{printable(first)}` of {draft.shown} away from"
        f" the rest of the quantized layer `{printable(layer.name)}`",
        where=first,
        hint=f"rename the layer: `--rename '{printable(layer.name)}=…'`",
        code="plan.torn_layer",
    )


def _refuse_foreign(draft: Draft, rule: Renaming, names: Mapping[str, str]) -> None:
    """Raises: PlanError if a plain tensor would become a scale of a quantized layer."""
    owned = {name for layer in draft.layers().values() for name in layer.owned.values()}
    layers = {names.get(n, n).rpartition(".")[0] for n in owned if n.endswith(comfy.WEIGHT)}
    for name, new in names.items():
        layer, _, local = new.rpartition(".")
        if name not in owned and is_owned(local) and layer in layers:
            raise PlanError(
                f"`--rename {printable(rule.text)}` makes the plain tensor `{printable(name)}` of"
                f" {draft.shown} a part of the quantized layer `{printable(layer)}`",
                where=name,
                hint="choose another name; `--allow-broken` does it all the same",
                code="plan.torn_layer",
            )
