"""From a picture as it lies on disk to the tokenizer's input: decoded, RGB, cropped to a square, in [-1, 1]."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor

MAX_ASPECT = 50  # a thinner picture would be enlarged to gigabytes before it is cropped


class UnreadableImageError(ValueError):
    """A picture cannot be decoded; the message says why."""


def open_image(file: str | Path | bytes) -> Image.Image:
    """The picture in a file, or in the bytes of one, fully decoded; UnreadableImageError if that fails."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            picture: Image.Image = image
            return picture
    except UnidentifiedImageError:
        raise UnreadableImageError("no image format that Pillow knows") from None
    except Exception as error:  # a damaged file can raise anything
        # The system's errors say the path too, which a list of skipped pictures must not depend on.
        text = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
        raise UnreadableImageError(text[0] if text else type(error).__name__) from error


def background_colour(text: str) -> tuple[int, int, int]:
    """RGB of a colour by name or #rrggbb; ValueError for others."""
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        colour = (0, 0, 0, 0)
    if len(colour) == 4:  # an alpha value means nothing here
        raise ValueError(f"background must be a colour such as white, black or #808080, got {text!r}")
    return colour


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The picture as RGB: transparent parts show `background`, 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.max() > 255:  # 16 bits; 65,535 is white
            grey = (grey.clip(0, 65535) + 128) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels, whose range nothing tells")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of a picture, size x size, as the evaluation of ADM (guided-diffusion) crops ImageNet.

    Halved by box averaging while the shorter side is at least 2·size, then resized bicubically so that it is `size`,
    then cropped; an odd rest is cut at the right and at the bottom.
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
