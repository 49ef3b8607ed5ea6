"""The ConvRot regular Hadamard rotation, as ComfyUI's runtime undoes it.

Source: comfy-kitchen `tensor/int8_utils.py:_build_hadamard`, `_rotate_weight`; ConvRot, arXiv
2512.03673. H4 = [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2; H16 = H4 (x) H4, and so on:
symmetric and an involution, so rotating twice is the identity. It is not the Sylvester matrix.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from cq.core import tables
from cq.core.errors import PlanError

if TYPE_CHECKING:
    import torch

GROUPS = (256, 64, 16)  # what ComfyUI's fused kernels serve; each a power of 4, largest first


def group_for(in_features: int, largest: int) -> int | None:
    """The largest rotation group up to `largest` that divides `in_features`, or None.

    >>> group_for(3072, 256), group_for(2432, 256), group_for(3360, 256), group_for(3420, 256)
    (256, 64, 16, None)
    """
    return next((g for g in GROUPS if g <= largest and in_features % g == 0), None)


def is_group(size: int) -> bool:
    """Whether ComfyUI can build the rotation: a power of 4, at least 4."""
    return size >= 4 and size & (size - 1) == 0 and (size.bit_length() - 1) % 2 == 0


@cache
def hadamard(size: int) -> torch.Tensor:
    """The normalized `(size, size)` matrix in float32.

    Raises: PlanError if `size` is not a power of 4.
    """
    import torch

    if not is_group(size):
        raise PlanError(f"a rotation group must be a power of 4, not {size}", code="plan.rotation")
    h4 = torch.tensor(
        [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32
    )
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.kron(h, h4)
    return h.div(size**0.5)


def rotate(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Rotate each group of `group` input features of a float32 weight `(rows, K)`; a new tensor.

    H256 is applied as H16 X H16 on 16x16 tiles
    (Kronecker factors), a quarter of the time of the 256x256 product; against that product single
    codes can differ at rounding ties.

    Shapes: `(rows, K)` to `(rows, K)`; `group` divides K.
    """
    import torch

    if group != 256:
        own = tables.on(weight.device, hadamard, group)
        return torch.mm(weight.reshape(-1, group), own).view(weight.shape)
    h16 = tables.on(weight.device, hadamard, 16)
    tiles = torch.mm(weight.reshape(-1, 16), h16).view(-1, 16, 16)
    return torch.matmul(h16, tiles).view(weight.shape)


def unrotate(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The rotation as ComfyUI undoes it, by the full matrix: equal to its values to the last bit.

    Shapes: `(rows, K)` to `(rows, K)`; `group` divides K.

    Source: comfy-kitchen `tensor/int8_utils.py:_rotate_weight`.
    """
    import torch

    rows, features = weight.shape
    h = tables.on(weight.device, hadamard, group)
    return torch.matmul(weight.reshape(rows, -1, group), h).view(rows, features)
