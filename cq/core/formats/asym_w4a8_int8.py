"""`asym_w4a8_int8`: 4-bit codes that stand for int8 numbers, in the rotated basis.

A code names one of 16 levels between -1 and 1; times the scale of its group of 16 columns it is
rounded to an int8 number, which the runtime multiplies; a float32 scale per row does the rest.
Only the symmetric kind exists in files, whatever the name says.

Stored: `weight` I8 `(N, K/2)`, the even column in the low nibble; `weight_s_rel` F8_E4M3
`(N, K/16)`; `weight_s_channel` F32 `(N,)`; `weight_codebook` F32 `(16,)`. Read as well: uniform
6-bit codes, `(N, 3K/4)` with no codebook, other groups, float32 group scales.

Source: comfy-kitchen `tensor/w4a8_int8.py`, `tensor/w4a8_packed.py` (`_unpack_codes`),
`backends/eager/w4a8_int8.py` (`validate_w4a8_operands`, `dequantize_w4a8_int8_weight`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cq.core import tables
from cq.core.dtypes import TensorSpec
from cq.core.errors import InputError
from cq.core.formats import Fault, Format
from cq.core.formats._codebook import CODEBOOK, GROUP, CodebookGrid, codebook, decoded
from cq.core.formats.convrot_w4a4 import (
    group_faults,
    rotated_refusal,
    rotation_group,
    see_group,
    settings_of,
)
from cq.core.grid import Scales
from cq.core.packing import fits, pack_nibbles, spread, unpack_nibbles
from cq.core.rotation import unrotate

if TYPE_CHECKING:
    import torch


class AsymW4A8Int8(Format):
    """The format plug."""

    name = "asym_w4a8_int8"
    scalings = ("block",)
    first_comfyui = "0.31.0"
    rotation = "always"

    def refuse(self, weight: TensorSpec, scaling: str, group: int | None) -> str | None:
        """K must be a multiple of 16 and of a rotation group."""
        return rotated_refusal(weight, GROUP, group)

    def tensors(self, weight: TensorSpec, scaling: str) -> dict[str, TensorSpec]:
        """Codes, scales of groups and of rows, and the codebook."""
        rows, columns = weight.shape
        return {
            "weight": TensorSpec("I8", (rows, columns // 2)),
            "weight_s_rel": TensorSpec("F8_E4M3", (rows, columns // GROUP)),
            "weight_s_channel": TensorSpec("F32", (rows,)),
            "weight_codebook": TensorSpec("F32", (len(CODEBOOK),)),
        }

    def marker(self, weight: TensorSpec, scaling: str, group: int | None) -> dict[str, Any]:
        """The name and both groups."""
        return {"format": self.name, "group_size": GROUP, "convrot_groupsize": group}

    def grid(self, weight: TensorSpec, scaling: str) -> CodebookGrid:
        """The codebook's levels."""
        return CodebookGrid()

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pairs of codes as bytes."""
        import torch

        return pack_nibbles(codes, high_first=False).view(torch.int8)

    def pack_scales(self, scales: Scales) -> dict[str, torch.Tensor]:
        """Scales are stored as they are, with the codebook."""
        return {
            "weight_s_rel": scales["s_rel"],
            "weight_s_channel": scales["s_channel"],
            "weight_codebook": tables.on(scales["s_channel"].device, codebook),
        }

    def check(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> list[Fault]:
        """Dtypes, shapes that fit together, and groups that ComfyUI's kernels take."""
        weight = stored.get("weight")
        if weight is None:
            return [Fault("weight.missing", "has no `weight`")]
        if weight.dtype != "I8" or len(weight.shape) != 2:
            return [Fault("weight.dtype", f"stores its weight as {weight}, not as 2-D I8")]
        missing = [n for n in ("weight_s_rel", "weight_s_channel") if n not in stored]
        if missing:
            return [Fault("scale.missing", f"has no `{name}`") for name in missing]
        faults = _dtype_faults(stored)
        group = _group_size(marker)
        if group < 4 or (16 % group and group % 16):
            sentence = f"has groups of {group}, which must divide 16 or be multiples of 16"
            return [*faults, Fault("group.size", sentence)]
        rows, packed = weight.shape
        relative, channel = stored["weight_s_rel"].shape, stored["weight_s_channel"].shape
        columns, bits = _columns_and_bits(stored, group)
        if not bits or relative != (rows, columns // group):
            sentence = f"has group scales of shape {list(relative)} for rows of {packed} bytes"
            return [*faults, Fault("scale.shape", f"{sentence} and groups of {group}")]
        if channel != (rows,):
            sentence = f"has row scales of shape {list(channel)}; ComfyUI needs [{rows}]"
            faults.append(Fault("scale.shape", sentence))
        multiple = 16 if bits == 4 else 32
        if columns % multiple or (bits == 6 and group % 16):
            sentence = f"has {bits}-bit codes of K={columns} in groups of {group}"
            faults.append(Fault("weight.shape", f"{sentence}, which no kernel takes"))
        codebook = stored.get("weight_codebook")
        if codebook is not None and (bits == 6 or codebook.shape != (16,)):
            sentence = f"has a codebook of shape {list(codebook.shape)} for {bits}-bit codes"
            faults.append(Fault("codebook.shape", sentence))
        return faults + group_faults(marker, columns)

    def recognizes(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> bool:
        """The scales of groups and of rows that no other format has."""
        packed = stored["weight"].dtype in {"I8", "U8"} and "weight_s_channel" in stored
        if not packed or "weight_s_rel" not in stored:
            return False
        return _columns_and_bits(stored, _group_size(marker)) != (0, 0)

    def shape(self, stored: Mapping[str, TensorSpec], marker: Mapping[str, Any]) -> tuple[int, ...]:
        """As wide as the group scales say. Raises: InputError if rows of codes are not 4 or 6 bits
        for each column, or another tensor does not fit."""
        for name in ("weight_s_rel", "weight_s_channel"):
            if name not in stored:
                raise InputError(f"there is no `{name}` beside the codes", code="input.scale")
        rows = stored["weight"].shape[0] if stored["weight"].shape else 0
        columns, bits = _columns_and_bits(stored, _group_size(marker))
        relative, channel = stored["weight_s_rel"].shape, stored["weight_s_channel"].shape
        codebook = stored.get("weight_codebook")
        if not bits or relative[0] != rows or not fits(channel, (rows, columns)):
            raise InputError(
                f"scales of shapes {list(relative)} and {list(channel)} do not fit codes of shape"
                f" {list(stored['weight'].shape)}",
                code="input.scale",
            )
        if codebook is not None and (bits != 4 or codebook.numel != len(CODEBOOK)):
            raise InputError(
                f"a codebook of shape {list(codebook.shape)} does not fit {bits}-bit codes",
                code="input.scale",
            )
        see_group(marker, columns)
        return rows, columns

    def unpack(
        self,
        rows: torch.Tensor,
        start: int,
        beside: Mapping[str, torch.Tensor],
        marker: Mapping[str, Any],
    ) -> torch.Tensor:
        """int8 numbers x row scale, rotated back."""
        import torch

        relative = beside["weight_s_rel"][start : start + rows.shape[0]]
        if relative.dtype == torch.uint8:
            relative = relative.view(torch.float8_e4m3fn)
        columns = relative.shape[1] * _group_size(marker)
        six = rows.shape[1] * 8 != columns * 4
        codes = _unpack_six_bits(rows, columns) if six else unpack_nibbles(rows, high_first=False)
        own = beside.get("weight_codebook")
        if own is None:
            levels = codes.float().sub_(32 if six else 8)
        else:
            table = own.float().reshape(-1)
            levels = table.index_select(0, codes.view(-1).int()).view(codes.shape)
        value = decoded(levels, relative)
        value.mul_(spread(beside["weight_s_channel"], start, *value.shape))
        return unrotate(value, rotation_group(marker))


def _group_size(marker: Mapping[str, Any]) -> int:
    """The columns that share a group scale; 0 for what is no number."""
    group = settings_of(marker).get("group_size", GROUP)
    return group if type(group) is int else 0


def _columns_and_bits(stored: Mapping[str, TensorSpec], group: int) -> tuple[int, int]:
    """K by the group scales, and the bits of a code; both 0 if they are not 4 or 6."""
    weight, relative = stored["weight"].shape, stored["weight_s_rel"].shape
    if len(weight) == len(relative) == 2 and group > 0:
        columns = relative[1] * group
        for bits in (4, 6):
            if columns > 0 and weight[1] * 8 == columns * bits:
                return columns, bits
    return 0, 0


def _dtype_faults(stored: Mapping[str, TensorSpec]) -> list[Fault]:
    faults = []
    for name, accepted in (
        ("weight_s_rel", ("F8_E4M3", "U8", "F32")),
        ("weight_s_channel", ("F32",)),
        ("weight_codebook", ("F32",)),
    ):
        if name in stored and stored[name].dtype not in accepted:
            sentence = f"has a {stored[name].dtype} `{name}`; ComfyUI needs {accepted[0]}"
            faults.append(Fault("scale.dtype", sentence))
    return faults


def _unpack_six_bits(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes 0 to 63: a plane of low nibbles, then one of the high two bits, four to a byte."""
    import torch

    raw = rows.contiguous().view(torch.uint8)
    low = unpack_nibbles(raw[:, : columns // 2], high_first=False)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)
    high = (raw[:, columns // 2 :, None] >> shifts) & 3
    return low | (high << 4).view(low.shape)


PLUG = AsymW4A8Int8()
