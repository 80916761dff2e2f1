"""Picture files of any kind that Pillow reads, and their pixels as RGB."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value of the second


class UnreadableImageError(ValueError):
    """A picture cannot be decoded; the message says why."""


def check_pixels(image: Image.Image, max_pixels: int | None) -> None:
    """Raises UnreadableImageError for a picture of more pixels, without decoding it."""
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise UnreadableImageError(f"{image.width} x {image.height} pixels are more than {max_pixels:,}")


@cache
def reads_heif() -> bool:
    """Registers pillow-heif with Pillow if it is installed; returns whether HEIC pictures can be read."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def open_image(file: str | Path | bytes, max_pixels: int | None = None) -> Image.Image:
    """Opens and fully decodes a picture from a file or its bytes; UnreadableImageError if that fails.

    Refuses a picture of more than max_pixels before decoding it.
    """
    reads_heif()  # in worker processes too
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            check_pixels(image, max_pixels)
            image.load()
            picture: Image.Image = image
            return picture
    except UnidentifiedImageError:
        raise UnreadableImageError("no image format that Pillow knows") from None
    except Exception as error:  # a damaged file can raise anything
        # The system's errors contain the path, on which a list of skipped pictures must not depend.
        text = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
        raise UnreadableImageError(text[0] if text else type(error).__name__) from error


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Converts a picture to RGB: transparent parts show `background`, 12- and 16-bit grey is scaled to 8 bits.

    Raises UnreadableImageError if Pillow cannot convert the pixels, or if the value of white is unknown.
    """
    try:
        return _to_rgb(image, background)
    except UnreadableImageError:
        raise
    except Exception as error:  # of a mode that Pillow has no conversion of, or damaged transparency
        raise UnreadableImageError(f"pixels of mode {image.mode}: {error}") from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):
        grey, alpha = _deep_grey(image)
        image = Image.fromarray(grey)
        if alpha is not None:
            image.putalpha(Image.fromarray(alpha))
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels, whose range nothing tells")
    if image.mode == "La":  # its colours are multiplied by alpha, as those of RGBa, and Pillow converts it to LA alone
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Returns grey of more than 8 bits as uint8 [H, W], and its alpha if it has any.

    White follows from the format, never from the brightest pixel: a dark picture stays dark.
    """
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "I" and image.format != "PPM":  # Pillow has scaled a PGM to 16 bits
        raise UnreadableImageError("signed or 32-bit integer pixels, whose range nothing tells")
    grey = np.asarray(image).astype(np.int64)
    white = 2**12 - 1 if tags.get(_BITS) == (12,) else 2**16 - 1
    transparent = image.info.get("transparency")
    alpha = np.where(grey == transparent, 0, 255).astype(np.uint8) if isinstance(transparent, int) else None
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow applies up to 8 bits
        grey = white - grey
    return ((grey * 255 + white // 2) // white).astype(np.uint8), alpha
