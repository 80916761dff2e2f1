"""Attention of the teacher-forced pass, computed by the fastest kernel for the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops
from lpd_ext.visibility import training_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Visibility:
    """Who sees whom in one pass, in the form that the kernel used by `attend` needs."""

    group_sizes: Tensor | None = None  # int32 [T], for the operator of the CPU
    mutual_visibility: bool = True
    block_mask: BlockMask | None = None  # for FlexAttention, on CUDA
    mask: Tensor | None = None  # bool [rows, rows], True: may see
    dropout: float = 0.0  # share of the attention probabilities set to zero, the others scaled up; with a mask only

    @classmethod
    def of(cls, group_sizes: Sequence[int], mutual_visibility: bool, like: Tensor, dropout: float = 0.0) -> Visibility:
        """Chooses the form for groups of these sizes and activations like the given tensor.

        Dropout, float64 and devices other than the CPU and CUDA use the mask; so does CUDA without gradients, where
        compiling FlexAttention for each new table would cost more than a few passes gain.
        """
        if not dropout and like.is_cuda and torch.is_grad_enabled():
            from lpd_ext.block_attention import training_block_mask

            return cls(block_mask=training_block_mask(group_sizes, mutual_visibility, like.device))
        if not dropout and like.is_cpu and like.dtype != torch.float64:
            return cls(torch.tensor(list(group_sizes), dtype=torch.int32), mutual_visibility)
        return cls(mask=training_mask(group_sizes, like.device, mutual_visibility), dropout=dropout)


def attend(qkv: Tensor, visibility: Visibility) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v over the keys that each row sees: qkv [B, rows, 3, H, D] -> [B, rows, H*D]."""
    if visibility.group_sizes is not None:
        return ops.training_attention(qkv, visibility.group_sizes, visibility.mutual_visibility)[0]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if visibility.block_mask is not None:
        from lpd_ext.block_attention import block_attention  # imported late: it loads torch.compile, 70 MB

        attended = block_attention(q, k, v, visibility.block_mask)
    else:
        mask, dropout = visibility.mask, visibility.dropout
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    rows: Tensor = attended.transpose(1, 2).flatten(2)
    return rows
