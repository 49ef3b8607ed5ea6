"""One model of several in a checkpoint: `--extract-component` and `--split-components`.

Owns what components are called, and the names of their tensors in a file of their own: without the
prefix, as ComfyUI's loaders of single models expect them.

Source: ComfyUI `comfy/sd.py` (`load_diffusion_model_state_dict`, `load_clip`, `VAE`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cq.core import comfy, select
from cq.core.components import Component, component_of, components
from cq.core.errors import PlanError
from cq.core.text import printable
from cq_edit.draft import Draft

if TYPE_CHECKING:
    from cq.core.checkpoint import Checkpoint
    from cq.core.dtypes import TensorSpec

_WORDS = {
    "diffusion model": ("diffusion-model", "transformer", "unet", "diffusion_model"),
    "text encoder": ("text-encoder", "te", "clip", "text_encoder"),
    "VAE": ("vae",),
    "other": ("other",),
}
# ComfyUI wraps a text encoder in a checkpoint; its own file begins inside.
_WRAPPED = "transformer."


def named(specs: Mapping[str, TensorSpec]) -> dict[str, Component]:
    """The components of a checkpoint by name: that of their kind, or of their prefix where there
    are several of a kind.

    >>> from cq.core.dtypes import TensorSpec
    >>> scalar = TensorSpec("F32", ())
    >>> list(named({"vae.x": scalar, "model.diffusion_model.y": scalar}))
    ['vae', 'diffusion-model']
    """
    found = components(specs)
    kinds = Counter(component.kind for component in found)
    names: dict[str, Component] = {}
    for component in found:
        name = _WORDS[component.kind][0]
        if kinds[component.kind] > 1 and component.prefix:
            name = component.prefix.removesuffix(".")
        names[name] = component
    return names


def extract(draft: Draft, name: str) -> None:
    """Keep one component alone, its names without their prefix.

    Raises: PlanError if there is none of that name, or several may be meant.
    """
    component = _component(draft, name)
    reason = f"`--extract-component {name}`"
    names = [n for n in draft.specs if component_of(n).prefix == component.prefix]
    chosen = set(names)
    draft.remove({n: "part of another component" for n in draft.specs if n not in chosen})
    stripped = {n: n.removeprefix(component.prefix) for n in names}
    if component.kind == "text encoder":
        stripped = {n: new.removeprefix(_WRAPPED) for n, new in stripped.items()}
    renames = {n: new for n, new in stripped.items() if new != n}
    if renames:
        draft.rename(renames, reason)


def _component(draft: Draft, name: str) -> Component:
    found = named(draft.specs)
    meant = {
        own: component
        for own, component in found.items()
        if name.removesuffix(".") in {own, component.prefix.removesuffix(".")}
        or name.lower() in _WORDS[component.kind]
        or name == component.kind
    }
    exact = found.get(name)
    if exact is not None:
        return exact
    shown = ", ".join(f"`{own}`" for own in found)
    if len(meant) != 1:
        what = "several components" if meant else "no component"
        near = None if meant else select.nearest(name, found)
        raise PlanError(
            f"{draft.shown} has {what} called `{printable(name)}`",
            hint=near or f"it has {shown}",
            code="plan.component",
        )
    return next(iter(meant.values()))


def split_components(checkpoint: Checkpoint, **changes: Any) -> dict[str, Checkpoint]:
    """Each component of a checkpoint as a checkpoint of its own, by name; `changes` are those of
    `cq_edit.edit`, made to the whole before; a header form is written for those that have layers
    for it.

    Raises: PlanError if there is one component only, or as `edit`.
    """
    from cq_edit.stage import edit

    whole = edit(checkpoint, **changes) if changes else checkpoint
    found = named(whole.specs)
    if len(found) < 2:
        shown = ", ".join(f"`{source.shown}`" for source in checkpoint.sources)
        raise PlanError(
            f"{shown} holds one component only, `{next(iter(found), 'nothing')}`",
            hint="`--extract-component` takes its prefix away",
            code="plan.component",
        )
    marked = {component_of(layer + comfy.WEIGHT) for layer in comfy.header_layers(whole.metadata)}
    saved = {component.prefix for component in marked}
    made = {}
    for name, component in found.items():
        own = changes
        if changes.get("save_quant_metadata") and component.prefix not in saved:
            own = {key: value for key, value in changes.items() if key != "save_quant_metadata"}
        made[name] = edit(checkpoint, **own, extract_component=name)
    return made
