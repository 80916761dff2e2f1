"""Attention of the teacher-forced pass, by the fastest way to compute it where the tensors are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops
from lpd_ext.visibility import Visibility


def attend(qkv: Tensor, visibility: Visibility) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what each row sees: qkv [B, rows, 3, H, D] -> [B, rows, H * D]."""
    if visibility.group_sizes is not None:
        return ops.training_attention(qkv, visibility.group_sizes, visibility.mutual_visibility)[0]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if visibility.block_mask is not None:
        from lpd_ext.block_attention import block_attention  # when it is needed: it loads torch.compile, 70 MB

        attended = block_attention(q, k, v, visibility.block_mask)
    else:
        mask, dropout = visibility.mask, visibility.dropout
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    rows: Tensor = attended.transpose(1, 2).flatten(2)
    return rows
