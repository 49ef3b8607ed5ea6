"""`int8_blockwise`: symmetric int8 with one float32 scale per block of 128x128 weights.

Stored: `weight` I8 `(N, K)`; `weight_scale` F32 `(N/128, K/128)`. Read as well: blocks of another
side, and the scales of a row's blocks, `(N, K/block, 1)`.

No released ComfyUI loads it. A branch of silveroxides' ComfyUI did (`handle-3D-activation`,
2025-12), and the custom node ComfyUI-QuantOps does; there is no oracle in comfy-kitchen.

Source: the files of silveroxides/convert_to_quant; the blocks of DeepSeek-V3, arXiv 2412.19437,
section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cq.core.dtypes import TensorSpec
from cq.core.formats import Fault, Format, block_of, plain_shape
from cq.core.formats.float8_e4m3fn import refusal
from cq.core.formats.int8_tensorwise import snap_integers
from cq.core.grid import Scales, Steps
from cq.core.packing import spread

if TYPE_CHECKING:
    import torch

_BLOCK = 128
_LEVELS = 127
_SMALLEST_SCALE = 1e-30  # so that an all-zero block divides by something


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The integers -127 to 127 times a scale per square block. -128 stays unused."""

    scaling: ClassVar[str] = "block"
    surveys: ClassVar[bool] = False
    searches: ClassVar[bool] = False
    nbytes_work: ClassVar[int] = 4 + 1  # the scaled copy and the codes

    def survey(self, segments: Iterable[torch.Tensor]) -> Scales:
        """Nothing: segments hold whole blocks."""
        return {}

    def scales(self, weight: torch.Tensor, shared: Scales) -> Scales:
        """absmax / 127, at least 1e-30. Shapes: `(rows/128, K/128)`."""
        import torch

        strips = weight.reshape(weight.shape[0], -1, _BLOCK)
        # Two reductions rather than magnitudes, which would be another copy of the weight.
        absmax = torch.maximum(strips.amax(-1), -strips.amin(-1))
        largest = absmax.view(-1, _BLOCK, absmax.shape[1]).amax(1)
        return {"scale": (largest / _LEVELS).clamp_(min=_SMALLEST_SCALE)}

    def search(
        self, weight: torch.Tensor, shared: Scales, importance: torch.Tensor | None = None
    ) -> Scales:
        """The plain rule: at 8 bits smaller scales gain nothing, and clipping a scale that many
        rows share is a gamble."""
        return self.scales(weight, shared)

    def nearest(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Int8 codes, ties to even."""
        import torch

        codes = _blocks(weight) / scales["scale"][:, None, :, None]
        return codes.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8).view(weight.shape)

    def values(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """codes x scale in float32."""
        value = _blocks(codes.float()) * scales["scale"][:, None, :, None]
        return value.view(codes.shape)

    def of_columns(self, scales: Scales, chosen: torch.Tensor) -> Steps:
        """The step of each column's block, repeated for the block's rows."""
        step = scales["scale"].T.index_select(0, chosen // _BLOCK)
        return Steps(step=step.repeat_interleave(_BLOCK, 1), snap=snap_integers(_LEVELS))


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.reshape(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)


class Int8Blockwise(Format):
    """The format plug."""

    name = "int8_blockwise"
    scalings = ("block",)
    first_comfyui = None
    loader = "the ComfyUI-QuantOps custom node"
    keeps_shape = True

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """Both sides must be multiples of 128."""
        reason = refusal(weight, group)
        if reason is not None:
            return reason
        for side, size in zip("NK", weight.shape, strict=True):
            if size % _BLOCK:
                return f"{side}={size} is not a multiple of {_BLOCK}"
        return None

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """`weight` I8 and `weight_scale` F32."""
        rows, columns = weight.shape
        return {
            "weight": TensorSpec("I8", weight.shape),
            "weight_scale": TensorSpec("F32", (rows // _BLOCK, columns // _BLOCK)),
        }

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The name and the block's side."""
        return {"format": self.name, "group_size": _BLOCK}

    def grid(self, weight: TensorSpec, scaling: str) -> BlockGrid:
        """The int8 levels."""
        return BlockGrid()

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes are stored as they are."""
        return codes

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Scales are stored as they are."""
        return {"weight_scale": scales["scale"]}

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Dtypes, a block that divides both sides, and a scale for each block."""
        weight, scale = stored.get("weight"), stored.get("weight_scale")
        if weight is None:
            return [Fault("weight.missing", "has no `weight`")]
        faults = []
        if weight.dtype != "I8" or len(weight.shape) != 2:
            faults.append(Fault("weight.dtype", f"stores its weight as {weight}, not as 2-D I8"))
        if scale is None:
            return [*faults, Fault("scale.missing", "has no `weight_scale`")]
        if scale.dtype != "F32":
            faults.append(Fault("scale.dtype", f"has a {scale.dtype} scale; its loader needs F32"))
        if len(weight.shape) != 2:
            return faults
        block = _side(marker)
        if block <= 0 or any(side % block for side in weight.shape):
            sentence = f"has blocks of {block}, which do not divide {list(weight.shape)}"
            return [*faults, Fault("group.size", sentence)]
        needed = tuple(side // block for side in weight.shape)
        if scale.shape != needed:
            sentence = f"has a scale of shape {list(scale.shape)}; its loader needs {list(needed)}"
            faults.append(Fault("scale.shape", sentence))
        return faults

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """I8 codes and scales of blocks."""
        weight, scale = stored["weight"], stored.get("weight_scale")
        if weight.dtype != "I8" or scale is None or not scale.is_float:
            return False
        return block_of(weight.shape, scale.shape) is not None

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """The stored weight's own. Raises: InputError if the scale does not fit it."""
        return plain_shape(stored, block=_side(marker))

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """codes x scale."""
        count, columns = rows.shape
        scale = spread(beside["weight_scale"], start, count, columns, _side(marker))
        return rows.float().mul_(scale)


def _side(marker: Mapping[str, Any]) -> int:
    """The side of a block; 0 for what is no number."""
    block = marker.get("group_size", _BLOCK)
    return block if type(block) is int else 0


PLUG = Int8Blockwise()
