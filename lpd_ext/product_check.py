"""A pair of our own products, from the residual stream to the layer after its LayerNorm, against the library's.

On a GPU that nobody has tried, nothing is believed of a kernel: pairs that fail here are not timed, nor used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops
from lpd_ext.products import ROW_CLASSES, Pair

_ROUNDING = 0.03  # of the largest result; of bfloat16 a hundredth
_EPS = 1e-6


def check_pair(pair: Pair, device: torch.device) -> None:
    """Raises RuntimeError if our own pair, or the rows that the first block's layer takes, are not the library's.

    Everything that passes between the products has its part: rows have means, and neither gamma nor beta is 1 or 0.
    """
    residual, normed = pair
    generator = torch.Generator(device).manual_seed(0)  # the caller's numbers stay as they are
    most, width, dtype = ROW_CLASSES[-1], residual.features, residual.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = normal(most, width) + 2 * normal(most, 1)
    inputs, bias = normal(most, residual.depth).to(dtype), normal(width).to(dtype)
    weight = (normal(width, residual.depth) / residual.depth**0.5).to(dtype)
    gamma, beta = (1 + 0.5 * normal(width)).to(dtype), normal(width).to(dtype)
    next_weight = ((normal(normed.features, width) + 0.5) / width**0.5).to(dtype)
    next_bias = normal(normed.features).to(dtype)
    content, positions = normal(most, width).to(dtype), normal(most, width).to(dtype)
    slope, shift = ops.fold_layer_norm(next_weight, gamma, beta, next_bias)
    gelu = normed.kind == "normed_gelu"

    def next_own(scaled: Tensor, statistics: Tensor) -> Tensor:
        return ops.normed_linear(scaled, statistics, next_weight, slope, shift, _EPS, gelu)

    def next_librarys(of_norm: Tensor) -> Tensor:
        y = F.linear(of_norm, next_weight, next_bias)
        return F.gelu(y) if gelu else y

    for rows in ROW_CLASSES:
        own, librarys = x[:rows].clone(), x[:rows].clone()
        result = next_own(*ops.residual_linear(own, inputs[:rows], weight, bias, gamma))
        added = F.linear(inputs[:rows], weight, bias)
        wanted = next_librarys(ops.residual_layer_norm(librarys, added, gamma, beta, _EPS))
        same = _is_near(own - x[:rows], librarys - x[:rows]) and _is_near(result, wanted)
        # The first block's rows come from the tables. Their LayerNorm has weights too: those of the other one will do.
        index = torch.arange(rows, device=device)
        tables = (index, index, content, positions, gamma, beta)
        own, scaled, statistics = ops.embed_scaled_rows(*tables, gamma, _EPS)
        librarys = ops.embed_rows(*tables, _EPS)
        result = next_own(scaled, statistics)
        wanted = next_librarys(ops.residual_layer_norm(librarys.clone(), None, gamma, beta, _EPS))
        if not (same and _is_near(own, librarys) and _is_near(result, wanted)):
            raise RuntimeError(f"{residual.name} and {normed.name} of {rows} rows are not what the library computes")


def _is_near(own: Tensor, library: Tensor) -> bool:
    difference, largest = (own - library).abs().max(), library.abs().max()
    return bool(difference <= _ROUNDING * largest)  # false for NaN
