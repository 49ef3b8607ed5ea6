"""The run time: quantized tensors that compute, in PyTorch alone or by comfy-kitchen's kernels.

>>> from cq.layouts import QuantizedTensor                                # doctest: +SKIP
>>> weight = QuantizedTensor.from_float(weight, "int8_tensorwise")        # doctest: +SKIP
>>> torch.nn.functional.linear(x, weight, bias)                           # doctest: +SKIP
>>> cq.layouts.load(model, "model-int8.safetensors")                      # doctest: +SKIP

Every storage format of the catalogue is a layout under its own name; a subclass of
`QuantizedLayout` is one more, and `cq quant --plugin FILE.py --format NAME` stores weights in it.

This package imports torch when one of its names is first asked for, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.lazy import exports

if TYPE_CHECKING:
    from cq.layouts.kitchen import use_kitchen
    from cq.layouts.loading import Loaded, load
    from cq.layouts.modules import mixed_precision_ops
    from cq.layouts.registry import QuantizedLayout, layout_named, register_layout_op
    from cq.layouts.tensor import QuantizedTensor

__all__ = [
    "Loaded",
    "QuantizedLayout",
    "QuantizedTensor",
    "layout_named",
    "load",
    "mixed_precision_ops",
    "register_layout_op",
    "use_kitchen",
]
__getattr__ = exports(
    __name__,
    {
        "Loaded": "cq.layouts.loading",
        "QuantizedLayout": "cq.layouts.registry",
        "QuantizedTensor": "cq.layouts.tensor",
        "layout_named": "cq.layouts.registry",
        "load": "cq.layouts.loading",
        "mixed_precision_ops": "cq.layouts.modules",
        "register_layout_op": "cq.layouts.registry",
        "use_kitchen": "cq.layouts.kitchen",
    },
)
