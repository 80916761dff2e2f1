"""Turns a picture on disk into the tokenizer's input: decoded, RGB, cropped to a square, in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from lpd_ext.picture import UnreadableImageError, to_rgb

MAX_ASPECT = 50  # a thinner picture would be enlarged to gigabytes before it is cropped


def background_colour(text: str) -> tuple[int, int, int]:
    """RGB of a colour by name or #rrggbb; ValueError for others."""
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        colour = (0, 0, 0, 0)
    if len(colour) == 4:  # an alpha value means nothing here
        raise ValueError(f"background must be a colour such as white, black or #808080, got {text!r}")
    return colour


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Returns the central square of a picture, size x size, like ADM's evaluation (guided-diffusion) crops ImageNet.

    Halves the picture by box averaging while the shorter side is at least 2·size, resizes it bicubically so that the
    shorter side is `size`, and crops; an odd rest is cut at the right and at the bottom.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadableImageError(f"{image.width}x{image.height}: one side is over {MAX_ASPECT} times the other")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def square_pixels(image: Image.Image, size: int, background: tuple[int, int, int]) -> Tensor:
    """uint8 [3, size, size] of a picture in any mode."""
    return torch.from_numpy(np.array(centre_crop(to_rgb(image, background), size))).permute(2, 0, 1).contiguous()


def to_input(pixels: Tensor) -> Tensor:
    """Tokenizer input float32 [B, 3, S, S] in [-1, 1] of pixels uint8 [B, 3, S, S]."""
    return pixels.float() / 127.5 - 1
