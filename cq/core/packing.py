"""How codes and scales lie in bytes: nibbles, the swizzled order of block scales, and scales of the
shapes that tools have written. Knows layouts, no format.

Source: comfy-kitchen `float_utils.py` (`pack_uint4`, `to_blocked`); cuBLAS, "1D block scaling
factors layout" (32x4x4 tiles).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TILE_ROWS, _TILE_COLUMNS = 128, 4


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def pad(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """`weight` `(rows, K)` with zeros up to `columns`; itself if there is nothing to add."""
    import torch

    missing = columns - weight.shape[1]
    return torch.nn.functional.pad(weight, (0, missing)) if missing else weight


def pack_nibbles(codes: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Pairs of 4-bit codes as bytes.

    Shapes: `(rows, K)` U8 or I8, of which the low four bits count, to `(rows, K/2)` U8. With
    `high_first` the even column lies in the high nibble.
    """
    import torch

    # A pair read as one little-endian 16-bit number: contiguous arithmetic, no strided slices.
    # Codes that meet in the low byte need no more masks: the rest is cut off at the end.
    pairs = codes.contiguous().view(torch.uint8).view(torch.int16) & 0x0F0F
    shifted = pairs >> (8 if high_first else 4)
    if high_first:
        pairs.bitwise_left_shift_(4)
    return shifted.bitwise_or_(pairs).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """The 4-bit codes 0 to 15 in bytes: the inverse of `pack_nibbles`.

    Shapes: `(rows, K/2)` of any 8-bit dtype to `(rows, K)` U8.
    """
    import torch

    raw = packed.contiguous().view(torch.uint8)
    high, low = raw >> 4, raw & 0x0F
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).view(*raw.shape[:-1], -1)


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the swizzled form of block scales `(rows, columns)`.

    >>> swizzled_shape(3072, 192), swizzled_shape(5, 3)
    ((3072, 192), (128, 4))
    """
    return round_up(rows, _TILE_ROWS), round_up(columns, _TILE_COLUMNS)


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """Block scales in the order that tensor cores read: tiles of 128 rows and 4 columns, each as 32
    rows of 4x4.

    Shapes: `(R, C)` of an 8-bit dtype to `swizzled_shape(R, C)`, padded with zero bytes.
    """
    import torch

    rows, columns = swizzled_shape(*scales.shape)
    raw = scales.contiguous().view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, columns - raw.shape[1], 0, rows - raw.shape[0]))
    tiles = raw.view(rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns).view(scales.dtype)


def unswizzle(scales: torch.Tensor, start: int, rows: int, columns: int) -> torch.Tensor:
    """Rows `start` (a multiple of 128) to `start + rows` of swizzled block scales.

    Shapes: `swizzled_shape(R, columns)` to `(rows, columns)`.
    """
    import torch

    stop = round_up(start + rows, _TILE_ROWS)
    raw = scales.view(torch.uint8)[start:stop]
    tiles = raw.reshape((stop - start) // 128, raw.shape[1] // 4, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(stop - start, raw.shape[1])
    return plain[:rows, :columns].contiguous().view(scales.dtype)


def fits(scale: Sequence[int], weight: tuple[int, int], block: int | None = None) -> bool:
    """Whether a scale of that shape can be spread over a weight `(N, K)`; see `spread`.

    >>> [fits(s, (256, 512)) for s in ((), (1,), (256,), (256, 1), (512,), (2, 4))]
    [True, True, True, True, False, False]
    >>> fits((2, 4), (256, 512), 128), fits((256, 4, 1), (256, 512), 128)
    (True, True)
    """
    rows, columns = weight
    shape = tuple(scale)
    if shape in {(), (1,), (1, 1), (rows,)}:
        return True
    if block is None:
        return shape == (rows, 1)
    if block <= 0 or columns % block:
        return False
    blocks = (rows // block, columns // block) if rows % block == 0 else None
    return shape in {blocks, (rows, columns // block, 1)}


def spread(
    scale: torch.Tensor, start: int, rows: int, columns: int, block: int | None = None
) -> torch.Tensor:
    """A weight's scale, of any shape that `fits`, so that it multiplies the rows from `start` on.

    Shapes: `()`, `(1,)`, `(N,)` or `(N, 1)`; with `block` two dimensions are square blocks
    `(N/block, K/block)`, three are a row's blocks `(N, K/block, 1)`. The result broadcasts against
    `(rows, columns)`.
    """
    value = scale.float()
    if value.numel() == 1:
        return value.reshape(())
    stop = start + rows
    if value.ndim == 1 or block is None:
        return value[start:stop].reshape(-1, 1)
    if value.ndim == 3:
        return value[start:stop, :, 0].repeat_interleave(block, dim=1)
    blocks = value[start // block : -(-stop // block)]
    first = start - start // block * block
    spread_rows = blocks.repeat_interleave(block, dim=0)[first : first + rows]
    return spread_rows.repeat_interleave(block, dim=1)
