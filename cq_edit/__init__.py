"""Editing: a stage that changes names, markers, metadata and single tensors of a checkpoint, and
copies all other bytes unread.

>>> import cq, cq_edit
>>> model = cq.open("flux-int8.safetensors")                        # doctest: +SKIP
>>> bare = cq_edit.edit(model, rename=["model.diffusion_model.="])   # doctest: +SKIP
>>> cq.write(bare, "flux-int8-bare.safetensors")                     # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.lazy import exports

if TYPE_CHECKING:
    from cq_edit.extracting import split_components
    from cq_edit.stage import EditStage, edit

__all__ = ["EditStage", "edit", "split_components"]
__getattr__ = exports(
    __name__,
    {
        "EditStage": "cq_edit.stage",
        "edit": "cq_edit.stage",
        "split_components": "cq_edit.extracting",
    },
)
