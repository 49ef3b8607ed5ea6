"""Quantized files into modules: `load`.

Owns which tensor of a file goes where in a module. How a layer is stored is the answer of
`cq.core.stored`, how it becomes a weight that of `cq.layouts.weights`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cq.core.checkpoint import Checkpoint
from cq.core.errors import InputError
from cq.core.manifest import open_checkpoint
from cq.core.recipe import without_prefix
from cq.core.stored import Clue, clues, resolve
from cq.core.text import printable
from cq.layouts.registry import registered_layouts
from cq.layouts.weights import quantized_weight, see_floats

_SHOWN = 5


class Loaded(NamedTuple):
    """What a file and a module did not have in common, as `torch.nn.Module.load_state_dict` says
    it; and the layers that are quantized now."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    quantized: list[str]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A quantized layer of a file: its settings, its tensors' full names by local name, and all
    names that belong to it."""

    settings: Mapping[str, Any]
    names: Mapping[str, str]
    owned: tuple[str, ...]


def load(
    module: torch.nn.Module,
    file: str | os.PathLike[str] | Checkpoint,
    *,
    prefix: str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> Loaded:
    """Load a file into `module`; layers that are quantized in the file are quantized in it, too.

    Linears and embeddings hold their weights as `QuantizedTensor` and compute with them; any other
    parameter that the file holds quantized becomes floats. Tensor by tensor: no more than one is
    held beside the module. A module on the meta device is filled, on the CPU.

    `file` is a path, shards and manifests among them, or a checkpoint. `prefix` is what the file's
    names carry before the module's; None finds it out, and without one names outside of the prefix
    that was found are somebody else's, such as a text encoder's. `dtype` is what the module
    computes in; None leaves its dtypes as they are.

    Raises: InputError if the file cannot be read, a quantized layer is not sound or does not fit
    the module, or, with `strict`, if either has names that the other lacks.
    """
    checkpoint = file if isinstance(file, Checkpoint) else open_checkpoint(os.fspath(file))
    shown = ", ".join(source.shown for source in checkpoint.sources) or "the checkpoint"
    slots = _slots(module)
    layers = _layers(checkpoint, shown)
    owned = {name for layer in layers.values() for name in layer.owned}
    weights = {layer.names["weight"]: name for name, layer in layers.items()}
    offered = [name for name in checkpoint.specs if name not in owned or name in weights]
    cut = _prefix(offered, slots) if prefix is None else prefix
    places = {name.removeprefix(cut): name for name in offered if name.startswith(cut)}
    missing = [name for name in slots if name not in places]
    unexpected = [name for place, name in places.items() if place not in slots]
    if strict and (missing or unexpected):
        raise _mismatch(shown, missing, unexpected)
    quantized = []
    for place, (owner, attribute) in slots.items():
        name = places.get(place)
        if name is None:
            continue
        held = getattr(owner, attribute)
        if name in weights:
            value = _quantized(checkpoint, layers[weights[name]], weights[name], held, dtype)
            if isinstance(owner, torch.nn.Linear | torch.nn.Embedding) and attribute == "weight":
                _put(owner, attribute, value, trains=False)
                quantized.append(place.removesuffix(".weight"))
                continue
            plain = value.dequantize()
        else:
            plain = _plain(checkpoint, name, held)
        target = dtype if dtype is not None and held.is_floating_point() else held.dtype
        device = "cpu" if held.is_meta else held.device
        _put(owner, attribute, plain.to(device=device, dtype=target), trains=held.requires_grad)
    return Loaded(missing, unexpected, quantized)


def _slots(module: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """The module's parameters and lasting buffers: owner and attribute by full name."""
    found: dict[str, tuple[torch.nn.Module, str]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        own = [name for name, value in owner._parameters.items() if value is not None]
        own += [
            name
            for name, value in owner._buffers.items()
            if value is not None and name not in owner._non_persistent_buffers_set
        ]
        found |= {f"{path}.{name}" if path else name: (owner, name) for name in own}
    return found


def _layers(checkpoint: Checkpoint, shown: str) -> dict[str, _Layer]:
    """The quantized layers by name; plain FP8 weights are not among them."""
    custom = {layout.__name__ for layout in registered_layouts()}
    found = {}
    for clue in clues(checkpoint):
        if clue.settings is not None and clue.settings.get("format") in custom:
            found[clue.layer] = _custom(clue, shown)
            continue
        stored = resolve(clue, shown)
        if not stored.format.casts:
            found[clue.layer] = _Layer(stored.settings, stored.names, stored.owned)
    return found


def _custom(clue: Clue, shown: str) -> _Layer:
    """A layer in a layout of this process, which `cq.core.stored` need not know."""
    names = {
        local: name
        for local, name in clue.names.items()
        if local == "weight" or local.startswith("weight_")
    }
    if "weight" not in names:
        raise InputError(
            f"layer `{printable(clue.layer)}` of `{shown}` has a marker but no `weight`",
            where=printable(clue.layer),
            code="input.stored",
        )
    assert clue.settings is not None
    rest = tuple(name for local, name in clue.names.items() if local == "comfy_quant")
    return _Layer(clue.settings, names, (*names.values(), *rest))


def _prefix(names: Iterable[str], slots: Mapping[str, Any]) -> str:
    """The prefix under which most of the module's names stand in the file; none if it is a tie."""
    counts = Counter({"": 0})
    for name in names:
        counts[""] += name in slots
        bare = without_prefix(name)
        if bare != name:
            counts[name.removesuffix(bare)] += bare in slots
    return max(counts, key=lambda prefix: counts[prefix])


def _quantized(
    checkpoint: Checkpoint,
    layer: _Layer,
    name: str,
    held: torch.Tensor,
    dtype: torch.dtype | None,
) -> Any:
    read = checkpoint.read_many(layer.names.values())
    stored = {local: read[full] for local, full in layer.names.items()}
    value = quantized_weight(
        name, stored, layer.settings, shape=tuple(held.shape), dtype=dtype or held.dtype
    )
    return value if held.is_meta else value.to(held.device)


def _plain(checkpoint: Checkpoint, name: str, held: torch.Tensor) -> torch.Tensor:
    spec = checkpoint.specs[name]
    if held.is_floating_point():
        see_floats(name, spec)
    if spec.shape != tuple(held.shape):
        raise InputError(
            f"the tensor `{printable(name)}` has shape {list(spec.shape)}; the module has"
            f" {list(held.shape)}",
            where=printable(name),
            hint="build the module with the sizes of the file",
            code="input.shape",
        )
    return checkpoint.read(name)


def _put(owner: torch.nn.Module, attribute: str, value: torch.Tensor, *, trains: bool) -> None:
    if attribute in owner._buffers:
        owner._buffers[attribute] = value
    else:
        owner._parameters[attribute] = torch.nn.Parameter(value, requires_grad=trains)


def _mismatch(shown: str, missing: list[str], unexpected: list[str]) -> InputError:
    told = [
        f"{len(names)} {kind}: "
        + ", ".join(f"`{printable(name)}`" for name in names[:_SHOWN])
        + (" and others" if len(names) > _SHOWN else "")
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return InputError(
        f"the names in `{shown}` are not the module's: {'; '.join(told)}",
        where=printable((missing or unexpected)[0]),
        hint="name the prefix with `prefix=`, or pass `strict=False`",
        code="input.names",
    )
