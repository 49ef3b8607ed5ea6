"""Rules to per-layer decisions, each with its reason, from names and shapes alone.

Owns which layers are quantized, in which format, and which keep their precision. Knows nothing of
how: formats refuse shapes, optimizers round. The rules for models that nothing is known of are data
(`cq/core/models/generic.toml`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

from cq.core import catalog, select
from cq.core.comfy import WEIGHT
from cq.core.dtypes import TensorSpec
from cq.core.errors import CqError, InputError, PlanError
from cq.core.families import Match
from cq.core.formats import Format
from cq.core.knowledge import Knowledge
from cq.core.text import printable

NOTHING = Knowledge()
_SMALLEST_SIDE = 64
_ADAPTER = re.compile(r"\.(lora_|lora\.|hada_|lokr_|oft_|dora_)")
_BLOCK = re.compile(r"(^|\.)\d+\.")
_FORMAT_NAME = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What a rule asks for: names of plugs and of their settings; None leaves the choice open."""

    format: str
    scaling: str | None = None
    optimizer: str | None = None
    rotate: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Layers that match `pattern` are kept (`skip`), or stored as `settings` say, which override
    the fields of a `How`."""

    pattern: str
    skip: bool = False
    settings: Mapping[str, str]
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The rule as a recipe file has it."""
        found: dict[str, Any] = {"layers": self.pattern, **self.settings}
        if self.skip:
            found["skip"] = True
        if self.reason is not None:
            found["reason"] = self.reason
        return found

    @classmethod
    def from_dict(cls, found: Any, *, where: str) -> Rule:
        """The rule of a recipe. Raises: InputError for anything that a rule cannot be."""

        def wrong(what: str, hint: str | None = None) -> InputError:
            return InputError(f"{where} {what}", hint=hint, code="input.recipe")

        if not isinstance(found, dict):
            raise wrong("is not a JSON object")
        known = ("layers", *(f.name for f in fields(How)), "skip", "reason")
        plain = {k: v for k, v in found.items() if not k.startswith("_")}
        for key, value in plain.items():
            if key not in known:
                raise wrong(
                    f"has a key `{key}`, which no rule has",
                    select.nearest(key, known) or "comments stand under keys that begin with `_`",
                )
            if type(value) is not (bool if key == "skip" else str):
                raise wrong(f"has a `{key}` that is not {'true' if key == 'skip' else 'text'}")
        pattern = plain.pop("layers", None)
        if pattern is None:
            raise wrong("names no `layers`", "write a glob, or a regular expression after `re:`")
        skip, reason = plain.pop("skip", False), plain.pop("reason", None)
        if reason is not None:
            reason = printable(reason, 300)
        if skip and plain:
            raise wrong(f"skips its layers, so its `{next(iter(plain))}` means nothing")
        return cls(pattern=pattern, skip=skip, settings=plain, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What happens to one tensor: it is stored as `how` says, or kept (None) for a reason.

    `layer` is what patterns matched: the name without `.weight`.
    """

    name: str
    layer: str
    weight: TensorSpec
    how: How | None
    reason: str

    @property
    def quantize(self) -> bool:
        """Whether the tensor is stored otherwise than it is."""
        return self.how is not None


class _Traits(NamedTuple):
    """What a layer's name alone tells: why ComfyUI would not load it quantized, why it had better
    not be, and its roles."""

    firm: str | None = None
    advice: str | None = None
    roles: frozenset[str] = frozenset()


_ORDINARY = _Traits()


@dataclass(frozen=True, slots=True)
class _Keep:
    reason: str
    firm: bool
    test: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class _Generic:
    prefix: re.Pattern[str]
    rules: tuple[_Keep, ...]
    roles: Mapping[str, Callable[[str], bool]]
    any: Callable[[str], bool]  # of the rules and roles

    def traits(self, bare: str) -> _Traits:
        """What the name of a layer, without prefix, tells."""
        if not self.any(bare):  # most layers are ordinary: one test for all of them
            return _ORDINARY
        kept = [rule for rule in self.rules if rule.test(bare)]
        return _Traits(
            firm=next((rule.reason for rule in kept if rule.firm), None),
            advice=next((rule.reason for rule in kept if not rule.firm), None),
            roles=frozenset(role for role, test in self.roles.items() if test(bare)),
        )


@cache
def _generic() -> _Generic:
    data: dict[str, Any] = catalog.load("models", "generic")
    test = select.any_matcher
    every = [*data["roles"].values(), *(rule["patterns"] for rule in data["keep"])]
    return _Generic(
        re.compile("|".join(map(re.escape, data["prefixes"]))),
        tuple(
            _Keep(rule["reason"], rule.get("firm", False), test(rule["patterns"]))
            for rule in data["keep"]
        ),
        {role: test(patterns) for role, patterns in data["roles"].items()},
        test([pattern for patterns in every for pattern in patterns]),
    )


@lru_cache(maxsize=1 << 16)
def _traits(layer: str) -> _Traits:
    return _generic().traits(without_prefix(layer))


def without_prefix(layer: str) -> str:
    """The layer's name without the prefix under which checkpoints nest a model.

    >>> without_prefix("model.diffusion_model.img_in")
    'img_in'
    """
    prefix = _generic().prefix.match(layer)
    return layer if prefix is None else layer[prefix.end() :]


def has_role(layer: str, role: str) -> bool:
    """Whether the layer is one that ComfyUI treats apart: `embedding`, `experts`, `detection`.

    >>> has_role("model.layers.0.mlp.experts", "experts"), has_role("img_in", "detection")
    (True, True)
    """
    return role in _traits(layer).roles


def parse_only(text: str) -> tuple[str, str | None]:
    """The pattern and the format of `--only PATTERN` or `--only PATTERN=FORMAT`.

    Raises: PlanError if what follows the last `=` could be a format's name but is none.

    >>> parse_only("img_in=nvfp4"), parse_only("re:blocks[.](?=1)")
    (('img_in', 'nvfp4'), ('re:blocks[.](?=1)', None))
    """
    pattern, equals, name = text.rpartition("=")
    if not equals or not _FORMAT_NAME.fullmatch(name):
        return text, None
    catalog.check("formats", name)
    return pattern, name


def choose(
    specs: Mapping[str, TensorSpec],
    default: How,
    *,
    rules: Sequence[Rule] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    known: Knowledge = NOTHING,
    refuse: Callable[[str, TensorSpec, How], str | None],
) -> list[Choice]:
    """Decide for every `.weight` of a checkpoint, in the checkpoint's order; where the default is a
    plain dtype, for every floating-point tensor. A rule that asks for one is for all of a layer.

    The first of `skip`, `only` and `rules` that matches a layer decides. `only` restricts
    everything to layers that match. A layer that is named, by `only` or by a rule, is stored in
    spite of advice, not of what ComfyUI cannot load. Advice is the family's where the model is
    `known`, else general: first, last and small layers, embeddings. `refuse` says why a format
    cannot store a layer.

    Raises: PlanError if a pattern matches no layer, or there is nothing to do.
    """
    casting = [rule for rule in rules if not rule.skip and _casts(_meant(default, rule.settings))]
    everything = not only and (_casts(default) or bool(casting))
    layers = {
        name: layer_of(name)
        for name, spec in specs.items()
        if name.endswith(WEIGHT) or (everything and spec.is_float)
    }
    decider = _Decider(tuple(dict.fromkeys(layers.values())), default, rules, only, skip)
    choices = []
    for name, layer in layers.items():
        how, reason, named = decider.decide(layer)
        if not name.endswith(WEIGHT) and (how is None or not _casts(how)):  # stores weights alone
            if not _casts(default):
                continue
            if how is not None:
                how, reason, named = default, "all tensors", False
        weight = specs[name]
        if how is not None:
            obstacle, advice = _objections(layer, weight, how, known)
            if advice is not None and named and not reason.endswith(advice):
                reason = f"{reason}, in spite of: {advice}"
            elif advice is not None and not named:
                obstacle = advice
            if obstacle is None:
                try:
                    refusal = refuse(layer, weight, how)
                except CqError as error:  # settings that do not go together
                    if named:
                        error.message += f" (asked for of layer `{layer}` by {reason})"
                    if decider.is_ruled(layer):
                        error.hint = (
                            "leave `scaling`, `optimizer` and `rotate` out of the recipe's rule to"
                            f" take the format's own; {error.hint}"
                        )
                    raise
                obstacle = None if refusal is None else f"the format refuses it: {refusal}"
            how, reason = (None, obstacle) if obstacle is not None else (how, reason)
        choices.append(Choice(name=name, layer=layer, weight=weight, how=how, reason=reason))
    if not any(choice.quantize for choice in choices):
        raise PlanError(
            "there is no layer to quantize",
            hint=_why_nothing(choices),
            code="plan.nothing",
        )
    return choices


class _Decider:
    """The patterns of a command, applied to the layers of a checkpoint."""

    def __init__(
        self,
        layers: Sequence[str],
        default: How,
        rules: Sequence[Rule],
        only: Sequence[str],
        skip: Sequence[str],
    ) -> None:
        self._default = default
        _see_once([parse_only(text)[0] for text in only])
        _see_once([rule.pattern for rule in rules])
        self._formats = dict(parse_only(text) for text in only)
        self._rules = {rule.pattern: rule for rule in rules}
        self._only = select.select(tuple(self._formats), layers, what="layer") if only else None
        self._skip = select.select(skip, layers, what="layer") if skip else {}
        patterns = [rule.pattern for rule in rules]
        self._ruled = select.select(patterns, layers, what="layer") if rules else {}
        for found, which in ((self._only or {}, self._formats), (self._ruled, patterns)):
            _see_no_idle(found, which)

    def is_ruled(self, layer: str) -> bool:
        """Whether a rule says how the layer is stored."""
        return layer in self._ruled

    def decide(self, layer: str) -> tuple[How | None, str, bool]:
        """How a layer is stored, why, and whether it was named."""
        if layer in self._skip:
            return None, f"`--skip {self._skip[layer]}`", True
        named = False
        if self._only is not None:
            if layer not in self._only:
                return None, "not named by `--only`", True
            named, pattern = True, self._only[layer]
            format_name = self._formats[pattern]
            if format_name is not None:
                how = _meant(self._default, {"format": format_name})
                return how, f"`--only {pattern}={format_name}`", True
            reason = f"`--only {pattern}`"
        if layer in self._ruled:
            rule = self._rules[self._ruled[layer]]
            reason = rule.reason or f"the recipe's rule `{rule.pattern}`"
            if rule.skip:
                return None, reason, True
            return _meant(self._default, rule.settings), reason, True
        if not named:
            reason = "a linear layer of a block" if not _casts(self._default) else "all tensors"
        return self._default, reason, named


def _meant(default: How, settings: Mapping[str, str]) -> How:
    """What the settings of a rule ask for."""
    if settings.get("format", default.format) == default.format:
        return replace(default, **settings)
    return How(**settings)  # the default's settings are not meant for another format


def _see_once(patterns: Sequence[str]) -> None:
    """Raise for a pattern that stands twice: only the first would count."""
    twice = next((pattern for pattern, n in Counter(patterns).items() if n > 1), None)
    if twice is not None:
        raise PlanError(
            f"the pattern `{twice}` stands twice",
            hint="the first that matches decides; take one of them out",
            code="plan.pattern_idle",
        )


def _see_no_idle(found: Mapping[str, str], patterns: Iterable[str]) -> None:
    """Raise for a pattern whose layers all match an earlier one: whoever wrote it meant another
    order."""
    busy = set(found.values())
    idle = next((pattern for pattern in patterns if pattern not in busy), None)
    if idle is not None:
        test = select.matcher(idle)
        first = next(pattern for layer, pattern in found.items() if test(layer))
        raise PlanError(
            f"the pattern `{idle}` decides nothing: its layers match `{first}` before",
            hint="the first that matches decides, so put the narrower one first",
            code="plan.pattern_idle",
        )


@lru_cache
def _casts(how: How) -> bool:
    plug: Any = catalog.load("formats", how.format)
    return bool(plug.casts)


def layer_of(name: str) -> str:
    """The layer that patterns see for a tensor.

    >>> layer_of("blocks.0.mlp.weight"), layer_of("blocks.0.mlp.bias"), layer_of("pos_embed")
    ('blocks.0.mlp', 'blocks.0.mlp', 'pos_embed')
    """
    return name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else name.rpartition(".")[0] or name


def _why_nothing(choices: Sequence[Choice]) -> str:
    if not choices:
        return "the checkpoint has no tensor that ends in `.weight`"
    if sum(_ADAPTER.search(choice.name) is not None for choice in choices) * 2 > len(choices):
        return (
            "this is an adapter, such as a LoRA: merge it into its model, `cq merge MODEL ADAPTER`"
        )
    reasons: dict[str, int] = {}
    for choice in choices:
        reasons[choice.reason] = reasons.get(choice.reason, 0) + 1
    told = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.items())
    return f"{told}. name layers with `--only PATTERN`"


def _objections(
    layer: str, weight: TensorSpec, how: How, known: Knowledge
) -> tuple[str | None, str | None]:
    """Why the layer cannot be stored so; and if it can, why it had better not be."""
    casts = _casts(how)
    obstacle = _impossible(layer, weight, casts=casts)
    if obstacle is not None or casts:
        return obstacle, None
    model = known.of(layer)
    if model is not None and model[0].family.unloadable is not None:
        return model[0].family.unloadable, None
    return None, _advice(layer, weight, how, model)


def _impossible(layer: str, spec: TensorSpec, *, casts: bool) -> str | None:
    if not spec.is_float:
        return f"its weight is {spec.dtype}, quantized already or no weight at all"
    if casts:
        return None
    stacked = len(spec.shape) == 3 and has_role(layer, "experts")
    if len(spec.shape) != 2 and not stacked:
        return f"its weight is {len(spec.shape)}-D; only linear layers are quantized"
    return _traits(layer).firm


def _advice(layer: str, spec: TensorSpec, how: How, model: tuple[Match, str] | None) -> str | None:
    if has_role(layer, "embedding"):
        return "an embedding table, not a linear layer"
    role = None if model is None else model[0].family.role(model[1])
    if role is not None and (role.name == "keep" or (role.name == "modulation" and _few_bits(how))):
        return role.reason
    # In a release that is known layer by layer, what its family says nothing of is ordinary.
    if model is None or model[0].variant is None:
        general = _traits(layer).advice
        if general is not None:
            return general
        if not _BLOCK.search(without_prefix(layer)):
            return "outside the model's repeated blocks, so an input or output layer"
    if min(spec.shape) < _SMALLEST_SIDE and len(spec.shape) == 2:
        return f"a side is under {_SMALLEST_SIDE}: nothing to gain"
    return None


@lru_cache
def _few_bits(how: How) -> bool:
    """Whether the format has less than 8 bits for a weight."""
    plug: Format = catalog.load("formats", how.format)
    sample = TensorSpec("F32", (1024, 1024))
    stored = plug.tensors(sample, how.scaling or plug.scalings[0])["weight"]
    return stored.nbytes < sample.numel
