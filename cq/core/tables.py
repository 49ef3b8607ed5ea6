"""Constant tables on the devices that they are met on.

Owns the copies: a table is computed once, on the CPU, so that all devices look into the same
numbers, and copied once to each other device that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def on(
    device: torch.device, table: Callable[..., torch.Tensor], *arguments: Hashable
) -> torch.Tensor:
    """`table(*arguments)`, itself cached and never written to, on `device`."""
    # Without `non_blocking` the copy is complete when this returns, for every stream.
    return table(*arguments).to(device)
