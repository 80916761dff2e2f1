"""Converts between the model's pictures and those of the page's editor, which are enlarged and painted over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpd_ext.image_input import fit_mask, fit_picture, read_masks, read_pictures

_SIDE = 256  # least side in pixels of a picture in the editor: smaller ones are hard to paint on


def enlarged(picture: Image.Image) -> Image.Image:
    """Enlarges a picture to paint on it: each pixel becomes a square, so that `fitted` restores the original."""
    factor = max(1, math.ceil(_SIDE / max(picture.size)))
    return picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def fitted(painting: Mapping[str, Any] | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the picture float32 [3, H, W] and the painted pixels bool [H, W] of gr.ImageEditor's value.

    size: height and width of the model's pictures; pictures of other proportions are cropped to the middle. Raises
    ValueError without a picture or without paint.
    """
    if painting is None or painting["background"] is None:
        raise ValueError("there is no picture to paint on: upload one, or take one that was drawn here")
    picture = painting["background"].convert("RGB")
    mask = torch.zeros(picture.height, picture.width, dtype=torch.bool)
    for layer in painting["layers"]:
        alpha = layer.convert("RGBA").getchannel("A").resize(picture.size, Image.Resampling.NEAREST)
        mask |= torch.from_numpy(np.array(alpha) >= 128)
    if not mask.any():
        raise ValueError("nothing is painted: paint over what is to be drawn anew")
    factor, rest = divmod(picture.width, size[1])
    if not rest and picture.size == (size[1] * factor, size[0] * factor):
        picture = picture.reduce(factor)
        mask = mask.view(size[0], factor, size[1], factor).any(3).any(1)
    ((pixels,), _, _), ((holes,), _) = read_pictures(picture, "picture"), read_masks(mask, "mask")
    return fit_picture(pixels, size, "crop", "picture"), fit_mask(holes, size, "crop", "mask")
