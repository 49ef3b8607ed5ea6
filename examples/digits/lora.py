"""A plain LoRA for the digits model: training wrappers, kohya file names, and a reference merge.

This file owns which layers the LoRA covers, how its tensors are named, and the formula
``W + strength * (alpha / rank) * up @ down``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREFIX = "lora_unet_"
RANK = 16
ALPHA = 8.0  # not the rank, so that a reader that forgets alpha / rank shows it


class LoraLinear(nn.Module):
    """A frozen linear plus its low-rank change."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        # Zeros, so that training starts from the base model exactly.
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + self.scaling * F.linear(F.linear(x, self.down), self.up)


def covers(name: str) -> bool:
    """Every linear of the blocks, and the two ends of the image path, where brightness is set."""
    return name.startswith(("double_blocks.", "single_blocks.", "img_in", "final_layer."))


def wrap(model: nn.Module, rank: int = RANK, alpha: float = ALPHA) -> dict[str, LoraLinear]:
    """Freeze `model` and put a `LoraLinear` around each covered layer, in place."""
    model.requires_grad_(False)
    wrapped = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and covers(name):
            parent, _, child = name.rpartition(".")
            wrapped[name] = LoraLinear(layer, rank, alpha)
            setattr(model.get_submodule(parent), child, wrapped[name])
    return wrapped


def kohya_name(layer: str) -> str:
    return PREFIX + layer.replace(".", "_")


def kohya_state(wrapped: Mapping[str, LoraLinear], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA file: down [r, K], up [N, r] and a 0-d alpha for each layer."""
    state = {}
    for layer, lora in wrapped.items():
        name = kohya_name(layer)
        state[f"{name}.lora_down.weight"] = lora.down.detach().to(dtype).contiguous()
        state[f"{name}.lora_up.weight"] = lora.up.detach().to(dtype).contiguous()
        alpha = lora.scaling * lora.down.shape[0]
        state[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return state


def merge(
    state: Mapping[str, Tensor], lora: Mapping[str, Tensor], strength: float = 1.0
) -> dict[str, Tensor]:
    """The state dict with the LoRA added in float32: what any other merge is compared with."""
    merged = {name: tensor.float() for name, tensor in state.items()}
    layers = {kohya_name(n.removesuffix(".weight")): n for n in state if n.endswith(".weight")}
    for name in sorted({key.split(".")[0] for key in lora}):
        down = lora[f"{name}.lora_down.weight"].float()
        up = lora[f"{name}.lora_up.weight"].float()
        scaling = float(lora[f"{name}.alpha"]) / down.shape[0]
        merged[layers[name]] = merged[layers[name]] + strength * scaling * (up @ down)
    return merged
