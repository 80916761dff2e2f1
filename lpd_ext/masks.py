"""Pixel masks: which cells they touch, and how a painted picture meets the one that was there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cells(masks: Tensor, stride: int, dilate: int = 0) -> Tensor:
    """Cells bool [B, h, w] of masks bool [B, H, W]: those of which any pixel is masked, and `dilate` cells around."""
    cells = F.max_pool2d(masks[:, None].float(), stride)
    return grown(cells, dilate)[:, 0] > 0


def grown(masks: Tensor, by: int) -> Tensor:
    """Masks float [B, 1, H, W] grown by so many pixels, or cells, in each direction, corners included."""
    return F.max_pool2d(masks, 2 * by + 1, stride=1, padding=by) if by else masks


def filled(images: Tensor, known: Tensor) -> Tensor:
    """Images [B, C, H, W] whose pixels that are not known, bool [B, H, W], continue the known ones smoothly.

    From means over ever larger squares (push-pull); grey where an image has no known pixel.
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
    """How much of each pixel is the new picture's, float32 [B, 1, H, W], of masks bool [B, H, W].

    All of a masked pixel; over the `feather` pixels around the mask it falls to nothing, linearly.
    """
    share = masks[:, None].float()
    layers = [grown(share, by) for by in range(feather + 1)]
    return sum(layers[1:], layers[0]) / len(layers)
