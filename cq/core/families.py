"""Model families: what a checkpoint is, told from names and shapes alone, and what its layers do.

Owns the families (data, one TOML file each in `cq/core/models`, described at `load`) and their
detection; `cq.core.components` takes a checkpoint that holds several models apart. Knows no format
and no rule of a command: it says what a layer is for, not what comes of it. Never imports torch.

Source: the signatures and groups were measured on the tensor lists of 57 released models
(`tests/skeletons`); which shapes are read, on ComfyUI `comfy/model_detection.py`
(`detect_unet_config`).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cq.core import catalog, folds, select
from cq.core.dtypes import TensorSpec
from cq.core.errors import PlanError
from cq.core.roster import Roster
from cq.core.rotation import is_group
from cq.core.signatures import Signature, Size

if TYPE_CHECKING:
    from cq.core.dialects import Dialect

KINDS = ("diffusion", "text encoder")
ROLES = ("keep", "modulation", "optional")
PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "net.",
    "transformer.",
    "model.",
)
_Test = Callable[[str], bool]
_GENERIC = "generic"  # rules for models of no known family, which `cq.core.recipe` reads


class Role(NamedTuple):
    """What a layer is in its family: `keep`, `modulation` or `optional`, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A released model of a family, or several with the same header, which the name then lists."""

    name: str
    signature: Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that are treated alike for one reason, a sentence part for the user."""

    reason: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)  # no slots: its tests are compiled when first asked for
class Family:
    """An architecture: how it is told, and what its layers are for.

    `keep` are layers that are never quantized by default; `modulation` layers bear 8 bits, but not
    4; `optional` layers are quantized by default and kept where quality goes first. `detection` are
    layers whose shape ComfyUI reads to tell the model, so that no packed format may store them.
    `others` says that the family holds more models than the known variants. `rotation` is the
    ConvRot group of quantized files that the model's makers or ComfyUI's released, None if none is
    known. `notes` are for the user. `tensors` lists what `roster` holds, `other_names` what
    `dialect` reads. `parts` are patterns of what files may leave out as a whole, such as a vision
    tower.
    `folds` are where factors can move between layers, see `cq.core.folds`.
    """

    name: str
    title: str
    kind: Literal["diffusion", "text encoder"]
    signatures: tuple[Signature, ...]
    variants: tuple[Variant, ...]
    others: bool
    keep: tuple[Group, ...]
    modulation: tuple[Group, ...]
    optional: tuple[Group, ...]
    detection: tuple[str, ...]
    rotation: int | None
    unloadable: str | None
    notes: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    tensors: str
    parts: tuple[str, ...]
    other_names: str
    folds: tuple[folds.Fold, ...] = ()

    @cached_property
    def layers(self) -> frozenset[str]:
        """The names of all linear and convolution layers, `cq.core.text.folded`; what adapters for
        the family change. Empty for a family of which they are not known."""
        return self.roster.layers

    @cached_property
    def roster(self) -> Roster:
        """The tensors of the family's releases; empty for a family of which they are not known."""
        return Roster(self.tensors)

    @cached_property
    def part_tests(self) -> tuple[Callable[[str], bool], ...]:
        """For each of `parts`, whether a layer or tensor of that name is in it."""
        return tuple(select.matcher(pattern) for pattern in self.parts)

    def may_be(self, variant: Variant, specs: Mapping[str, TensorSpec], prefix: str) -> bool:
        """Whether nothing in `specs` but what is absent speaks against a variant."""
        return variant.signature.absent(specs, prefix) is not None

    @cached_property
    def dialect(self) -> Dialect:
        """The other names of the family's tensors, such as those of diffusers.

        Raises: PlanError if they cannot be read, which is when they are first asked for.
        """
        from cq.core import dialects

        text, inherited = self.other_names.strip(), dialects.Dialect(())
        if text.startswith("as "):
            first, _, text = text.partition("\n")
            inherited = _family(first.removeprefix("as ").strip()).dialect
        try:
            return dialects.Dialect(dialects.parse(text, inherited.lines))
        except ValueError as error:
            raise _broken(self.name, f"in its other names {error}") from error

    def role(self, layer: str) -> Role | None:
        """What the layer, named without prefix and `.weight`, is; None for an ordinary one.

        The first of `keep`, `modulation` and `optional` that names it decides.
        """
        named, roles = self._roles
        if not named(layer):
            return None
        return next((role for test, role in roles if test(layer)), None)

    def reads_shape(self, layer: str) -> bool:
        """Whether ComfyUI reads the shape of the layer's weight to tell the model."""
        return self._detection(layer)

    def variant(self, specs: Mapping[str, TensorSpec], prefix: str) -> Variant | None:
        """The first variant whose signature holds under `prefix`, the family's being given."""
        return next((v for v in self.variants if v.signature.holds(specs, prefix)), None)

    def also_keeping(self, roles: Sequence[str]) -> Family:
        """The family with the groups of `roles` kept, too."""
        modulation, optional = (getattr(self, role) if role in roles else () for role in ROLES[1:])
        return replace(
            self,
            keep=(*self.keep, *modulation, *optional),
            modulation=() if modulation else self.modulation,
            optional=() if optional else self.optional,
        )

    @cached_property
    def _roles(self) -> tuple[_Test, list[tuple[_Test, Role]]]:
        groups = [(name, group) for name in ROLES for group in getattr(self, name)]
        # Most layers have no role: one test for all groups spares them a test for each.
        everything = _any_of([pattern for _, group in groups for pattern in group.patterns])
        return everything, [(_any_of(g.patterns), Role(name, g.reason)) for name, g in groups]

    @cached_property
    def _detection(self) -> _Test:
        return _any_of(self.detection)


