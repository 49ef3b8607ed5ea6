"""What comfy-kitchen makes of a weight in a storage format, and back: its layouts as the oracle.

Stored tensors go by their local names in a file (`weight`, `weight_scale`), settings are those of a
layer's marker. Only float32 weights go in, and only float32 weights come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from comfy_kitchen.tensor import get_layout_class

VERSION = version("comfy-kitchen")
LAYOUTS = {
    "asym_w4a8_int8": "AsymW4A8Int8Layout",
    "awq_w4a16": "TensorCoreAWQW4A16Layout",
    "convrot_w4a4": "TensorCoreConvRotW4A4Layout",
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "float8_e5m2": "TensorCoreFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
}
QUANTIZED = tuple(name for name in LAYOUTS if name != "awq_w4a16")  # kitchen only reads that one


def quantize(
    name: str, weight: torch.Tensor, marker: Mapping[str, Any], *, scaling: str | None = None
) -> dict[str, torch.Tensor]:
    """The stored tensors of a float32 `weight` `(N, K)` in the format `name`, by kitchen's own
    rules and defaults. `scaling` is that of int8: `row` (None) or `tensor`."""
    layout: Any = get_layout_class(LAYOUTS[name])
    settings: dict[str, Any] = {
        k: v for k, v in marker.items() if k not in {"format", "orig_shape"}
    }
    if name == "int8_tensorwise":
        settings["per_channel"] = scaling != "tensor"
    if name == "float8_e5m2":
        settings["dtype"] = torch.float8_e5m2
    codes, parameters = layout.quantize(weight, **settings)
    stored = layout.state_dict_tensors(codes, parameters)
    found = {"weight" + suffix: tensor for suffix, tensor in stored.items()}
    if name == "mxfp8":  # F8_E8M0 in kitchen, but not every reader of ComfyUI's knows that dtype
        found["weight_scale"] = found["weight_scale"].view(torch.uint8)
    return found


def dequantize(
    name: str,
    stored: Mapping[str, torch.Tensor],
    marker: Mapping[str, Any],
    shape: tuple[int, int],
) -> torch.Tensor:
    """The float32 weight of `shape` that ComfyUI computes with, where it dequantizes."""
    layout: Any = get_layout_class(LAYOUTS[name])
    beside = {key.removeprefix("weight_"): tensor for key, tensor in stored.items()}
    codes = beside.pop("weight")
    settings = {k: v for k, v in marker.items() if k not in {"format", "orig_shape"}}
    if name == "nvfp4":  # the names of files and of parameters differ
        beside = {"scale": beside["scale_2"], "block_scale": beside["scale"]}
    if name == "mxfp8":
        beside["scale"] = beside["scale"].view(torch.float8_e8m0fnu)
    if name == "asym_w4a8_int8":
        beside["scale"] = beside.pop("s_rel")
    parameters = layout.Params(orig_dtype=torch.float32, orig_shape=shape, **beside, **settings)
    value: torch.Tensor = layout.dequantize(codes, parameters)
    return value[: shape[0], : shape[1]]
