"""Reconstructs images by the tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.pixels import to_input

_BATCH = 50  # images in memory as activations at a time


@torch.no_grad()
def reconstruct(tokenizer: VQTokenizer, pixels: Tensor, device: torch.device) -> Tensor:
    """Encodes and decodes images uint8 [B, 3, S, S] on `device`; returns pixels uint8 [B, S, S, 3] on the CPU."""
    parts = [tokenizer.decode(tokenizer.encode(to_input(part.to(device)))) for part in pixels.split(_BATCH)]
    return VQTokenizer.to_pixels(torch.cat(parts)).cpu()
