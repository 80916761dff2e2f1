"""Layout of packed weights, and the rotation of rows, for packed linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_PANEL = 32  # channels that lie side by side
ROTATION = 64  # slices of a row that the Hadamard transform mixes


def pack_weight(weight: Tensor) -> Tensor:
    """Packs weights [N, K] for packed_linear: [ceil(N / 32), ceil(K / e), 32, e], padded with zeros.

    e elements of a channel fill four bytes: 1 float32, 2 bfloat16, 4 int8.
    """
    elements = 4 // weight.element_size()
    channels, inputs = weight.shape
    padding = (0, -inputs % elements, 0, -channels % LINEAR_PANEL)
    padded = F.pad(weight, padding) if any(padding) else weight  # F.pad copies
    panels: Tensor = padded.unflatten(1, (-1, elements)).unflatten(0, (-1, LINEAR_PANEL))
    # A copy even where the order is that of the weights.
    return panels.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Returns the weights [N, K] that pack_weight packed, as a copy."""
    plain: Tensor = packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, :in_features]
    return plain.clone(memory_format=torch.contiguous_format)


def rotate_rows(x: Tensor) -> Tensor:
    """Applies a Hadamard transform (Sylvester's order, unscaled) over the 64 equal slices of each row of x [R, K].

    Applied twice it gives 64 x. It spreads an outlier over 64 places, so the row's range shrinks.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    slices = x.unflatten(1, (ROTATION, x.shape[1] // ROTATION))
    half = 1
    while half < ROTATION:
        a, b = slices.unflatten(1, (ROTATION // 2 // half, 2, half)).unbind(2)
        slices = torch.stack([a + b, a - b], dim=2).flatten(1, 3)
        half *= 2
    rotated: Tensor = slices.flatten(1)
    return rotated
