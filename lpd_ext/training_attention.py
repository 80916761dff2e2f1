"""Attention of the teacher-forced pass: who sees whom, and the fastest way to compute it where the tensors are.

Rows are 1 + N - m_last context rows (condition, then every group but the last), then N query rows, both in decoding
order. Context block i (the condition is block 0, group t is block t + 1) sees context blocks <= i; query group t sees
context blocks <= t and its own group (paper, section 3.2), or with `mutual_visibility` off itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_KEPT_BLOCK_MASKS = 32  # training draws one of at most 14 tables per step
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Visibility:
    """Who sees whom in one pass, in the form that `attend` takes it: a mask, or blocks of a mask on CUDA."""

    mask: Tensor | None  # bool [rows, rows], True: may see
    block_mask: BlockMask | None
    dropout: float  # share of the attention probabilities set to zero, the others scaled up; with a mask only

    @classmethod
    def of(
        cls,
        group_sizes: Sequence[int],
        mutual_visibility: bool = True,
        device: torch.device | None = None,
        dropout: float = 0.0,
    ) -> Visibility:
        """For groups of these sizes."""
        if device is not None and device.type == "cuda" and not dropout:
            return cls(None, training_block_mask(tuple(group_sizes), mutual_visibility, device), 0.0)
        return cls(training_mask(group_sizes, device, mutual_visibility), None, dropout)


def attend(qkv: Tensor, visibility: Visibility) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what each row sees: qkv [B, rows, 3, H, D] -> [B, rows, H * D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if visibility.block_mask is not None:
        attended = _compiled_flex_attention()(q, k, v, block_mask=visibility.block_mask)
    else:
        mask, dropout = visibility.mask, visibility.dropout
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    rows: Tensor = attended.transpose(1, 2).flatten(2)
    return rows


def training_mask(
    group_sizes: Sequence[int], device: torch.device | None = None, mutual_visibility: bool = True
) -> Tensor:
    """Who sees whom in the teacher-forced pass, bool [rows, rows] (True: may see)."""
    sees = _sees(group_sizes, device, mutual_visibility)
    unused = torch.zeros((), dtype=torch.int64, device=device)
    rows = torch.arange(1 + 2 * sum(group_sizes) - group_sizes[-1], device=device)
    return sees(unused, unused, rows[:, None], rows[None, :])


@lru_cache(_KEPT_BLOCK_MASKS)
def training_block_mask(group_sizes: tuple[int, ...], mutual_visibility: bool, device: torch.device) -> BlockMask:
    """`training_mask` as FlexAttention takes it, for every image and head; kept from call to call."""
    rows = 1 + 2 * sum(group_sizes) - group_sizes[-1]
    return create_block_mask(_sees(group_sizes, device, mutual_visibility), None, None, rows, rows, str(device))


def _sees(group_sizes: Sequence[int], device: torch.device | None, mutual_visibility: bool) -> Sees:
    """FlexAttention's mask_mod (image, head, row, key): whether a row sees a key, for indices that broadcast."""
    sizes = torch.tensor(list(group_sizes), device=device)
    steps = torch.arange(len(sizes), device=device)
    context = torch.cat([steps.new_zeros(1), (steps[:-1] + 1).repeat_interleave(sizes[:-1])])
    block = torch.cat([context, steps.repeat_interleave(sizes)])
    num_context = len(context)

    def sees(image: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (row >= num_context) & (block[row] == block[key]) if mutual_visibility else row == key
        return torch.where(key < num_context, block[row] >= block[key], own)

    return sees


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Without compilation FlexAttention computes the whole square.
    return torch.compile(flex_attention)
