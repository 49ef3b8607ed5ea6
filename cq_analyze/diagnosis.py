"""Why a weight decodes to something else than the reference: the usual mistakes, tried in turn.

Owns the mistakes that leave no trace in names and shapes (a lost rotation, swapped nibbles, block
scales that nobody swizzled): the first rows are decoded as if each had been made, and the one that
brings them near the reference names the finding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cq.core.checkpoint import Checkpoint
from cq.core.dequantize import Decoder
from cq.core.packing import swizzle
from cq.core.rotation import is_group
from cq.core.rows import Rows
from cq.core.stored import Stored
from cq_analyze.metrics import sums
from cq_analyze.report import Finding, finding

if TYPE_CHECKING:
    import torch

_NEAR = 0.4  # relative error; a wrong guess is off by the weight itself
_GROUPS = (256, 64, 16, 1024, 4)
_NIBBLES = frozenset({"nvfp4", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16"})
_SWIZZLED = frozenset({"nvfp4", "mxfp8"})
_Change = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class _Mistake:
    """A finding, and how the layer would have to be read if it is the reason."""

    name: str
    sentence: str
    settings: Mapping[str, Any]
    codes: _Change | None = None
    beside: Mapping[str, _Change] = field(default_factory=dict)


def diagnose(
    checkpoint: Checkpoint, stored: Stored, shape: tuple[int, ...], rows: Callable[[], Rows]
) -> Finding | None:
    """The finding that explains why the layer is unlike its reference, if a usual mistake does.

    `rows` gives the reference's rows from the first on, anew at each call. Holds what a `Decoder`
    holds.
    """
    for mistake in _mistakes(stored, shape):
        decoder = Decoder(checkpoint, dataclasses.replace(stored, settings=mistake.settings), shape)
        segments, beside = decoder.read()
        changed = {
            name: mistake.beside[name](tensor) if name in mistake.beside else tensor
            for name, tensor in beside.items()
        }
        codes = segments if mistake.codes is None else map(mistake.codes, segments)
        value = next(iter(decoder.rows(codes, changed)))
        if sums(rows().like(value), value).relative_error <= _NEAR:
            return finding(mistake.name, stored.layer, mistake.sentence)
    return None


def _mistakes(stored: Stored, shape: tuple[int, ...]) -> Iterator[_Mistake]:
    settings = dict(stored.settings)
    if stored.format.rotation == "optional":
        plain = {k: v for k, v in settings.items() if not k.startswith("convrot") and k != "params"}
        if plain != settings:
            told = "is not rotated, but its marker says so: it must have no `convrot`"
            yield _Mistake("convrot.lost", told, plain)
    if stored.format.rotation != "never":
        for group in _GROUPS:
            rotated = {**settings, "convrot_groupsize": group}
            if stored.format.rotation == "optional":
                rotated["convrot"] = True
            if is_group(group) and shape[-1] % group == 0 and rotated != settings:
                told = f"is rotated in groups of {group}, which its marker does not say"
                yield _Mistake("convrot.lost", told, rotated)
    if stored.format.name in _NIBBLES:
        told = "has the two 4-bit codes of each byte in the other order"
        yield _Mistake("codes.order", told, settings, _swapped)
    if stored.format.name in _SWIZZLED:
        told = "has its block scales in the order of rows; ComfyUI needs them swizzled"
        yield _Mistake("scale.order", told, settings, beside={"weight_scale": _swizzled})
        if stored.format.name in _NIBBLES:
            told = "has its block scales and the two codes of each byte in the other order"
            change = {"weight_scale": _swizzled}
            yield _Mistake("scale.order", told, settings, _swapped, change)


def _swapped(codes: torch.Tensor) -> torch.Tensor:
    import torch

    raw = codes.contiguous().view(torch.uint8)
    return ((raw << 4) | (raw >> 4)).view(codes.dtype)


def _swizzled(scales: torch.Tensor) -> torch.Tensor:
    import torch

    if scales.ndim == 2:
        return swizzle(scales)
    return torch.stack([swizzle(one) for one in scales])
