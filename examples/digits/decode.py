"""Quantized layers to float weights, by cq's formats: what the sampler needs of cq."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cq.core import catalog


def decode(marker: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """A quantized layer's float weight, by the format that its marker names."""
    weight: Tensor = catalog.load("formats", marker["format"]).unpack(tensors, marker)
    return weight
