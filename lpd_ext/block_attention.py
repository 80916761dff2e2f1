"""Attention of the teacher-forced pass on CUDA: FlexAttention with a block mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lpd_ext.visibility import visibility_of

_KEPT_BLOCK_MASKS = 32  # training draws one of at most 14 tables per step


def block_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v over the keys that each row sees; q, k, v are [B, H, rows, D]."""
    # Inside torch.compile it is compiled anyway.
    if torch.compiler.is_compiling():
        attended: Tensor = flex_attention(q, k, v, block_mask=block_mask)
    else:
        attended = _compiled_flex_attention()(q, k, v, block_mask=block_mask)
    return attended


def training_block_mask(group_sizes: Sequence[int], mutual_visibility: bool, device: torch.device) -> BlockMask:
    """Returns `training_mask` as FlexAttention's block mask for all images and heads; cached."""
    block_mask: BlockMask = _cached_block_mask(tuple(group_sizes), mutual_visibility, device)
    return block_mask


@lru_cache(_KEPT_BLOCK_MASKS)
def _block_mask(group_sizes: tuple[int, ...], mutual_visibility: bool, device: torch.device) -> BlockMask:
    rows = 1 + 2 * sum(group_sizes) - group_sizes[-1]
    return create_block_mask(visibility_of(group_sizes, device, mutual_visibility), None, None, rows, rows, str(device))


# torch.compile would trace through the cache.
_cached_block_mask: Callable[..., BlockMask] = torch.compiler.disable(_block_mask)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Without compilation FlexAttention computes the whole square.
    return torch.compile(flex_attention)
