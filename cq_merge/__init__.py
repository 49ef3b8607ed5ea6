"""Merging: a stage that adds adapters (LoRA and its kin, or whole models) to the weights of a
checkpoint.

>>> import cq, cq_merge
>>> base = cq.open("flux.safetensors")                         # doctest: +SKIP
>>> merged = cq_merge.merge(base, ["style.safetensors:0.8"])   # doctest: +SKIP
>>> cq.write(merged, "flux-style.safetensors")                 # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.lazy import exports

if TYPE_CHECKING:
    from cq_merge.explaining import Explanation, explain
    from cq_merge.extracting import ExtractStage, Losses, extract
    from cq_merge.merging import merge
    from cq_merge.stage import MergeStage

__all__ = [
    "Explanation",
    "ExtractStage",
    "Losses",
    "MergeStage",
    "explain",
    "extract",
    "merge",
]
__getattr__ = exports(
    __name__,
    {
        "Explanation": "cq_merge.explaining",
        "ExtractStage": "cq_merge.extracting",
        "Losses": "cq_merge.extracting",
        "MergeStage": "cq_merge.stage",
        "explain": "cq_merge.explaining",
        "extract": "cq_merge.extracting",
        "merge": "cq_merge.merging",
    },
)
