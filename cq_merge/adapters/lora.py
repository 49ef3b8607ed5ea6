"""LoRA: a low-rank pair of factors for a weight.

`delta = strength * alpha / rank * (up @ down)`; without an alpha its quotient is 1. Convolution
factors are flattened after their first dimension, which makes the product the flattened kernel.

Source: ComfyUI `comfy/weight_adapter/lora.py:LoRAAdapter` (spellings and formula); ComfyUI, too,
uses scale 1 where there is no alpha tensor, whatever the file's metadata says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq.core.dtypes import DTYPES, TensorSpec
from cq.core.errors import InputError
from cq.core.source import Source
from cq.core.text import printable
from cq_merge import factors
from cq_merge.adapters import Apply

if TYPE_CHECKING:
    import torch

# Endings of the (up, down) factors by who writes them so. No ending is the end of another one.
SPELLINGS = (
    (".lora_up.weight", ".lora_down.weight"),  # kohya
    ("_lora.up.weight", "_lora.down.weight"),  # diffusers, attention processors
    (".lora_B.weight", ".lora_A.weight"),  # PEFT
    (".lora.up.weight", ".lora.down.weight"),  # diffusers
    (".lora_B", ".lora_A"),  # Mochi
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),  # transformers
    (".lora_B.default.weight", ".lora_A.default.weight"),  # PEFT with the adapter's name left in
)
_ALPHA = ".alpha"
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraChange:
    """One pair of factors: `up` of shape `(N, rank, ...)` and `down` of shape `(rank, K, ...)`."""

    source: Source
    key: str
    up: str
    down: str
    rank: int
    alpha: float | None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The pair, and the alpha if there is one."""
        alpha = () if self.alpha is None else (self.key + _ALPHA,)
        return (self.up, self.down, *alpha)

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the product of the factors has not the shape of `weight`, flattened."""
        up, down = self.source.spec(self.up), self.source.spec(self.down)
        if weight.shape and (up.shape[0], down.row_numel) == (weight.shape[0], weight.row_numel):
            return None
        return (
            f"the factors `{printable(self.up)}` {up} and `{printable(self.down)}` {down} make"
            f" {up.shape[0]} x {down.row_numel}"
        )

    def nbytes_peak(self, rows: int, itemsize: int) -> int:
        """`down` whole and rows of `up`, each as stored and as computed."""
        total = 0
        for name, count in ((self.down, self.rank), (self.up, rows)):
            spec = self.source.spec(name)
            numel = count * spec.row_numel
            total += numel * itemsize + numel * DTYPES[spec.dtype].bits // 8
        return total

    def load(self, dtype: torch.dtype) -> Apply:
        """Read `down`; `up` is read with the rows that need it."""
        down = factors.matrix(self.source, self.down, dtype)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank

        def apply(rows: torch.Tensor, start: int, strength: float) -> None:
            up = factors.matrix(self.source, self.up, dtype, start=start, stop=start + len(rows))
            multiplier = strength * scale
            if rows.element_size() == 4 and abs(multiplier) > _LARGEST_FLOAT32:
                # torch refuses such a factor outright; infinity fails the check of the result,
                # which can name the weight.
                multiplier = math.copysign(math.inf, multiplier)
            rows.addmm_(up, down, alpha=multiplier)

        return apply


class _Lora:
    kind: ClassVar[str] = "lora"

    def claim(self, source: Source) -> Sequence[LoraChange]:
        """Every pair in any of the spellings."""
        changes: dict[str, LoraChange] = {}
        for up in sorted(source.owner):
            pair = _split(up)
            if pair is None or not up.endswith(pair[1]) or self.partner(up) not in source.owner:
                continue
            key, up_ending, down_ending = pair
            if key in changes:
                raise InputError(
                    f"`{source.shown}` holds two pairs of factors for `{printable(key)}`:"
                    f" `{printable(changes[key].up)}` and `{printable(up)}`",
                    where=source.shown,
                    code="input.adapter_twice",
                )
            changes[key] = _change(source, key, key + up_ending, key + down_ending)
        return list(changes.values())

    def partner(self, name: str) -> str | None:
        """The other factor."""
        pair = _split(name)
        if pair is None:
            return None
        key, up, down = pair
        return key + (down if name.endswith(up) else up)


PLUG = _Lora()


def _split(name: str) -> tuple[str, str, str] | None:
    """A factor's key and the endings of its spelling, (up, down); None for other tensors."""
    for up, down in SPELLINGS:
        for ending in (up, down):
            if name.endswith(ending):
                return name.removesuffix(ending), up, down
    return None


def _change(source: Source, key: str, up: str, down: str) -> LoraChange:
    for name in (up, down):
        factors.check_dtype(source, name)
    up_spec, down_spec = source.spec(up), source.spec(down)
    if len(up_spec.shape) < 2 or len(down_spec.shape) < 2 or not down_spec.shape[0]:
        raise _disagree(source, up, down)
    rank = down_spec.shape[0]
    if up_spec.row_numel != rank:
        raise _disagree(source, up, down)
    alpha = factors.scalar(source, key + _ALPHA) if key + _ALPHA in source.owner else None
    return LoraChange(source=source, key=key, up=up, down=down, rank=rank, alpha=alpha)


def _disagree(source: Source, up: str, down: str) -> InputError:
    return InputError(
        f"the factors `{printable(up)}` {source.spec(up)} and `{printable(down)}`"
        f" {source.spec(down)} of `{source.shown}` share no rank",
        where=source.shown,
        code="input.adapter_shape",
    )
