"""The settings in layers' markers: `--set-quant PATTERN JSON`.

Owns the schema of a marker: which settings there are, of which type, for which formats, and which
of them say how the stored numbers are to be decoded.

Source: ComfyUI `comfy/ops.py:_load_quantized_module`, comfy-kitchen `tensor/*.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from cq.core import catalog, comfy, select, stored
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.text import printable
from cq_edit.draft import Draft
from cq_edit.soundness import of_layers


def _flag(value: object) -> bool:
    return type(value) is bool


def _count(value: object) -> bool:
    return type(value) is int and value > 0


def _text(value: object) -> bool:
    return isinstance(value, str)


def _dtype(value: object) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _sides(value: object) -> bool:
    return isinstance(value, list) and all(map(_count, value)) and 0 < len(value) <= 8


_DTYPES = frozenset(f"torch.{name}" for name in ("bfloat16", "float16", "float32"))


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a value must be, in words and as a test, and the formats that read it (none: all)."""

    told: str
    test: Callable[[object], bool]
    formats: tuple[str, ...] = ()


_ROTATED = ("convrot_w4a4", "asym_w4a8_int8")
SCHEMA: Mapping[str, _Setting] = {
    "format": _Setting("the name of a format", _text),
    "full_precision_matrix_mult": _Setting("true or false", _flag),
    "convrot": _Setting("true or false", _flag, ("int8_tensorwise",)),
    "convrot_groupsize": _Setting("a positive integer", _count, ("int8_tensorwise", *_ROTATED)),
    "linear_dtype": _Setting('"int4" or "int8"', lambda v: v in ("int4", "int8"), _ROTATED[:1]),
    "group_size": _Setting(
        "a positive integer", _count, ("asym_w4a8_int8", "awq_w4a16", "int8_blockwise")
    ),
    "num_experts": _Setting("a positive integer", _count),
    "orig_shape": _Setting("a list of sizes", _sides, ("mxfp8", "nvfp4")),
    "orig_dtype": _Setting('a dtype of torch, such as "torch.bfloat16"', _dtype),
    "per_row": _Setting("true or false", _flag, ("int8_tensorwise",)),
}
# Settings by which the stored numbers are decoded, with what their absence means.
_DECODING = {
    "format": None,
    "convrot": False,
    "convrot_groupsize": 256,
    "group_size": {"asym_w4a8_int8": 16, "awq_w4a16": 64, "int8_blockwise": 128},
    "orig_shape": None,
}


