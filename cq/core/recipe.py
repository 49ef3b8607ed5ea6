"""Rules to per-layer decisions, each with its reason, from names and shapes alone.

Owns which layers are quantized, in which format, and which keep their precision. Knows nothing of
how: formats refuse shapes, optimizers round. The rules for models that nothing is known of are data
(`cq/core/models/generic.toml`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from cq.core import catalog, select
from cq.core.comfy import WEIGHT
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.formats import Format
from cq.core.knowledge import Knowledge

NOTHING = Knowledge()
_SMALLEST_SIDE = 64
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
        if skip and plain:
            raise wrong(f"skips its layers, so its `{next(iter(plain))}` means nothing")
        return cls(pattern=pattern, skip=skip, settings=plain, reason=reason)


def load_recipe(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """The rules of a recipe file: `{"cq": 1, "kind": "recipe", "rules": [...]}`.

    Raises: InputError if it cannot be read or is not a recipe.
    """
    shown = os.fspath(path)
    try:
        document = orjson.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"`{shown}` cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise InputError(f"`{shown}` is not JSON: {error}", code="input.recipe") from error
    if not isinstance(document, dict) or document.get("kind") != "recipe":
        raise InputError(
            f"`{shown}` is not a recipe",
            hint='a recipe begins {"cq": 1, "kind": "recipe", "rules": [',
            code="input.recipe",
        )
    if document.get("cq") != 1:
        raise InputError(
            f"`{shown}` is a recipe of version {document.get('cq')!r}; this cq reads version 1",
            hint="update cq",
            code="input.version",
        )
    rules = document.get("rules")
    if not isinstance(rules, list):
        raise InputError(f"`{shown}` has no list of `rules`", code="input.recipe")
    return tuple(
        Rule.from_dict(rule, where=f"rule {i + 1} of `{shown}`") for i, rule in enumerate(rules)
    )


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


@dataclass(frozen=True, slots=True)
class _Keep:
    reason: str
    firm: bool
    tests: tuple[Callable[[str], bool], ...]


@dataclass(frozen=True, slots=True)
class _Generic:
    prefixes: tuple[str, ...]
    rules: tuple[_Keep, ...]
    roles: Mapping[str, tuple[Callable[[str], bool], ...]]


@cache
def _generic() -> _Generic:
    data: dict[str, Any] = catalog.load("models", "generic")

    def tests(patterns: Sequence[str]) -> tuple[Callable[[str], bool], ...]:
        return tuple(select.matcher(pattern) for pattern in patterns)

    return _Generic(
        tuple(data["prefixes"]),
        tuple(
            _Keep(rule["reason"], rule.get("firm", False), tests(rule["patterns"]))
            for rule in data["keep"]
        ),
        {role: tests(patterns) for role, patterns in data["roles"].items()},
    )


def without_prefix(layer: str) -> str:
    """The layer's name without the prefix under which checkpoints nest a model.

    >>> without_prefix("model.diffusion_model.img_in")
    'img_in'
    """
    prefix = next((p for p in _generic().prefixes if layer.startswith(p)), "")
    return layer.removeprefix(prefix)


def has_role(layer: str, role: str) -> bool:
    """Whether the layer is one that ComfyUI treats apart: `embedding`, `experts`, `detection`.

    >>> has_role("model.layers.0.mlp.experts", "experts"), has_role("img_in", "detection")
    (True, True)
    """
    bare = without_prefix(layer)
    return any(test(bare) for test in _generic().roles[role])


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
    plain dtype, for every floating-point tensor.

    The first of `skip`, `only` and `rules` that matches a layer decides. `only` restricts
    everything to layers that match. A layer that is named, by `only` or by a rule, is stored in
    spite of advice, not of what ComfyUI cannot load. Advice is the family's where the model is
    `known`, else general: first, last and small layers, embeddings. `refuse` says why a format
    cannot store a layer.

    Raises: PlanError if a pattern matches no layer, or there is nothing to do.
    """
    everything = _casts(default) and not only
    layers = {
        name: _layer(name)
        for name, spec in specs.items()
        if name.endswith(WEIGHT) or (everything and spec.is_float)
    }
    decider = _Decider(tuple(dict.fromkeys(layers.values())), default, rules, only, skip)
    choices = []
    for name, layer in layers.items():
        how, reason, named = decider.decide(layer)
        if how is not None:
            weight = specs[name]
            obstacle = _impossible(layer, weight, casts=_casts(how))
            if obstacle is None and not named and not _casts(how):
                obstacle = _advice(layer, weight, how, known)
            if obstacle is None:
                refusal = refuse(layer, weight, how)
                obstacle = None if refusal is None else f"the format refuses it: {refusal}"
            how, reason = (None, obstacle) if obstacle is not None else (how, reason)
        choices.append(Choice(name=name, layer=layer, weight=specs[name], how=how, reason=reason))
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
        self._formats = dict(parse_only(text) for text in only)
        self._rules = {rule.pattern: rule for rule in reversed(rules)}
        self._only = select.select(tuple(self._formats), layers, what="layer") if only else None
        self._skip = select.select(skip, layers, what="layer") if skip else {}
        patterns = [rule.pattern for rule in rules]
        self._ruled = select.select(patterns, layers, what="layer") if rules else {}

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
                how = self._how({"format": format_name})
                return how, f"`--only {pattern}={format_name}`", True
            reason = f"`--only {pattern}`"
        if layer in self._ruled:
            rule = self._rules[self._ruled[layer]]
            reason = rule.reason or f"the recipe's rule `{rule.pattern}`"
            if rule.skip:
                return None, reason, True
            return self._how(rule.settings), reason, True
        if not named:
            reason = "a linear layer of a block" if not _casts(self._default) else "all tensors"
        return self._default, reason, named

    def _how(self, settings: Mapping[str, str]) -> How:
        if settings.get("format", self._default.format) == self._default.format:
            return replace(self._default, **settings)
        return How(**settings)  # the default's settings are not meant for another format


