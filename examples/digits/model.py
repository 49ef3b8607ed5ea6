"""The digits model: a small rectified-flow transformer with Flux.1 (schnell) layer names.

This file owns the architecture, the way images are packed into tokens, and reading a checkpoint
into the module.  The layer names, tensor shapes and order of operations are those of Flux.1, so
the checkpoint is recognised by anything that recognises Flux.1; only the sizes are smaller.

Shapes in comments: B images, L = T + I tokens (T text, I image), H hidden width, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import cq
from cq import layouts

HEAD_DIM = 128
ROPE_AXES = (16, 56, 56)  # one slice of the head width for each of the three position ids
ROPE_THETA = 10_000.0
TIME_DIM = 256
TIME_FACTOR = 1000.0
TIME_MAX_PERIOD = 10_000.0
MLP_RATIO = 4
PATCH = 2  # latent pixels along one side of a token
UNSHUFFLE = 4  # image pixels along one side of a latent pixel
MARKER = "comfy_quant"


@dataclass(frozen=True)
class Config:
    """The sizes that a checkpoint's tensor shapes determine."""

    hidden: int = 256
    in_channels: int = 16
    context_dim: int = 64
    vector_dim: int = 64
    depth_double: int = 1
    depth_single: int = 2

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def token_dim(self) -> int:
        return self.in_channels * PATCH * PATCH


class Shaped(Protocol):
    """A tensor, or what a file's header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def config_of(state: Mapping[str, Shaped]) -> Config:
    """Read the sizes from names and shapes the way ComfyUI does: from the shapes and block
    counts."""

    def count(prefix: str) -> int:
        return len({name.split(".")[1] for name in state if name.startswith(prefix + ".")})

    hidden, token_dim = state["img_in.weight"].shape
    return Config(
        hidden=hidden,
        in_channels=token_dim // (PATCH * PATCH),
        context_dim=state["txt_in.weight"].shape[1],
        vector_dim=state["vector_in.in_layer.weight"].shape[1],
        depth_double=count("double_blocks"),
        depth_single=count("single_blocks"),
    )


# ---------------------------------------------------------------------------------------------
# Packing: image [B,32,32] <-> latent [B,16,8,8] <-> tokens [B,16,64]


def image_to_latent(image: Tensor) -> Tensor:
    """[B, 32, 32] -> [B, 16, 8, 8]: a fixed, lossless stand-in for an autoencoder."""
    return F.pixel_unshuffle(image[:, None], UNSHUFFLE)


def latent_to_image(latent: Tensor) -> Tensor:
    """[B, 16, 8, 8] -> [B, 32, 32]."""
    return F.pixel_shuffle(latent, UNSHUFFLE)[:, 0]


def pack(latent: Tensor) -> Tensor:
    """b c (h ph) (w pw) -> b (h w) (c ph pw): [B, 16, 8, 8] -> [B, 16, 64]."""
    b, c, height, width = latent.shape
    h, w = height // PATCH, width // PATCH
    x = latent.reshape(b, c, h, PATCH, w, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * PATCH * PATCH)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack` for a grid of h by w tokens."""
    b, _, n = tokens.shape
    c = n // (PATCH * PATCH)
    x = tokens.reshape(b, h, w, c, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h * PATCH, w * PATCH)


# ---------------------------------------------------------------------------------------------
# Position and time


def position_ids(text_tokens: int, h: int, w: int) -> Tensor:
    """[L, 3]: zeros for text, then (0, y, x) for each image token."""
    ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    image = torch.stack([torch.zeros_like(ys), ys, xs], dim=-1).reshape(h * w, 3)
    return torch.cat([torch.zeros(text_tokens, 3, dtype=image.dtype), image]).float()


def rope_table(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D/2] for position ids [L, 3]."""
    angles = []
    for axis, width in enumerate(ROPE_AXES):
        # Float64, because the powers of theta lose digits in float32.
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles.append(ids[:, axis, None].double() * ROPE_THETA**-exponent)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of numbers: [B, heads, L, D] with tables [L, D/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)


def time_embedding(t: Tensor) -> Tensor:
    """[B] in 0..1 -> [B, 256], cosines first."""
    half = TIME_DIM // 2
    exponent = torch.arange(half, dtype=torch.float32) / half
    angle = TIME_FACTOR * t.float()[:, None] * TIME_MAX_PERIOD**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ---------------------------------------------------------------------------------------------
# Layers


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without learned numbers: Flux.1 takes scale and shift from the modulation."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * layer_norm(x) + shift


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))  # [D]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.scale, eps=1e-6).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class Embedder(nn.Module):
    """Two linears around a SiLU, for the time and for the conditioning vector."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)  # [H, in_dim]
        self.out_layer = nn.Linear(hidden, hidden)  # [H, H]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class Modulation(nn.Module):
    """`parts` vectors of width H from the conditioning vector, in order shift, scale, gate."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(hidden, parts * hidden)  # [parts*H, H]

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        out: Tensor = self.lin(F.silu(vec))
        return out[:, None].chunk(self.parts, dim=-1)  # each [B, 1, H]


class Attention(nn.Module):
    """The projections of one stream of a double block; the block itself attends."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)  # [3H, H]
        self.norm = QKNorm(HEAD_DIM)
        self.proj = nn.Linear(hidden, hidden)  # [H, H]