class _Twice(Exception):
    """A name that stands twice in an object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


@dataclass(frozen=True, slots=True)
class Patch:
    """Settings for the layers of a pattern; a setting that is None (`null`) is removed."""

    pattern: str
    settings: Mapping[str, Any] = field(hash=False)

    @classmethod
    def parse(cls, pattern: str, settings: str | Mapping[str, Any]) -> Patch:
        """The patch of a pattern and a JSON object, as text or as it is.

        Raises: UsageError if it is no JSON object, or has a setting that no marker has, or one of
        another type.
        """
        select.matcher(pattern)
        found: Any = settings
        if isinstance(settings, str):
            try:
                orjson.loads(settings)  # stricter than what can see a setting told twice
                found = json.loads(settings, object_pairs_hook=_once)
            except _Twice as error:
                raise UsageError(
                    f"the settings for `{printable(pattern)}` name `{printable(str(error))}` twice",
                    hint="leave one of them out",
                    code="usage.settings",
                ) from error
            except orjson.JSONDecodeError as error:
                raise UsageError(
                    f"the settings for `{printable(pattern)}` are not JSON:"
                    f" {printable(str(error))}",
                    hint="write an object in quotes: '{\"full_precision_matrix_mult\": true}'",
                    code="usage.settings",
                ) from error
        if not isinstance(found, Mapping) or not found:
            raise UsageError(
                f"the settings for `{printable(pattern)}` are not a JSON object with settings",
                hint="write an object in quotes: '{\"full_precision_matrix_mult\": true}'",
                code="usage.settings",
            )
        for key, value in found.items():
            known = SCHEMA.get(key)
            if value is not None and known is not None and not known.test(value):
                raise UsageError(
                    f"the setting `{key}` cannot be `{printable(json.dumps(value))}`",
                    hint=f"it is {known.told}, or null to remove it",
                    code="usage.settings",
                )
        return cls(pattern, dict(found))


def set_quant(
    draft: Draft, patches: Sequence[Patch], filters: Sequence[str], *, allow_broken: bool
) -> None:
    """Patch markers, and entries in the header where there are such, of the layers that a patch's
    pattern and `filters` name.

    A filter is a format's name or a pattern over layers. A patch with a `format` may also name
    layers that have lost their marker. Raises: PlanError for a pattern or a
    filter that matches nothing, a setting that the layer's format does not have, and a change of
    how stored numbers are decoded.
    """
    marked = [name for name in draft.layers() if _has_marker(draft, name)]
    bare = _unmarked(draft) if any(map(_names_format, patches)) else []
    if not marked and not bare:
        old = any(layer.evidence != "dtype" for layer in draft.layers().values())
        raise PlanError(
            f"no layer of {draft.shown} has a marker",
            hint="`--migrate comfy_quant` writes markers" if old else "quantize it first",
            code="plan.no_marker",
        )
    _patch(draft, patches, filters, marked, bare, allow_broken=allow_broken)


def declare(draft: Draft, patches: Sequence[Patch], filters: Sequence[str]) -> None:
    """Write what patches say of layers of which no marker names a format, so that they can be read.

    Whether their tensors are as the format has them is not asked: they are yet to be migrated.
    Raises: as `set_quant`.
    """
    if any(word in catalog.names("formats") for word in filters):
        return  # what names no format is of none
    unnamed = _unmarked(draft)
    for name in draft.layers():
        with suppress(InputError):  # what is no JSON is told where the layer is read
            if _has_marker(draft, name) and "format" not in (draft.settings(name) or {}):
                unnamed.append(name)
    named: set[str] = set()
    saying = []
    for patch in patches:
        found = select.first_matches(
            [patch.pattern], unnamed if _names_format(patch) else sorted(named)
        )
        named |= found.keys()
        saying += [patch] if found else []
    if saying:
        _patch(draft, saying, filters, [], unnamed, allow_broken=True)


def _names_format(patch: Patch) -> bool:
    return patch.settings.get("format") is not None


def _unmarked(draft: Draft) -> list[str]:
    """Quantized layers without a marker, which a patch with a `format` can give one."""
    return [
        name
        for name, layer in draft.layers().items()
        if not _has_marker(draft, name)
        and "weight" in layer.tensors
        and any(map(stored.is_scale, layer.tensors))
    ]


def _patch(
    draft: Draft,
    patches: Sequence[Patch],
    filters: Sequence[str],
    marked: Sequence[str],
    bare: Sequence[str],
    *,
    allow_broken: bool,
) -> None:
    """Patch `marked` layers, and of `bare` ones those for which a patch names a format."""
    allowed = _filtered(draft, [*marked, *bare], filters)
    now: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for patch in patches:
        among = [*marked, *bare] if _names_format(patch) else [*marked, *reasons]
        chosen = select.select([patch.pattern], dict.fromkeys(among), what="quantized layer")
        left = [name for name in chosen if name in allowed]
        if not left:
            raise PlanError(
                f"`--quant-filter` leaves none of the {len(chosen)} layers that"
                f" `{printable(patch.pattern)}` names",
                hint="widen one of them",
                code="plan.pattern",
            )
        for name in left:
            before = now[name] if name in now else _settings(draft, name, patches)
            now[name] = _patched(draft, name, before, patch)
            reasons[name] = f"`--set-quant {patch.pattern}`"
    _write(draft, {name: (now[name], why) for name, why in reasons.items()}, allow_broken)


def _has_marker(draft: Draft, layer: str) -> bool:
    in_header = draft.header is not None and layer in draft.header
    return in_header or layer + comfy.MARKER in draft


def _settings(draft: Draft, name: str, patches: Sequence[Patch]) -> dict[str, Any]:
    """What is said of a layer now; nothing if that cannot be read and a patch says what it is."""
    try:
        return draft.settings(name) or {}
    except InputError:
        if not any("format" in patch.settings for patch in patches):
            raise
        return {}


def _write(
    draft: Draft, patched: Mapping[str, tuple[Mapping[str, Any], str]], allow_broken: bool
) -> None:
    """Write settings to markers and header.

    Raises: PlanError if one changes what stored numbers mean, unless that mends a layer.
    """
    decoding, lost = {}, {name for name in patched if not _has_marker(draft, name)}
    for name, (after, _) in patched.items():
        before = _settings(draft, name, [Patch(name, after)])
        changed = [key for key in _DECODING if _meant(before, key) != _meant(after, key)]
        if changed:
            decoding[name] = changed[0]
    judged = bool(decoding) and not allow_broken
    sick = of_layers(draft.checkpoint(), decoding) if judged else {}
    for name, (after, why) in patched.items():
        in_header = draft.header is not None and name in draft.header
        if name + comfy.MARKER in draft or not in_header:
            draft.set_marker(name, after, why)
        if in_header:
            draft.set_entry(name, after, why)
    still = of_layers(draft.checkpoint(), decoding) if judged else {}
    for name, key in decoding.items() if judged else ():
        if name not in sick or name in still:
            why_not = f"then {still[name]}" if name in still else "no check could tell if it fits"
            if name in lost and name in still:
                raise PlanError(
                    f"the layer `{printable(name)}` cannot have this marker as it is: {why_not}",
                    where=name,
                    hint="add `--migrate comfy_quant`, which gives its tensors today's names and"
                    " shapes; `--allow-broken` writes it all the same",
                    code="plan.setting_decodes",
                )
            raise PlanError(
                f"`{key}` says how the stored numbers of the layer `{printable(name)}` are read,"
                f" so it is not changed: {why_not}",
                where=name,
                hint="store the layer anew with `cq quant --requantize`; where it is the marker"
                " that is wrong, `--allow-broken` writes it all the same",
                code="plan.setting_decodes",
            )


def _filtered(draft: Draft, layers: Sequence[str], filters: Sequence[str]) -> set[str]:
    known = catalog.names("formats")
    formats = [word for word in filters if word in known]
    patterns = [word for word in filters if word not in known]
    allowed = set(layers)
    if formats:
        labels = {n: stored.format_of((draft.settings(n) or {}).get("format")) for n in layers}
        for word in formats:
            if word not in labels.values():
                raise PlanError(
                    f"no layer of {draft.shown} is stored as `{word}`",
                    hint="there are: " + ", ".join(sorted({f"`{v}`" for v in labels.values()})),
                    code="plan.pattern",
                )
        allowed &= {name for name, label in labels.items() if label in formats}
    if patterns:
        allowed &= set(select.select(patterns, layers, what="quantized layer or format"))
    return allowed


def _patched(draft: Draft, name: str, before: Mapping[str, Any], patch: Patch) -> dict[str, Any]:
    after = {k: v for k, v in before.items() if patch.settings.get(k, v) is not None}
    after |= {k: v for k, v in patch.settings.items() if v is not None}
    _see_known(name, after, patch.settings)
    experts = patch.settings.get("num_experts")
    if experts is not None:
        _see_experts(draft, name, experts)
    return after


def _see_experts(draft: Draft, layer: str, experts: int) -> None:
    """Raises: PlanError if the layer's weight does not hold so many experts."""
    weight = draft.layers()[layer].tensors.get("weight")
    shape = () if weight is None else draft.spec(weight).shape
    if len(shape) == 3 and shape[0] == experts:
        return
    holds = f"{shape[0]} experts" if len(shape) == 3 else "no stacked experts"
    raise PlanError(
        f"the layer `{printable(layer)}` holds {holds}, so `num_experts` cannot be {experts}",
        where=layer,
        hint="leave it out, or say how many there are",
        code="plan.setting",
    )


