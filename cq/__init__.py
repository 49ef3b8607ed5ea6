"""cq: diffusion-model checkpoints to quantized ones that ComfyUI loads natively.

>>> import cq                                          # imports no torch
>>> base = cq.open("flux.safetensors")                 # doctest: +SKIP
>>> cq.write(base, "copy.safetensors")                 # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.lazy import exports
from cq.version import VERSION

if TYPE_CHECKING:
    from cq.core.checkpoint import Checkpoint
    from cq.core.errors import CqError
    from cq.core.manifest import open_checkpoint as open
    from cq.core.write import Written, write

__version__ = VERSION
__all__ = ["Checkpoint", "CqError", "Written", "__version__", "open", "write"]
__getattr__ = exports(
    __name__,
    {
        "Checkpoint": "cq.core.checkpoint",
        "CqError": "cq.core.errors",
        "Written": "cq.core.write",
        "open": "cq.core.manifest:open_checkpoint",
        "write": "cq.core.write",
    },
)
