"""Merging: a stage that adds adapters (LoRA) to the weights of a checkpoint.

>>> import cq, cq_merge
>>> base = cq.open("flux.safetensors")                         # doctest: +SKIP
>>> merged = cq_merge.merge(base, ["style.safetensors:0.8"])   # doctest: +SKIP
>>> cq.write(merged, "flux-style.safetensors")                 # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.lazy import exports

if TYPE_CHECKING:
    from cq_merge.stage import MergeStage, merge

__all__ = ["MergeStage", "merge"]
__getattr__ = exports(
    __name__,
    {
        "MergeStage": "cq_merge.stage",
        "merge": "cq_merge.stage",
    },
)