def split_heads(qkv: Tensor, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, 3H] laid out as (3, heads, D) -> q, k, v, each [B, heads, L, D], q and k normed."""
    b, tokens, _ = qkv.shape
    q, k, v = qkv.reshape(b, tokens, 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return norm.query_norm(q), norm.key_norm(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """[B, heads, L, D] three times -> [B, L, H]."""
    out = F.scaled_dot_product_attention(apply_rope(q, *rope), apply_rope(k, *rope), v)
    return out.transpose(1, 2).flatten(2)


def make_mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden, MLP_RATIO * hidden),  # [4H, H]
        nn.GELU(approximate="tanh"),
        nn.Linear(MLP_RATIO * hidden, hidden),  # [H, 4H]
    )


class DoubleBlock(nn.Module):
    """Text and image keep their own layers and meet in one attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.img_mod = Modulation(hidden, 6)
        self.img_attn = Attention(hidden)
        self.img_mlp = make_mlp(hidden)
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn = Attention(hidden)
        self.txt_mlp = make_mlp(hidden)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = self.img_mod(vec)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.txt_mod(vec)

        i_qkv = self.img_attn.qkv(modulate(img, i_shift1, i_scale1))
        t_qkv = self.txt_attn.qkv(modulate(txt, t_shift1, t_scale1))
        i_parts = split_heads(i_qkv, self.img_attn.norm)
        t_parts = split_heads(t_qkv, self.txt_attn.norm)
        # Text first: the order of the tokens is part of the architecture.
        q, k, v = (torch.cat([t, i], dim=2) for t, i in zip(t_parts, i_parts, strict=True))
        out = attend(q, k, v, rope)
        t_out, i_out = out[:, : txt.shape[1]], out[:, txt.shape[1] :]

        img = img + i_gate1 * self.img_attn.proj(i_out)
        img = img + i_gate2 * self.img_mlp(modulate(img, i_shift2, i_scale2))
        txt = txt + t_gate1 * self.txt_attn.proj(t_out)
        txt = txt + t_gate2 * self.txt_mlp(modulate(txt, t_shift2, t_scale2))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined sequence."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.linear1 = nn.Linear(hidden, (3 + MLP_RATIO) * hidden)  # [7H, H]: qkv 3H, mlp 4H
        self.linear2 = nn.Linear((1 + MLP_RATIO) * hidden, hidden)  # [H, 5H]: attention H, mlp 4H
        self.norm = QKNorm(HEAD_DIM)
        self.modulation = Modulation(hidden, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(
            [3 * self.hidden, MLP_RATIO * self.hidden], dim=-1
        )
        attention = attend(*split_heads(qkv, self.norm), rope)
        joined = torch.cat([attention, F.gelu(mlp, approximate="tanh")], dim=-1)
        out: Tensor = x + gate * self.linear2(joined)
        return out


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, token_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, token_dim)  # [64, H]
        # A Sequential so that the linear is named `adaLN_modulation.1`, as in Flux.1.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))  # [2H, H]

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out


class DigitsFlux(nn.Module):
    """Flux.1 (schnell) with small sizes: predicts the velocity noise - image of a latent."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        c = self.config = config or Config()
        self.img_in = nn.Linear(c.token_dim, c.hidden)  # [H, 64]
        self.time_in = Embedder(TIME_DIM, c.hidden)  # [H, 256], [H, H]
        self.vector_in = Embedder(c.vector_dim, c.hidden)  # [H, 64], [H, H]
        self.txt_in = nn.Linear(c.context_dim, c.hidden)  # [H, 64]
        self.double_blocks = nn.ModuleList(DoubleBlock(c.hidden) for _ in range(c.depth_double))
        self.single_blocks = nn.ModuleList(SingleBlock(c.hidden) for _ in range(c.depth_single))
        self.final_layer = FinalLayer(c.hidden, c.token_dim)

    def forward(self, latent: Tensor, t: Tensor, context: Tensor, vector: Tensor) -> Tensor:
        """latent [B,16,8,8], t [B] in 0..1, context [B,T,64], vector [B,64] -> like latent."""
        h, w = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
        img: Tensor = self.img_in(pack(latent))  # [B, I, H]
        txt: Tensor = self.txt_in(context)  # [B, T, H]
        vec: Tensor = self.time_in(time_embedding(t)) + self.vector_in(vector)  # [B, H]
        rope = rope_table(position_ids(txt.shape[1], h, w))
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        x = torch.cat([txt, img], dim=1)  # [B, L, H]
        for block in self.single_blocks:
            x = block(x, vec, rope)
        return unpack(self.final_layer(x[:, txt.shape[1] :], vec), h, w)


# ---------------------------------------------------------------------------------------------
# Reading checkpoints


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint without quantized layers into float32 tensors."""
    tensors = load_file(path)
    marked = [name for name in tensors if name.endswith(f".{MARKER}")]
    if marked:
        raise ValueError(f"{path} has {len(marked)} quantized layers; `load` runs them as they are")
    return {name: tensor.float() for name, tensor in tensors.items()}


def load(source: str | Path | Mapping[str, Tensor]) -> DigitsFlux:
    """A model in float32 and evaluation mode, from a checkpoint file or a state dict.

    The quantized layers of a file stay quantized: they compute through `cq.layouts`.
    """
    if isinstance(source, (str, Path)):
        checkpoint = cq.open(source)
        model = DigitsFlux(config_of(checkpoint.specs))
        layouts.load(model, checkpoint)
    else:
        model = DigitsFlux(config_of(source))
        model.load_state_dict({name: tensor.float() for name, tensor in source.items()})
    return model.eval()
