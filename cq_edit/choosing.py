"""Which tensors stay: `--keep-keys` and `--remove-keys`.

Owns what goes together: with a quantized weight go its scales, its marker and its entry in the
header; a scale or a marker alone does not go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from cq.core import catalog, comfy
from cq.core.errors import InputError, PlanError
from cq.core.stored import SCALED_FP8, format_of, reads
from cq.core.text import printable
from cq_edit.draft import Draft, Layer, matching

_HINT = (
    "`--migrate comfy_quant` writes another form of the layer anew, `cq quant --format bf16` makes"
    " it plain; `--allow-broken` removes it all the same"
)


def remove(draft: Draft, patterns: Sequence[str], *, allow_broken: bool) -> None:
    """Remove the tensors that `patterns` name, quantized weights with all that belongs to them.

    Raises: PlanError for a pattern that matches nothing, for a part of a quantized layer that must
    not go alone, and if nothing would be left.
    """
    chosen = matching(patterns, draft.specs, what="tensor")
    reasons = {name: f"`--remove-keys {pattern}`" for name, pattern in chosen.items()}
    for layer in draft.layers().values():
        own = layer.owned
        if own.get("weight") in reasons:
            why = f"belongs to `{own['weight']}`"
            reasons |= {name: why for name in own.values() if name not in reasons}
        elif not allow_broken:
            _refuse_torn(draft, layer, [name for name in own.values() if name in reasons])
    if not allow_broken:
        _refuse_old_flag(draft, reasons)
    _remove_all_but_none(draft, reasons)


def _refuse_torn(draft: Draft, layer: Layer, gone: Collection[str]) -> None:
    """Raises: PlanError if the layer does not stay what it is without the tensors `gone`."""
    marker = layer.name + comfy.MARKER
    told_twice = draft.header is not None and layer.name in draft.header
    for local, name in layer.needed.items():
        if name in gone and not (name == marker and told_twice) and _is_read(draft, layer, local):
            raise PlanError(
                f"`{printable(name)}` of {draft.shown} cannot be removed alone: the quantized layer"
                f" `{printable(layer.name)}` would be read as raw codes, or not at all",
                where=name,
                hint=f"remove the layer with `--remove-keys '{printable(layer.name)}.*'`; {_HINT}",
                code="plan.torn_layer",
            )


def _is_read(draft: Draft, layer: Layer, local: str) -> bool:
    """Whether ComfyUI reads the tensor in a layer of its format; taken for granted where that is
    not one of cq's own."""
    try:
        name = format_of((draft.settings(layer.name) or {}).get("format"))
    except InputError:
        name = None
    if name is None or not catalog.origin("formats", name).startswith("cq.core."):
        return True
    return reads(catalog.load("formats", name), local)


def _refuse_old_flag(draft: Draft, gone: Mapping[str, str]) -> None:
    flags = [name for name in gone if name.rpartition(".")[2] == SCALED_FP8]
    left = [n for n in draft.specs if n.endswith(".scale_weight") and n not in gone]
    if flags and left:
        raise PlanError(
            f"`{flags[0]}` of {draft.shown} tells ComfyUI to read scales such as `{left[0]}`",
            where=flags[0],
            hint=_HINT,
            code="plan.torn_layer",
        )


def keep(draft: Draft, patterns: Sequence[str]) -> None:
    """Remove all tensors but those that `patterns` name and what belongs to kept weights.

    Raises: PlanError for a pattern that matches nothing, or that keeps scales without their weight.
    """
    chosen = set(matching(patterns, draft.specs, what="tensor"))
    kept = chosen | together(draft.layers().values(), chosen)
    for layer in draft.layers().values():
        alone = [name for name in layer.owned.values() if name in kept]
        if alone and layer.tensors.get("weight") not in kept:
            raise PlanError(
                f"`--keep-keys` keeps `{printable(alone[0])}` of {draft.shown}, but not the weight"
                " that it belongs to",
                where=alone[0],
                hint=f"keep the layer with `--keep-keys '{printable(layer.name)}.*'`",
                code="plan.torn_layer",
            )
    if any(name.endswith(".scale_weight") for name in kept):
        kept |= {name for name in draft.specs if name.rpartition(".")[2] == SCALED_FP8}
    reason = "not named by `--keep-keys`"
    _remove_all_but_none(draft, {name: reason for name in draft.specs if name not in kept})


def together(layers: Iterable[Layer], chosen: Collection[str]) -> set[str]:
    """What belongs to the quantized weights among `chosen`."""
    return {
        name
        for layer in layers
        if layer.tensors.get("weight") in chosen
        for name in layer.owned.values()
    }


def _remove_all_but_none(draft: Draft, reasons: Mapping[str, str]) -> None:
    if len(reasons) == len(draft.specs):
        raise PlanError(
            f"nothing of {draft.shown} would be left",
            hint="name fewer tensors",
            code="plan.nothing",
        )
    draft.remove(reasons)
