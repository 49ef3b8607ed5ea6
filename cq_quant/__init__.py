"""Quantization: a stage that stores the linear layers of a checkpoint in a quantized format.

>>> import cq, cq_quant
>>> model = cq_quant.quantize(cq.open("flux.safetensors"))     # doctest: +SKIP
>>> cq.write(model, "flux-int8.safetensors")                   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.lazy import exports

if TYPE_CHECKING:
    from cq_quant.convert import convert_to_int8
    from cq_quant.stage import QuantStage, quantize

__all__ = ["QuantStage", "convert_to_int8", "quantize"]
__getattr__ = exports(
    __name__,
    {
        "QuantStage": "cq_quant.stage",
        "convert_to_int8": "cq_quant.convert",
        "quantize": "cq_quant.stage",
    },
)
