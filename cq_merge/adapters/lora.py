"""LoRA: a low-rank pair of factors for a weight.

`delta = strength * alpha / rank * (up @ down)`; without an alpha its quotient is 1. Convolution
factors are flattened after their first dimension, which makes the product the flattened kernel. A
core between the factors (LoCon's `mid`) is `sum up[o,m] mid[m,n,...] down[n,i]`. With a reshape the
weight is padded with zeros to that shape first. PEFT's bias of the upper factor is added to the
layer's bias at the same scale.

Source: ComfyUI `comfy/weight_adapter/lora.py:LoRAAdapter` (spellings and formulas; it does not know
the bias); PEFT `tuners/lora/layer.py:Linear.merge` (the bias).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.text import printable
from cq_merge.adapters import Apply, Change, Reading
from cq_merge.changes import (
    Difference,
    Scaled,
    bounded,
    contradiction,
    makes,
    scale_of,
)
from cq_merge.contents import Contents
from cq_merge.products import Product

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
_MID = ".lora_mid.weight"  # beside kohya's spelling only
_RESHAPE = ".reshape_weight"
_BIASES = {".lora_B.bias": ".lora_B.weight", ".lora_B.default.bias": ".lora_B.default.weight"}
_NO_BIAS = "ComfyUI leaves out the biases of PEFT's factors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraChange(Scaled):
    """A product of `up` `(N, rank, ...)` and `down` `(rank, K, ...)`, perhaps around a core.

    `reshape` is the shape that the weight grows to.
    """

    product: Product
    reshape: tuple[int, ...] | None = None

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the file asks for, if it does."""
        return weight if self.reshape is None else self.reshape

    def refuse(self, weight: TensorSpec) -> str | None:
        """Why the product of the factors has not the shape of `weight`, flattened."""
        after = self.shape(weight.shape)
        grows = len(after) == len(weight.shape) and all(map(int.__ge__, after, weight.shape))
        if grows and after and self.product.shape == (after[0], math.prod(after[1:])):
            return None
        grown = "" if self.reshape is None else f" for a weight that grows to {list(self.reshape)}"
        return makes(self.contents, self.product.names, self.product.shape) + grown

    def nbytes_peak(self, rows: int, columns: int, itemsize: int) -> int:
        """`down` whole and rows of `up`."""
        return self.product.nbytes_peak(rows, itemsize)

    def load(self, dtype: torch.dtype) -> Apply:
        """Read `down`; `up` is read with the rows that need it."""
        down, up = self.product.lower(dtype), self.product.upper(dtype)

        def apply(base: torch.Tensor, rows: torch.Tensor, first: int, strength: float) -> None:
            multiplier = bounded(strength * self.scale.value, rows)
            rows.addmm_(up(first, first + len(rows)), down, alpha=multiplier)

        return apply


class _Lora:
    kind: ClassVar[str] = "lora"

    def claim(self, source: Contents, reading: Reading) -> Sequence[Change]:
        """Every pair in any of the spellings, and the biases of PEFT's."""
        changes: dict[str, LoraChange] = {}
        biases: list[Change] = []
        for up in sorted(name for name in source.names if "lora" in name):
            pair = _split(up)
            if pair is None or not up.endswith(pair[1]) or self.partner(up) not in source:
                continue
            key, up_ending, down_ending = pair
            if key in changes:
                raise InputError(
                    f"`{source.shown}` holds two pairs of factors for `{printable(key)}`:"
                    f" `{printable(changes[key].product.left)}` and `{printable(up)}`",
                    where=source.shown,
                    code="input.adapter_twice",
                )
            bias = next((key + b for b, own in _BIASES.items() if own == up_ending), None)
            if bias not in source:
                bias = None
            dropped = bias if reading.as_comfyui else None
            found = _change(source, reading, key, key + up_ending, key + down_ending, dropped)
            changes[key] = found
            if bias is not None and not reading.as_comfyui:
                biases.append(_bias(found, bias))
        return [*changes.values(), *biases]

    def partner(self, name: str) -> str | None:
        """The other factor."""
        pair = _split(name)
        if pair is not None:
            key, up, down = pair
            return key + (down if name.endswith(up) else up)
        for ending, up in ((_MID, SPELLINGS[0][0]), (_RESHAPE, SPELLINGS[0][0]), *_BIASES.items()):
            if name.endswith(ending):
                return name.removesuffix(ending) + up
        return None


PLUG = _Lora()


def _split(name: str) -> tuple[str, str, str] | None:
    """A factor's key and the endings of its spelling, (up, down); None for other tensors."""
    for up, down in SPELLINGS:
        for ending in (up, down):
            if name.endswith(ending):
                return name.removesuffix(ending), up, down
    return None


def _change(
    source: Contents, reading: Reading, key: str, up: str, down: str, dropped: str | None
) -> LoraChange:
    mid = key + _MID if up == key + SPELLINGS[0][0] and key + _MID in source else None
    product = Product(contents=source, left=up, right=down, core=mid)
    scale = scale_of(source, reading, key, source.spec(down).shape[0])
    beside = [name for name in (key + _RESHAPE, dropped) if name in source]
    return LoraChange(
        contents=source,
        key=key,
        tensors=(*product.names, *scale.tensors, *filter(None, beside)),
        scale=scale,
        product=product,
        reshape=_reshape(source, key + _RESHAPE),
        said=() if dropped is None else (_NO_BIAS,),
    )


def _reshape(source: Contents, name: str) -> tuple[int, ...] | None:
    """The shape that the weight grows to. Raises: InputError if it is none."""
    if name in source.added:
        return source.added[name]
    if name not in source:
        return None
    numbers = source.numbers(name)
    shape = tuple(int(number) for number in numbers)
    if list(shape) != numbers or not shape or min(shape) < 1:
        raise InputError(
            f"tensor `{printable(name)}` of `{source.shown}` holds"
            f" {', '.join(f'{number:g}' for number in numbers)}, which is no shape",
            where=source.shown,
            hint="the file is damaged, or a tool wrote it wrongly",
            code="input.adapter_shape",
        )
    return shape


def _bias(change: LoraChange, name: str) -> Difference:
    source = change.contents
    product = change.product
    if source.floating(name).shape != product.shape[:1]:
        raise contradiction(source, [product.left, name], "do not belong to one layer")
    return Difference(
        contents=source,
        key=change.key,
        name=name,
        parameter="bias",
        factor=change.scale.value,
        said=(_NO_BIAS,),
    )