def _casts(how: How) -> bool:
    plug: Any = catalog.load("formats", how.format)
    return bool(plug.casts)


def _layer(name: str) -> str:
    return name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else name.rpartition(".")[0] or name


def _why_nothing(choices: Sequence[Choice]) -> str:
    if not choices:
        return "the checkpoint has no tensor that ends in `.weight`"
    reasons: dict[str, int] = {}
    for choice in choices:
        reasons[choice.reason] = reasons.get(choice.reason, 0) + 1
    told = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.items())
    return f"{told}. name layers with `--only PATTERN`"


def _impossible(layer: str, spec: TensorSpec, *, casts: bool) -> str | None:
    if not spec.is_float:
        return f"its weight is {spec.dtype}, not floating point"
    if casts:
        return None
    stacked = len(spec.shape) == 3 and has_role(layer, "experts")
    if len(spec.shape) != 2 and not stacked:
        return f"its weight is {len(spec.shape)}-D; only linear layers are quantized"
    return _kept(layer, firm=True)


def _advice(layer: str, spec: TensorSpec, how: How, known: Knowledge) -> str | None:
    if has_role(layer, "embedding"):
        return "an embedding table, not a linear layer"
    role = known.role(layer)
    if role is not None and (role.name == "keep" or (role.name == "modulation" and _few_bits(how))):
        return role.reason
    if not known.complete(layer):
        general = _kept(layer, firm=False)
        if general is not None:
            return general
        if not _BLOCK.search(without_prefix(layer)):
            return "outside the model's repeated blocks, so an input or output layer"
    if min(spec.shape) < _SMALLEST_SIDE and len(spec.shape) == 2:
        return f"a side is under {_SMALLEST_SIDE}: nothing to gain"
    return None


def _few_bits(how: How) -> bool:
    """Whether the format has less than 8 bits for a weight."""
    plug: Format = catalog.load("formats", how.format)
    sample = TensorSpec("F32", (1024, 1024))
    stored = plug.tensors(sample, how.scaling or plug.scalings[0])["weight"]
    return stored.nbytes < sample.numel


def _kept(layer: str, *, firm: bool) -> str | None:
    bare = without_prefix(layer)
    return next(
        (
            rule.reason
            for rule in _generic().rules
            if rule.firm == firm and any(t(bare) for t in rule.tests)
        ),
        None,
    )