class Match(NamedTuple):
    """A family found under a prefix. `variant` is None for a member that cq knows no release of:
    its ordinary layers are then judged best by the generic rules, too."""

    family: Family
    variant: str | None
    prefix: str

    def bare(self, layer: str) -> str | None:
        """The layer's name in the family, or None if it lies outside the model.

        >>> Match(load("flux1"), None, "net.").bare("net.img_in")
        'img_in'
        """
        return layer.removeprefix(self.prefix) if layer.startswith(self.prefix) else None


class Detection(NamedTuple):
    """All matches of a checkpoint: one is an answer, several are ambiguous, none is unknown."""

    matches: tuple[Match, ...]

    @property
    def answer(self) -> Literal["known", "ambiguous", "unknown"]:
        """What can be said."""
        if not self.matches:
            return "unknown"
        return "known" if len(self.matches) == 1 else "ambiguous"

    @property
    def match(self) -> Match | None:
        """The match, if there is exactly one."""
        return self.matches[0] if len(self.matches) == 1 else None


def names() -> tuple[str, ...]:
    """The names of all families, sorted."""
    return tuple(name for name in catalog.names("models") if name != _GENERIC)


def aliases() -> dict[str, str]:
    """The other names of families, such as the presets of `convert_to_quant`, to their names.

    Raises: PlanError if two families have one, or one is a family's name.
    """
    found: dict[str, str] = {}
    for name in names():
        for alias in _family(name).aliases:
            if alias in found or alias in names():
                raise _broken(
                    name, f"its alias `{alias}` names `{found.get(alias, alias)}` already"
                )
            found[alias] = name
    return dict(sorted(found.items()))


def load(name: str) -> Family:
    """The family of that name or alias; an alias may keep more layers.

    A file has `version = 1`, `title`, `kind`, `[[signature]]` (any of which must hold: `has`,
    `lacks`, `sizes = [[tensor, axis, size]]`), `[[variants]]` (`name` and the same, the first that
    holds counts), perhaps `others = true`, `[[keep]]`, `[[modulation]]`, `[[optional]]` (each with
    `reason` and `patterns`, see `cq.core.select`, over layer names without prefix), `detection`
    (patterns), `rotation`, `notes`, `tensors` (see `cq.core.roster`; one text, for the sake of
    speed), `parts` (patterns), `other_names` (see `cq.core.dialects`), `[[folds]]` (see
    `cq.core.folds`) and `[aliases.NAME]` (`keep_also`, names of roles).

    Raises: PlanError with near names if there is none, or if its file is not such a family.

    >>> load("zimage_refiner").name, load("flux2").title
    ('z-image', 'FLUX.2')
    """
    if name in names():
        return _family(name)
    if name in aliases():
        family = _family(aliases()[name])
        return family.also_keeping(family.aliases[name])
    known = (*names(), *aliases())
    near = difflib.get_close_matches(name, known, n=3)
    raise PlanError(
        f"there is no family `{name}`",
        hint=(
            f"did you mean {' or '.join(f'`{n}`' for n in near)}?"
            if near
            else f"there are: {', '.join(f'`{n}`' for n in names())}"
        ),
        code="plan.no_family",
    )


def detect(specs: Mapping[str, TensorSpec], *, prefixes: Sequence[str] = PREFIXES) -> Detection:
    """The families of which `specs` hold a model under one of `prefixes`.

    Looks a few hundred names up and never walks over `specs`.
    """
    matches = []
    for name in names():
        family = _family(name)
        for prefix in prefixes:
            if any(signature.holds(specs, prefix) for signature in family.signatures):
                variant = family.variant(specs, prefix)
                if variant is not None or family.others:
                    matches.append(Match(family, variant.name if variant else None, prefix))
    return Detection(tuple(matches))


