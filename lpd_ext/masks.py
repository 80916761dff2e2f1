"""Pixel masks: the cells they touch, and blending of the new picture with the old one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cells(masks: Tensor, stride: int, dilate: int = 0) -> Tensor:
    """Returns the cells bool [B, h, w] with any pixel in masks bool [B, H, W], and those within `dilate` cells."""
    cells = F.max_pool2d(masks[:, None].float(), stride)
    return grown(cells, dilate)[:, 0] > 0


def grown(masks: Tensor, by: int) -> Tensor:
    """Grows masks float [B, 1, H, W] by so many pixels or cells in each direction, corners included."""
    return F.max_pool2d(masks, 2 * by + 1, stride=1, padding=by) if by else masks


def filled(images: Tensor, known: Tensor) -> Tensor:
    """Fills the unknown pixels of images [B, C, H, W] smoothly from the known ones, bool [B, H, W].

    Uses means over ever larger squares (push-pull); an image without a known pixel becomes grey.
    """
    return _filled(images, known[:, None])


def _filled(images: Tensor, known: Tensor) -> Tensor:
    if bool(known.all()) or max(images.shape[2:]) == 1:
        return images.where(known, 0.0)
    share = F.avg_pool2d(known.float(), 2, ceil_mode=True)
    means = F.avg_pool2d(images.where(known, 0.0), 2, ceil_mode=True) / share.clamp(min=torch.finfo(share.dtype).tiny)
    smooth = F.interpolate(_filled(means, share > 0), images.shape[2:], mode="bilinear", align_corners=False)
    return images.where(known, smooth)


def painted_share(masks: Tensor, feather: int = 0) -> Tensor:
    """Returns the share of the new picture in each pixel, float32 [B, 1, H, W], of masks bool [B, H, W].

    It is 1 in the mask and falls to 0, linearly, over the `feather` pixels around it.
    """
    share = masks[:, None].float()
    layers = [grown(share, by) for by in range(feather + 1)]
    return sum(layers[1:], layers[0]) / len(layers)
