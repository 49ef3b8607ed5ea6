"""What is known of the models in a checkpoint: their families, asked layer by layer.

Owns the choice between what was told (`--family`), what was found, and knowing nothing. What comes
of a layer's role is the recipe's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from cq.core import families
from cq.core.components import Component, component_of, components
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError
from cq.core.families import Detection, Match, Role

AUTO, NONE = "auto", "none"
_VAE = "ComfyUI builds VAEs without quantized layers: it would read the codes as plain numbers"
# The one VAE that ComfyUI loads quantized, MiniMax-H3's, decodes with a transformer.
_LOADABLE_VAE = "decoder.x_embedder.weight"


@dataclass(frozen=True, kw_only=True)  # no slots: the order of prefixes is found once
class Knowledge:
    """The models that are known in a checkpoint, each under its prefix.

    `matches` are those of which exactly one family is known; `doubtful` are detections with
    several answers. `vaes` are the prefixes of VAEs that ComfyUI does not load quantized.
    """

    matches: tuple[Match, ...] = ()
    doubtful: tuple[Detection, ...] = ()
    vaes: frozenset[str] = frozenset()

    @cached_property
    def _innermost_first(self) -> tuple[Match, ...]:
        return tuple(sorted(self.matches, key=lambda match: -len(match.prefix)))

    def of(self, layer: str) -> tuple[Match, str] | None:
        """The model that the layer belongs to and its name there; None if that is not known."""
        for match in self._innermost_first:
            bare = match.bare(layer)
            if bare is not None:
                return match, bare
        return None

    def role(self, layer: str) -> Role | None:
        """What the layer is in its family, if that is known and says anything of it."""
        found = self.of(layer)
        return None if found is None else found[0].family.role(found[1])

    def reads_shape(self, layer: str) -> bool | None:
        """Whether ComfyUI reads the shape of the layer's weight to tell the model; None if it is
        not known which model it is."""
        found = self.of(layer)
        return None if found is None else found[0].family.reads_shape(found[1])

    def unloadable(self, layer: str) -> str | None:
        """Why ComfyUI would not load the layer quantized, in any format; None if it would."""
        found = self.of(layer)
        if found is None and self.vaes and component_of(layer).prefix in self.vaes:
            return _VAE
        return None if found is None else found[0].family.unloadable

    def rotation(self, layer: str) -> int | None:
        """The rotation group that the layer's family calls for."""
        found = self.of(layer)
        return None if found is None else found[0].family.rotation

    def described(self) -> str | None:
        """The models in words, for people; None if none is known.

        >>> Knowledge(matches=(Match(families.load("flux1"), "flux1-dev", ""),)).described()
        'FLUX.1 (flux1-dev)'
        """
        told = [f"{m.family.title}{f' ({m.variant})' if m.variant else ''}" for m in self.matches]
        return " and ".join(told) or None

    def remark(self) -> str:
        """A sentence on what decides which layers keep their precision."""
        if self.matches:
            return f"the model is {self.described()}"
        rules = "general rules say which layers keep their precision"
        if self.doubtful:
            names = {match.family.name for found in self.doubtful for match in found.matches}
            return f"the model may be {' or '.join(sorted(names))}: {rules}; `--family` decides"
        return f"the model is of no family that cq knows: {rules}"


def know(
    specs: Mapping[str, TensorSpec],
    family: str = AUTO,
    *,
    found: tuple[Component, ...] | None = None,
) -> Knowledge:
    """What is known of the models in `specs`: found by their names and shapes with `auto`, nothing
    with `none`, else the family, or old preset, of that name. `found` are the components of
    `specs`, if they are known already.

    Raises: PlanError for an unknown name, or a family with which the checkpoint has no layer in
    common.
    """
    if family == NONE:
        return Knowledge()
    found = components(specs) if found is None else found
    if family != AUTO:
        return Knowledge(matches=(_told(specs, family, found),))
    return Knowledge(
        matches=tuple(c.detection.match for c in found if c.detection.match is not None),
        doubtful=tuple(c.detection for c in found if c.detection.answer == "ambiguous"),
        vaes=frozenset(
            c.prefix for c in found if c.kind == "VAE" and c.prefix + _LOADABLE_VAE not in specs
        ),
    )


def _told(specs: Mapping[str, TensorSpec], name: str, found: tuple[Component, ...]) -> Match:
    family = families.load(name)
    sure = [m for c in found for m in c.detection.matches]
    match = next((m for m in sure if m.family.name == family.name), None)
    if match is not None:
        return match._replace(family=family, variant=match.variant or name)
    counts = {
        prefix: sum(
            family.role(layer.removeprefix(prefix)) is not None
            for layer in _layers(specs)
            if layer.startswith(prefix)
        )
        for prefix in families.PREFIXES
    }
    prefix = max(counts, key=lambda p: (counts[p], len(p)))
    if not counts[prefix]:
        raise PlanError(
            f"the checkpoint has no layer in common with the family `{name}`",
            hint="leave `--family` out: it is found by itself, or general rules apply",
            code="plan.family",
        )
    return Match(family, None, prefix)  # not sure enough to leave the general rules out


def _layers(specs: Mapping[str, TensorSpec]) -> Iterable[str]:
    return (name.removesuffix(".weight") for name in specs if name.endswith(".weight"))