def _any_of(patterns: Sequence[str]) -> _Test:
    """Whether a name matches one of `patterns` (see `cq.core.select`), all globs tried at once."""
    globs = [fnmatch.translate(p) for p in patterns if not p.startswith("re:")]
    fused = re.compile("|".join(globs) or "(?!)")
    others = [select.any_matcher([p]) for p in patterns if p.startswith("re:")]

    def test(name: str) -> bool:
        return fused.match(name) is not None or any(other(name) for other in others)

    return test


class _Table:
    """A table of a family's file, read strictly: what is of the wrong type, or left over, is an
    error."""

    def __init__(self, name: str, where: str, data: Mapping[str, Any]) -> None:
        self._name = name
        self._where = where
        self._data = dict(data)

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._data.pop(key, default)
        if type(value) is not kind:
            wrong = "is missing" if value is None else f"is not of type {kind.__name__}"
            raise _broken(self._name, f"`{key}` in {self._where} {wrong}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.take(key, list, [])
        if not all(isinstance(value, str) for value in values):
            raise _broken(self._name, f"`{key}` in {self._where} is not a list of texts")
        return tuple(values)

    def tables(self, key: str) -> list[_Table]:
        values = self.take(key, list, [])
        if not all(isinstance(value, dict) for value in values):
            raise _broken(self._name, f"`{key}` is not a list of tables")
        return [_Table(self._name, f"`[[{key}]]`", value) for value in values]

    def sizes(self) -> tuple[Size, ...]:
        values = self.take("sizes", list, [])
        for value in values:
            if not isinstance(value, list) or [type(v) for v in value] != [str, int, int]:
                raise _broken(self._name, f"a size is `[tensor, axis, size]`, not `{value}`")
        return tuple(Size(*value) for value in values)

    def done(self) -> None:
        if self._data:
            key = next(iter(self._data))
            raise _broken(self._name, f"{self._where} has a key `{key}`, which means nothing")


def _broken(name: str, what: str) -> PlanError:
    return PlanError(f"the family `{name}` cannot be used: {what}", code="plan.plug_broken")


def _signature(table: _Table) -> Signature:
    signature = Signature(has=table.texts("has"), lacks=table.texts("lacks"), sizes=table.sizes())
    table.done()
    return signature


def _variant(table: _Table) -> Variant:
    return Variant(name=table.take("name", str), signature=_signature(table))


def _group(table: _Table) -> Group:
    group = Group(reason=table.take("reason", str), patterns=table.texts("patterns"))
    table.done()
    return group


def _aliases(name: str, found: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    read = {}
    for alias, data in found.items():
        if not isinstance(data, dict):
            raise _broken(name, f"`[aliases.{alias}]` is not a table")
        table = _Table(name, f"`[aliases.{alias}]`", data)
        read[alias] = table.texts("keep_also")
        table.done()
        if not {*read[alias]} <= {*ROLES[1:]}:
            raise _broken(name, f"`[aliases.{alias}]` keeps a role that is none of {ROLES[1:]}")
    return read


def _folds(name: str, tables: list[Any]) -> tuple[folds.Fold, ...]:
    try:
        return folds.parse(tables)
    except ValueError as error:
        raise _broken(name, str(error)) from error


@cache
def _family(name: str) -> Family:
    table = _Table(name, "the file", catalog.load("models", name))
    if table.take("version", int) != 1:
        raise _broken(name, "it is of a version that this cq does not read; update cq")
    family = Family(
        name=name,
        title=table.take("title", str),
        kind=table.take("kind", str),
        signatures=tuple(_signature(t) for t in table.tables("signature")),
        variants=tuple(_variant(t) for t in table.tables("variants")),
        others=table.take("others", bool, default=False),
        keep=tuple(_group(t) for t in table.tables("keep")),
        modulation=tuple(_group(t) for t in table.tables("modulation")),
        optional=tuple(_group(t) for t in table.tables("optional")),
        detection=table.texts("detection"),
        rotation=table.take("rotation", int, default=0) or None,
        unloadable=table.take("unloadable", str, default="") or None,
        notes=table.texts("notes"),
        aliases=_aliases(name, table.take("aliases", dict, default={})),
        tensors=table.take("tensors", str, default=""),
        parts=table.texts("parts"),
        other_names=table.take("other_names", str, default=""),
        folds=_folds(name, table.take("folds", list, default=[])),
    )
    table.done()
    if family.kind not in KINDS:
        raise _broken(name, f"its kind `{family.kind}` is none of {', '.join(KINDS)}")
    if family.rotation is not None and not is_group(family.rotation):
        raise _broken(name, f"{family.rotation} is no rotation group")
    if not all(s.has for s in family.signatures) or not family.signatures:
        raise _broken(name, "a signature needs tensors that it `has`")
    return family
