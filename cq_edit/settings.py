"""The settings in layers' markers: `--set-quant PATTERN JSON`.

Owns the schema of a marker: which settings there are, of which type, for which formats, and which
of them say how the stored numbers are to be decoded.

Source: ComfyUI `comfy/ops.py:_load_quantized_module`, comfy-kitchen `tensor/*.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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


def _sides(value: object) -> bool:
    return isinstance(value, list) and all(map(_count, value)) and 0 < len(value) <= 8


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
    "orig_dtype": _Setting('a dtype of torch, such as "torch.bfloat16"', _text),
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
                found = orjson.loads(settings)
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

    A filter is a format's name or a pattern over layers. Raises: PlanError for a pattern or a
    filter that matches nothing, a setting that the layer's format does not have, and a change of
    how stored numbers are decoded.
    """
    layers = [name for name in draft.layers() if _has_marker(draft, name)]
    if not layers:
        old = any(layer.evidence != "dtype" for layer in draft.layers().values())
        raise PlanError(
            f"no layer of {draft.shown} has a marker",
            hint="`--migrate comfy_quant` writes markers" if old else "quantize it first",
            code="plan.no_marker",
        )
    allowed = _filtered(draft, layers, filters)
    now = {name: _settings(draft, name, patches) for name in layers}
    reasons: dict[str, str] = {}
    for patch in patches:
        chosen = select.select([patch.pattern], layers, what="quantized layer")
        left = [name for name in chosen if name in allowed]
        if not left:
            raise PlanError(
                f"`--quant-filter` leaves none of the {len(chosen)} layers that"
                f" `{printable(patch.pattern)}` names",
                hint="widen one of them",
                code="plan.pattern",
            )
        for name in left:
            now[name] = _patched(name, now[name], patch)
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
    decoding = {}
    for name, (after, _) in patched.items():
        before = _settings(draft, name, [Patch(name, after)])
        changed = [key for key in _DECODING if _meant(before, key) != _meant(after, key)]
        if changed:
            decoding[name] = changed[0]
    judged = bool(decoding) and not allow_broken
    sick = of_layers(draft.checkpoint(), decoding) if judged else {}
    for name, (after, why) in patched.items():
        if name + comfy.MARKER in draft:
            draft.set_marker(name, after, why)
        if draft.header is not None and name in draft.header:
            draft.set_entry(name, after, why)
    still = of_layers(draft.checkpoint(), decoding) if judged else {}
    for name, key in decoding.items() if judged else ():
        if name not in sick or name in still:
            why_not = f"then {still[name]}" if name in still else "no check could tell if it fits"
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


def _patched(name: str, before: Mapping[str, Any], patch: Patch) -> dict[str, Any]:
    after = {k: v for k, v in before.items() if patch.settings.get(k, v) is not None}
    after |= {k: v for k, v in patch.settings.items() if v is not None}
    _see_known(name, after, patch.settings)
    return after


def _see_known(layer: str, after: Mapping[str, Any], patch: Mapping[str, Any]) -> None:
    """Raises: PlanError for a setting that the layer's format does not have."""
    label = after.get("format")
    known = catalog.names("formats")
    if "format" in patch and label not in known:
        raise PlanError(
            f"the layer `{printable(layer)}` cannot have the format `{printable(str(label))}`"
            if label is not None
            else f"the marker of the layer `{printable(layer)}` needs a `format`",
            hint=select.nearest(str(label), known) or "`cq plugins` lists the formats",
            code="plan.no_format",
        )
    if label in known and not catalog.origin("formats", label).startswith("cq.core."):
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
        default = default.get(found.get("format"))
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
