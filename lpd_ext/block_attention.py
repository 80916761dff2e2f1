"""Attention of the teacher-forced pass on CUDA: FlexAttention, with a mask of the blocks that hold anything to see."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def block_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what each row sees, of [B, H, rows, D]."""
    # Inside torch.compile it is compiled anyway.
    if torch.compiler.is_compiling():
        attended: Tensor = flex_attention(q, k, v, block_mask=block_mask)
    else:
        attended = _compiled_flex_attention()(q, k, v, block_mask=block_mask)
    return attended


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Without compilation FlexAttention computes the whole square.
    return torch.compile(flex_attention)
