"""In which format a layer is stored whose marker names none: by its tensors and by other layers.

Owns the refusal to guess. The formats say what they are recognized by; where several are, or where
nothing tells of a rotation, an edit has to say it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cq.core import catalog
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError, PlanError
from cq.core.fellows import Fellows
from cq.core.formats import Format
from cq.core.rotation import GROUPS, group_for

_DEFAULT_GROUP = 256  # of a marker without one
_SMALLEST_GROUP = 4

_Specs = Mapping[str, TensorSpec]
_Settings = Mapping[str, Any]


class Unclear(Exception):
    """What is not known of a layer, as a sentence part, and what to do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def format_of(layer: str, specs: _Specs, told: _Settings, fellows: Fellows | None) -> str:
    """The format of a layer of which `specs` are one matrix's tensors by local name, and `told` is
    what its marker says without a format.

    Raises: Unclear if no format has such tensors, or several have and no other layer tells.
    """
    told = _flat(told)
    found = [name for name in catalog.names("formats") if _recognizes(name, specs, told)]
    if len(found) == 1:
        return found[0]
    weight = specs["weight"]
    if not found:
        scale = specs.get("weight_scale") or next(s for n, s in specs.items() if n != "weight")
        raise Unclear(
            f"it has {weight.dtype} codes beside a scale in {scale.dtype}, and no marker says what"
            " they mean",
            f"{_said('…')} says what they mean",
        )
    plugs: dict[str, Format] = {name: catalog.load("formats", name) for name in found}
    widths = {name: _width(plug, specs, told) for name, plug in plugs.items()}
    known = None if fellows is None else fellows.columns(layer, weight.shape[0])
    fitting = [name for name in found if known is not None and widths[name] == known]
    if len(fitting) == 1:
        return fitting[0]
    may_be = [f"`{name}` of K={width}" for name, width in widths.items()]
    raise Unclear(
        f"its {weight.dtype} codes may be {' or '.join(may_be)}, and nothing tells which",
        "say it, with "
        + " or ".join(
            _said(name, convrot_groupsize=_usual(widths[name]))
            if plug.rotation == "always"
            else _said(name)
            for name, plug in plugs.items()
        ),
    )


def see_rotation(
    layer: str, plug: Format, specs: _Specs, told: _Settings, fellows: Fellows | None
) -> None:
    """Raises: Unclear if the weight of a layer whose tensors are `specs`, and of which a marker
    without a format says `told`, may be rotated, or by a group that is not known.

    One that need not be is taken for unrotated if no group divides K, or if there are others and
    none of them is rotated.
    """
    told, always = _flat(told), plug.rotation == "always"
    rotates = always or told.get("convrot")
    if ("convrot_groupsize" if rotates else "convrot") in told:
        return
    columns = None if plug.rotation == "never" else _width(plug, specs, told)
    if columns is None or columns % _SMALLEST_GROUP:
        return
    others = [] if fellows is None else fellows.rotations(layer, plug.rotation)
    rotated = [told for told in map(_flat, others) if always or told.get("convrot")]
    if others and not rotated:
        return
    groups = [told.get("convrot_groupsize", _DEFAULT_GROUP) for told in rotated]
    same = groups and groups.count(groups[0]) == len(groups)
    group = groups[0] if same else _usual(columns)
    if always:
        raise Unclear(
            f"the group by which its `{plug.name}` codes are rotated is lost with its marker",
            f"say it, with {_said(plug.name, convrot_groupsize=group)}, where the group is"
            " the one that its tool used",
        )
    raise Unclear(
        f"nothing tells whether its `{plug.name}` codes are rotated"
        + (", as other layers' are" if rotated else ""),
        f"say it, with {_said(plug.name, convrot=True, convrot_groupsize=group)}, where the"
        f" group is the one that its tool used, or with {_said(plug.name)} if it rotated"
        " none",
    )


def _recognizes(name: str, specs: _Specs, told: _Settings) -> bool:
    with suppress(PlanError):  # a plug that cannot be loaded is no reason not to read the file
        return bool(catalog.load("formats", name).recognizes(specs, told))
    return False


def _width(plug: Format, specs: _Specs, told: _Settings) -> int | None:
    """K of the weight, if it is stored in that format."""
    with suppress(InputError):
        # The group may be lost, and has no say in the shape
        return plug.shape(specs, {**told, "convrot_groupsize": _SMALLEST_GROUP})[1]
    return None


def _said(name: str, **more: Any) -> str:
    """The edit that says how a layer is stored."""
    settings = json.dumps({"format": name, **more}, ensure_ascii=False)
    return f"`cq edit --migrate comfy_quant --set-quant PATTERN '{settings}'`"


def _usual(columns: int | None) -> int:
    """The group that tools take for a K where they rotate."""
    return group_for(columns or 0, max(GROUPS)) or _SMALLEST_GROUP


def _flat(settings: _Settings) -> dict[str, Any]:
    """A marker's settings, those of its `params` object among them."""
    nested = settings.get("params")
    return {**(nested if isinstance(nested, dict) else {}), **settings}
