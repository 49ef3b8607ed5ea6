"""Contact sheets: labelled rows of digit images as one PNG, and the figures to put in the labels.

This file owns how sets of samples are laid out for looking at, and how two sets are compared.
Images are [B, 32, 32] floats in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2  # pixels between images, before scaling
LABEL_HEIGHT = 16
PAPER = 96


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in decibels; the peak is the width of the range -1..1."""
    error = float((a.double() - b.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)


def amplified_difference(a: Tensor, b: Tensor, gain: float = 8.0) -> Tensor:
    """`gain` times the signed difference a - b, clamped to the image range: no change is grey."""
    return ((a - b) * gain).clamp(-1, 1)


def to_bytes(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[B, H, W] in [-1, 1] -> uint8 grey levels."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return levels.numpy().astype(np.uint8)


def contact_sheet(rows: Mapping[str, Tensor], path: str | Path, scale: int = 3) -> None:
    """Write one labelled row of images for each entry of `rows`, from top to bottom."""
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    cells = {label: to_bytes(images) for label, images in rows.items()}
    height, width = next(iter(cells.values())).shape[1:]
    step_x, step_y = (width + GAP) * scale, (height + GAP) * scale + LABEL_HEIGHT
    columns = max(len(images) for images in cells.values())
    sheet = Image.new("L", (columns * step_x + GAP * scale, len(cells) * step_y), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for row, (label, images) in enumerate(cells.items()):
        top = row * step_y
        draw.text((GAP * scale, top + 2), label, fill=255, font=font)
        for column, image in enumerate(images):
            cell = Image.fromarray(image)
            cell = cell.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(cell, (GAP * scale + column * step_x, top + LABEL_HEIGHT))
    sheet.save(path)
