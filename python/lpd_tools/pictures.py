"""Arranges several images in one picture, tiled or a row per label, and measures how far two images differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lpd_ext.state_files import complete_file

_CAPTION = 16
_GAP = 4


def tiled(images: np.ndarray) -> np.ndarray:
    """Tiles images uint8 [B, h, w, 3] in about as many rows as columns, padded with black."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = np.concatenate([images, np.zeros((rows * columns - count, height, width, channels), images.dtype)])
    grid = padded.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    tiles: np.ndarray = grid.reshape(rows * height, columns * width, channels)
    return tiles


def labelled_grid(images: list[Image.Image], captions: list[str], per_label: int) -> Image.Image:
    """Draws one row per caption: the name, then its images, small ones enlarged to at least 64 pixels."""
    factor = max(1, math.ceil(64 / max(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    font = ImageFont.load_default(_CAPTION)
    text_width = max(math.ceil(font.getlength(caption)) for caption in captions) + 3 * _GAP
    canvas = Image.new(
        "RGB",
        (text_width + per_label * (width + _GAP), len(captions) * (height + _GAP) + _GAP),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions):
        top = _GAP + row * (height + _GAP)
        draw.text((_GAP, top + height // 2), caption, fill="black", font=font, anchor="lm")
        for column in range(per_label):
            image = images[row * per_label + column].resize((width, height), Image.Resampling.LANCZOS)
            canvas.paste(image, (text_width + column * (width + _GAP), top))
    return canvas


def write_png(path: str | Path, save: Callable[..., object]) -> None:
    """Writes a picture of Pillow or matplotlib by its own `save(file, format=...)`, whole or not at all."""
    with complete_file(path) as temporary:
        save(temporary, format="png")


def psnr(found: Tensor, wanted: Tensor, peak: float = 255.0) -> float:
    """Returns 10·log10(peak² / mean squared error) in dB, over all elements."""
    if found.shape != wanted.shape:
        raise ValueError(f"found and wanted must have one shape, got {tuple(found.shape)} and {tuple(wanted.shape)}")
    error = (found.double() - wanted.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)
