"""Modules that load quantized weights from a state dict, as ComfyUI's operations classes do.

Owns `mixed_precision_ops` and the `Linear` and `Embedding` that it makes.

Source: the calling convention of ComfyUI `comfy/ops.py` (`mixed_precision_ops`,
`_load_quantized_module`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as functional

from cq.core import comfy
from cq.core.dtypes import spec_of
from cq.core.errors import InputError
from cq.layouts.tensor import QuantizedTensor
from cq.layouts.weights import quantized_weight, see_floats

_MARKER = comfy.MARKER.removeprefix(".")
_OWN = ("weight", "input_scale", "pre_quant_scale", _MARKER)


class _Loads(torch.nn.Module):
    """What `Linear` and `Embedding` share: how a weight comes from a state dict and goes into one.

    Numbers are not initialised: they are to be loaded.
    """

    compute_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def reset_parameters(self) -> None:
        """Leave the numbers as they are."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the weight with what belongs to it, and leave the rest to PyTorch.

        Raises: InputError if what is there does not make a weight.
        """
        own = {
            name.removeprefix(prefix): name
            for name in state_dict
            if name.startswith(prefix) and name.removeprefix(prefix).startswith(_OWN)
        }
        layer, held = prefix.removesuffix("."), self._parameters["weight"]
        assert held is not None
        rest = {name: value for name, value in state_dict.items() if name not in own.values()}
        if "weight" in own:
            found = {name: state_dict[full] for name, full in own.items()}
            marker = found.pop(_MARKER, None)
            weight = self._weight(layer, found, marker, held)
            weight = weight if held.is_meta else weight.to(held.device)
            self._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
            unexpected_keys += (
                [] if marker is not None else [own[n] for n in found if n != "weight"]
            )
        else:
            missing_keys.append(f"{prefix}weight")
            unexpected_keys += own.values()
        bias, name = self._parameters.get("bias"), f"{prefix}bias"
        if bias is not None and bias.is_meta and name in rest:
            value = rest[name].to(self.compute_dtype)
            self._parameters["bias"] = torch.nn.Parameter(value, requires_grad=False)
        seen: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, seen, unexpected_keys, error_msgs
        )
        missing_keys += [name for name in seen if name != f"{prefix}weight"]

    def _weight(
        self,
        layer: str,
        found: dict[str, torch.Tensor],
        marker: torch.Tensor | None,
        held: torch.Tensor,
    ) -> torch.Tensor:
        shape = tuple(held.shape)
        if marker is not None:
            settings = comfy.parse_marker(bytes(marker.cpu().tolist()), layer=layer)
            return quantized_weight(layer, found, settings, shape=shape, dtype=self.compute_dtype)
        weight = found["weight"]
        see_floats(layer, spec_of(weight))
        if tuple(weight.shape) != shape:
            raise InputError(
                f"the layer `{layer}` has a weight of shape {list(weight.shape)}; the model has"
                f" {list(shape)}",
                where=layer,
                code="input.shape",
            )
        return weight.to(self.compute_dtype)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """A quantized weight as the tensors that a file holds of it, its marker among them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(f"{prefix}weight")
        if isinstance(weight, QuantizedTensor):
            stored, marker = weight.stored()
            destination.update({prefix + name: value for name, value in stored.items()})
            raw = list(comfy.marker_bytes(marker))
            destination[prefix + _MARKER] = torch.tensor(raw, dtype=torch.uint8)


class Linear(_Loads, torch.nn.Linear):
    """A linear layer whose weight may be quantized. `dtype` is there because callers give it;
    `compute_dtype` decides."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Linear.__init__(
            self, in_features, out_features, bias, device=device, dtype=self.compute_dtype
        )
        self.requires_grad_(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input W^T + b` in the input's dtype."""
        weight: torch.Tensor = self.weight
        if isinstance(weight, QuantizedTensor):
            weight = weight.shown_as(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, weight.to(input.dtype), bias)


class Embedding(_Loads, torch.nn.Embedding):
    """An embedding table that may be quantized; only the rows asked for are dequantized. `dtype`
    is there because callers give it; `compute_dtype` decides."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            device=device,
            dtype=self.compute_dtype,
        )
        self.requires_grad_(False)


def mixed_precision_ops(compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """A class with `Linear` and `Embedding`, for models that take their modules from one.

    Their `load_state_dict` makes `weight` a `QuantizedTensor` where the layer has a `comfy_quant`
    marker, and otherwise casts to `compute_dtype`, which is also the dtype that quantized weights
    show.

    >>> operations = mixed_precision_ops(torch.float32)
    >>> operations.Linear(4, 2, bias=False).weight.shape
    torch.Size([2, 4])
    """
    own = {"compute_dtype": compute_dtype}
    modules = {kind.__name__: type(kind.__name__, (kind,), own) for kind in (Linear, Embedding)}
    return type("MixedPrecisionOps", (), modules)
