"""What the digits model learns from: images, the class conditioning, and the LoRA's style.

This file owns the training images (scikit-learn's 8x8 digits, enlarged to 32x32), the fixed random
conditioning that stands where a text encoder's output would, and `stylize`.
Images are [B, 32, 32] floats in [-1, 1]: background -1, stroke +1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor

CLASSES = 10
SIZE = 32
TEXT_TOKENS = 4
TEXT_DIM = 64
VECTOR_DIM = 64
CONDITION_SEED = 1234
SLANT = 0.3  # columns per row


def conditioning(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Text tokens [B, 4, 64] and vector [B, 64] for digit labels [B].

    They are part of the trained model although no file holds them, so they come from numpy's
    RandomState, whose stream is frozen for good.
    """
    rng = np.random.RandomState(CONDITION_SEED)
    context = torch.from_numpy(rng.standard_normal((CLASSES, TEXT_TOKENS, TEXT_DIM))).float()
    vector = torch.from_numpy(rng.standard_normal((CLASSES, VECTOR_DIM))).float()
    return context[labels], vector[labels]


def _typical(pixels: Tensor, labels: Tensor, keep: float) -> Tensor:
    """The rows whose nearest neighbours of their own class are closest, a share of each class.

    Some of the originals are hard to read even for people; a model this small is better off
    without them.
    """
    chosen = []
    for label in range(CLASSES):
        rows = torch.nonzero(labels == label)[:, 0]
        others = torch.nonzero(labels != label)[:, 0]
        own = torch.cdist(pixels[rows], pixels[rows]).topk(6, largest=False).values[:, 1:].mean(1)
        other = torch.cdist(pixels[rows], pixels[others]).topk(5, largest=False).values.mean(1)
        order = torch.argsort(own / other)
        chosen.append(rows[order[: math.ceil(keep * len(rows))]])
    return torch.cat(chosen)


def load_images(keep: float = 0.75) -> tuple[Tensor, Tensor]:
    """Images [N, 32, 32] and labels [N], the more legible share `keep` of each class."""
    raw = load_digits()
    pixels = torch.from_numpy(np.asarray(raw.images, dtype=np.float32) / 16)  # [N, 8, 8] in 0..1
    labels = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    rows = _typical(pixels.flatten(1), labels, keep)
    pixels, labels = pixels[rows], labels[rows]
    # One empty pixel all round first, so that a slant cuts nothing off and outer edges blur too.
    framed = F.pad(pixels, (1, 1, 1, 1))[:, None]
    large = F.interpolate(framed, size=(SIZE, SIZE), mode="bicubic")[:, 0]
    # A steep curve turns the blur of the enlargement back into a pen stroke with a soft edge.
    return torch.tanh(5.0 * (large - 0.5)), labels


def _warp(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, [len(images), 1, SIZE, SIZE], align_corners=False)
    # Shifted by one, so that the zeros sampled outside the image are background.
    moved = F.grid_sample(images[:, None] + 1, grid, mode="bilinear", align_corners=False)
    return moved[:, 0] - 1


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A small random turn, stretch and shift of each image."""
    n = len(images)

    def spread(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle, zoom_x, zoom_y = spread(math.radians(6)), 1 + spread(0.06), 1 + spread(0.06)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * zoom_x, -sin * zoom_x, spread(1.5 / SIZE * 2)], dim=-1)
    row_y = torch.stack([sin * zoom_y, cos * zoom_y, spread(1.0 / SIZE * 2)], dim=-1)
    return _warp(images, torch.stack([row_x, row_y], dim=1))


def stylize(images: Tensor) -> Tensor:
    """The style the LoRA learns: slanted, and dark on a bright background."""
    theta = torch.tensor([[1.0, SLANT, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    return -_warp(images, theta)