def _see_known(layer: str, after: Mapping[str, Any], patch: Mapping[str, Any]) -> None:
    """Raises: PlanError for a setting that the layer's format does not have."""
    label = after.get("format")
    known = catalog.names("formats")
    if "format" in patch and not (isinstance(label, str) and label in known):
        raise PlanError(
            f"the layer `{printable(layer)}` cannot have the format `{printable(str(label))}`"
            if label is not None
            else f"the marker of the layer `{printable(layer)}` needs a `format`",
            hint=select.nearest(str(label), known) or "`cq plugins` lists the formats",
            code="plan.no_format",
        )
    named = isinstance(label, str) and label in known
    if named and not catalog.origin("formats", str(label)).startswith("cq.core."):
        return  # a format of somebody else, with settings of its own
    for key, value in patch.items():
        if value is None:
            continue  # whatever a tool wrote may be removed
        setting = SCHEMA.get(key)
        if setting is None or (setting.formats and label not in setting.formats):
            readable = [k for k, s in SCHEMA.items() if not s.formats or label in s.formats]
            raise PlanError(
                f"the layer `{printable(layer)}` is `{printable(str(label))}`, which has no setting"
                f" `{printable(key)}`",
                where=layer,
                hint=select.nearest(key, readable)
                or "it has " + ", ".join(f"`{k}`" for k in readable),
                code="plan.setting",
            )


def _meant(settings: Mapping[str, Any], key: str) -> object:
    nested = settings.get("params")
    found = {**(nested if isinstance(nested, dict) else {}), **settings}
    default: Any = _DECODING[key]
    if isinstance(default, dict):
        default = default.get(str(found.get("format")))
    plain = found.get("format") == "int8_tensorwise" and not found.get("convrot")
    if key == "convrot_groupsize" and plain:
        return None  # of no rotation
    value = found.get(key)
    return default if value is None else value


def typed_settings(value: Any) -> Patch:
    """The patch of a manifest's entry `[pattern, settings]`. Raises: InputError."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        try:
            if isinstance(value[1], dict):
                return Patch.parse(value[0], value[1])
        except UsageError as error:
            raise InputError(error.message, hint=error.hint, code="input.manifest") from error
    raise InputError(
        f"the edit stage's argument `set_quant` cannot hold `{printable(repr(value))}`",
        code="input.manifest",
    )
