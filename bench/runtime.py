"""A model as a runtime with quantized activations computes it, in floats.

Owns the rounding of inputs, format by format, and what of a checkpoint is put into a module. The
products of a runtime's integers or small floats are exact but for the order of sums, so that float
weights and inputs, both rounded, give the same up to float32; the CPU paths of most formats leave
the inputs' rounding out, which this does not.

Source: comfy-kitchen 0.2.40, `backends/eager/quantization.py`; ComfyUI `comfy/ops.py`
(`MixedPrecisionOps.Linear.forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cq.core import catalog, rotation
from cq.core.checkpoint import Checkpoint
from cq.core.dtypes import TensorSpec
from cq.core.formats import decode
from cq.core.formats.int8_tensorwise import convrot_group
from cq.core.stored import SMOOTHING, Stored, stored_layers

Rounding = Callable[[torch.Tensor], torch.Tensor]
_LARGEST = {"int8_tensorwise": 127, "convrot_w4a4": 7}
_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """How a layer's inputs are treated: multiplied by `smoothing`, then rounded."""

    format: str
    group: int | None
    smoothing: torch.Tensor | None = None
    scale: float | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs as the product sees them, in the original basis."""
        rows = x.reshape(-1, x.shape[-1])
        if self.smoothing is not None:
            rows = rows * self.smoothing
        if self.group is not None:
            rows = rotation.rotate(rows, self.group)
        rows = self._rounded(rows)
        if self.group is not None:  # the rotation undoes itself
            rows = rotation.rotate(rows, self.group)
        return rows.reshape(x.shape)

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        if self.format in _LARGEST:
            largest = _LARGEST[self.format]
            step = (rows.abs().amax(1, keepdim=True) / largest).clamp_(min=1e-30)
            return (rows / step).round_().clamp_(-largest, largest).mul_(step)
        if self.format in _FLOAT8:
            unit, kind = self.scale or 1.0, _FLOAT8[self.format]
            most = torch.finfo(kind).max
            return (rows / unit).clamp_(-most, most).to(kind).float().mul_(unit)
        plug = catalog.load("formats", self.format)
        grid = plug.grid(TensorSpec("F32", (rows.shape[0], rows.shape[1])), plug.scalings[0])
        shared = dict(grid.survey([rows])) if grid.surveys else {}
        if self.scale is not None:
            shared = {"scale_2": torch.tensor(self.scale)}
        scales = {**shared, **grid.scales(rows, shared)}
        found: torch.Tensor = grid.values(grid.nearest(rows, scales), scales)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A checkpoint ready to run: its tensors in floats, and how layers' inputs are treated."""

    state: Mapping[str, torch.Tensor]
    inputs: Mapping[str, Inputs]


def running(checkpoint: Checkpoint) -> Running:
    """A quantized checkpoint as a runtime has it."""
    stored = stored_layers(checkpoint)
    owned = {name for layer in stored.values() for name in layer.owned}
    names = [n for n in checkpoint.specs if n not in owned]
    state = {n: t.float() for n, t in checkpoint.read_many(names).items()}
    inputs = {}
    for layer, found in stored.items():
        own = {local: checkpoint.read(name) for local, name in found.names.items()}
        smoothing = own.pop(SMOOTHING, None)
        state[f"{layer}.weight"] = decode(found.format, own, found.settings)
        scale = f"{layer}.input_scale"
        inputs[layer] = Inputs(
            format=found.format.name,
            group=_group(found),
            smoothing=smoothing,
            scale=float(checkpoint.read(scale)) if scale in checkpoint.specs else None,
        )
    return Running(state=state, inputs=inputs)


def _group(found: Stored) -> int | None:
    if found.format.rotation == "always":
        return int(found.settings.get("convrot_groupsize", 256))
    return convrot_group(found.settings) if found.format.rotation == "optional" else None


@contextmanager
def rounded_inputs(model: torch.nn.Module, inputs: Mapping[str, Rounding]) -> Iterator[None]:
    """While it lasts the inputs of those layers are treated so."""
    handles: list[Any] = []
    for name, treat in inputs.items():

        def hook(
            module: Any, args: tuple[Any, ...], treat: Rounding = treat
        ) -> tuple[torch.Tensor, ...]:
            return (treat(args[0]), *args[1:])

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
