"""Signatures: by which few tensors a model is told.

Owns what a signature says and whether it holds. A signature is a conjunction over a few names and
sizes, so that detection costs the same for any number of tensors. Sizes stand on tensors that are
hardly ever packed (norms, convolutions, layers whose shape ComfyUI reads) and are compared as
packed, too: files may be quantized already. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cq.core.dtypes import DTYPES, TensorSpec


class Size(NamedTuple):
    """A tensor's size along one axis."""

    tensor: str
    axis: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Tensors that must be there, must not be there, and sizes; all without the model's prefix."""

    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()

    def holds(self, specs: Mapping[str, TensorSpec], prefix: str) -> bool:
        """Whether `specs` hold such a model under `prefix`."""
        return (
            all(prefix + name in specs for name in self.has)
            and not any(prefix + name in specs for name in self.lacks)
            and all(_has_size(specs.get(prefix + s.tensor), s.axis, s.size) for s in self.sizes)
        )

    def absent(self, specs: Mapping[str, TensorSpec], prefix: str) -> set[str] | None:
        """The tensors that such a model lacks; None if others speak against it."""
        sizes = [(prefix + s.tensor, s) for s in self.sizes]
        if any(prefix + name in specs for name in self.lacks) or any(
            name in specs and not _has_size(specs[name], s.axis, s.size) for name, s in sizes
        ):
            return None
        return {
            name
            for name in (*self.has, *(s.tensor for s in self.sizes))
            if prefix + name not in specs
        }


def _has_size(spec: TensorSpec | None, axis: int, size: int) -> bool:
    if spec is None or axis >= len(spec.shape):
        return False
    found = spec.shape[axis]
    if found == size or DTYPES[spec.dtype].bits > 8 or len(spec.shape) != 2:
        return found == size
    padded = {size, -(-size // 16) * 16, -(-size // 32) * 32}
    if axis == 0:
        return found in padded
    # Two 4-bit codes a byte, or four 6-bit codes in three.
    return found in {columns * part // 4 for columns in padded for part in (2, 3, 4)}
