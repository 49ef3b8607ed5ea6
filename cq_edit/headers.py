"""The file's metadata: single entries, and the header form of the markers
(`_quantization_metadata`).

Owns that header form and markers say the same of every layer in what an edit makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cq.core import comfy, select
from cq.core.errors import InputError, PlanError, UsageError
from cq.core.manifest import HISTORY_KEY
from cq.core.text import printable
from cq_edit.draft import Draft

SIDES = ("markers", "header")


def settle(draft: Draft, prefer: str | None) -> None:
    """Make header form and markers agree where they do not, by what `prefer` names.

    Raises: PlanError without a word on which of them is right.
    """
    for layer, entry in (draft.header or {}).items():
        if layer + comfy.MARKER not in draft:
            continue
        try:
            marker = draft.marker(layer)
        except InputError:
            if prefer != "header":
                raise
            marker = None
        if marker is not None and _said(marker) == _said(entry):
            continue
        if prefer is None:
            raise PlanError(
                f"the layer `{printable(layer)}` of {draft.shown} has other settings in the"
                f" header's `{comfy.HEADER_KEY}` than in its marker",
                where=layer,
                hint="say which is right: `--prefer header`, which is what ComfyUI reads, or"
                " `--prefer markers`",
                code="plan.header_disagrees",
            )
        if prefer == "header":
            draft.set_marker(layer, entry, "`--prefer header`")
    if prefer == "markers":
        for layer in list(draft.header or {}):
            marker = draft.marker(layer)
            entry = (draft.header or {}).get(layer, {})
            if marker is not None and _said(marker) != _said(entry):
                draft.set_entry(layer, marker, "`--prefer markers`")


def _said(settings: Mapping[str, Any]) -> dict[str, Any]:
    # A flag that is off says what a flag left out says.
    return {k: v for k, v in settings.items() if v is not None and v is not False}


def save(draft: Draft) -> None:
    """Write the header form, an entry for every quantized layer with all that its marker says.

    Raises: PlanError if a quantized layer has no marker, or none is quantized.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, layer in draft.layers().items():
        settings = draft.settings(name)
        if settings is not None:
            entries[name] = settings
        elif layer.evidence != "dtype":
            raise PlanError(
                f"the quantized layer `{printable(name)}` of {draft.shown} has no marker that"
                " could be written to the header",
                where=name,
                hint="add `--migrate comfy_quant`, which writes markers",
                code="plan.no_marker",
            )
    if not entries:
        raise PlanError(
            f"no layer of {draft.shown} has a marker, so there is nothing for the header",
            hint="quantize it first, with `cq quant --save-quant-metadata`",
            code="plan.no_marker",
        )
    for name in [n for n in draft.header or {} if n not in entries]:
        draft.set_entry(name, None, "there is no such layer")
    for name, settings in entries.items():
        draft.set_entry(name, settings, "`--save-quant-metadata`")


def drop(draft: Draft, reason: str) -> None:
    """Remove the header form; a layer that has no other marker gets one as a tensor."""
    for layer, settings in (draft.header or {}).items():
        if layer + comfy.MARKER not in draft and layer + comfy.WEIGHT in draft:
            draft.set_marker(layer, settings, "stood in the header alone")
    draft.drop_header(reason)


def require_header(draft: Draft) -> None:
    """Raises: PlanError if there is no header form to drop."""
    if comfy.HEADER_KEY not in draft.metadata:
        raise PlanError(
            f"{draft.shown} has no `{comfy.HEADER_KEY}` in its header",
            hint="leave `--drop-quant-metadata` out",
            code="plan.no_header_form",
        )


def parse_meta(text: str) -> tuple[str, str]:
    """Key and value in `KEY=VALUE`. Raises: UsageError if it is not so.

    >>> parse_meta("author=me=you")
    ('author', 'me=you')
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(
            f"`{printable(text)}` is not a metadata entry",
            hint="write `KEY=VALUE`",
            code="usage.meta",
        )
    return key, value


def see_settable(key: str, value: object) -> None:
    """Raises: UsageError for an entry that says how the file is to be read, or whence it comes, and
    for what no entry can be."""
    if not key or "=" in key or not isinstance(value, str):
        raise UsageError(
            f"`{printable(key)}` cannot be set to `{printable(str(value))}`",
            hint="keys are not empty and have no `=`, values are text",
            code="usage.meta",
        )
    if key == comfy.HEADER_KEY:
        raise UsageError(
            f"`{key}` is written from the layers' markers",
            hint="use `--save-quant-metadata`, `--drop-quant-metadata` or `--set-quant`",
            code="usage.meta",
        )
    if key == HISTORY_KEY:
        raise UsageError(
            f"`{key}` is the record of what made the file, which every step writes by itself",
            code="usage.meta",
        )


def set_meta(draft: Draft, entries: Mapping[str, str], removed: Sequence[str]) -> None:
    """Set and remove metadata entries; `removed` are keys or patterns.

    Raises: PlanError for a pattern that matches no entry.
    """
    free = [key for key in draft.metadata if key not in {comfy.HEADER_KEY, HISTORY_KEY}]
    for key, pattern in select.select(removed, free, what="metadata entry").items():
        draft.set_meta(key, None, f"`--remove-meta {pattern}`")
    for key, value in entries.items():
        draft.set_meta(key, value, "`--set-meta`")
