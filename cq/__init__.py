"""cq: diffusion-model checkpoints to quantized ones that ComfyUI loads natively.

>>> import cq                                          # imports no torch
>>> base = cq.open("flux.safetensors")                 # doctest: +SKIP
>>> cq.write(base, "copy.safetensors")                 # doctest: +SKIP
"""

from __future__ import annotations

from cq.core.checkpoint import Checkpoint
from cq.core.errors import CqError
from cq.core.manifest import open_checkpoint as open
from cq.core.write import Written, write
from cq.version import VERSION

__version__ = VERSION

__all__ = ["Checkpoint", "CqError", "Written", "__version__", "open", "write"]
