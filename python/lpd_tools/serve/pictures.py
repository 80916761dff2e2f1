"""Encodes picture files for the API."""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image

Format = Literal["png", "webp", "jpeg"]


def encode(picture: Image.Image, kind: Format, compression: int | None = None) -> bytes:
    """Returns the bytes of a file. compression: quality of webp and jpeg in [0, 100]; None: 100, or lossless webp."""
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG")
    elif kind == "webp":
        quality = 100 if compression is None else compression
        picture.save(file, "WEBP", quality=quality, lossless=quality == 100)
    else:
        picture.convert("RGB").save(file, "JPEG", quality=100 if compression is None else compression)
    return file.getvalue()
