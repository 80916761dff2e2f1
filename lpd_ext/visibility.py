"""Who sees whom in the teacher-forced pass, in each form that an attention takes it.

Rows are 1 + N - m_last context rows (condition, then every group but the last), then N query rows, both in decoding
order. Context block i (the condition is block 0, group t is block t + 1) sees context blocks <= i; query group t sees
context blocks <= t and its own group (paper, section 3.2), or with `mutual_visibility` off itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_KEPT_BLOCK_MASKS = 32  # training draws one of at most 14 tables per step

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Visibility:
    """Who sees whom in one pass, in the form that `attend` takes it; which one depends on where and how it computes."""

    group_sizes: Tensor | None = None  # int32 [T], for the operator of the CPU
    mutual_visibility: bool = True
    block_mask: BlockMask | None = None  # for FlexAttention, on CUDA
    mask: Tensor | None = None  # bool [rows, rows], True: may see
    dropout: float = 0.0  # share of the attention probabilities set to zero, the others scaled up; with a mask only

    @classmethod
    def of(cls, group_sizes: Sequence[int], mutual_visibility: bool, like: Tensor, dropout: float = 0.0) -> Visibility:
        """For groups of these sizes and activations like the tensor given.

        Dropout, float64 and devices other than the CPU and CUDA take the mask; so does CUDA without gradients, where
        FlexAttention would be compiled for a few passes over each new table.
        """
        if not dropout and like.is_cuda and torch.is_grad_enabled():
            return cls(block_mask=training_block_mask(group_sizes, mutual_visibility, like.device))
        if not dropout and like.is_cpu and like.dtype != torch.float64:
            return cls(torch.tensor(list(group_sizes), dtype=torch.int32), mutual_visibility)
        return cls(mask=training_mask(group_sizes, like.device, mutual_visibility), dropout=dropout)


def training_mask(
    group_sizes: Sequence[int], device: torch.device | None = None, mutual_visibility: bool = True
) -> Tensor:
    """Who sees whom in the teacher-forced pass, bool [rows, rows] (True: may see)."""
    sees = visibility_of(group_sizes, device, mutual_visibility)
    unused = torch.zeros((), dtype=torch.int64, device=device)
    rows = torch.arange(1 + 2 * sum(group_sizes) - group_sizes[-1], device=device)
    return sees(unused, unused, rows[:, None], rows[None, :])


def training_block_mask(group_sizes: Sequence[int], mutual_visibility: bool, device: torch.device) -> BlockMask:
    """`training_mask` as FlexAttention takes it, for every image and head; kept from call to call."""
    block_mask: BlockMask = _cached_block_mask(tuple(group_sizes), mutual_visibility, device)
    return block_mask


@lru_cache(_KEPT_BLOCK_MASKS)
def _block_mask(group_sizes: tuple[int, ...], mutual_visibility: bool, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask  # when it is needed: it loads torch.compile, 70 MB

    rows = 1 + 2 * sum(group_sizes) - group_sizes[-1]
    return create_block_mask(visibility_of(group_sizes, device, mutual_visibility), None, None, rows, rows, str(device))


# torch.compile would trace through the cache.
_cached_block_mask: Callable[..., BlockMask] = torch.compiler.disable(_block_mask)


def visibility_of(group_sizes: Sequence[int], device: torch.device | None, mutual_visibility: bool) -> Sees:
    """Whether a row sees a key, by (image, head, row, key) as FlexAttention's mask_mod, for indices that broadcast."""
    sizes = torch.tensor(list(group_sizes), device=device)
    steps = torch.arange(len(sizes), device=device)
    context = torch.cat([steps.new_zeros(1), (steps[:-1] + 1).repeat_interleave(sizes[:-1])])
    block = torch.cat([context, steps.repeat_interleave(sizes)])
    # Tensors alone: a number would be compiled into FlexAttention's kernel, a table at a time.
    is_context = torch.arange(len(block), device=device) < len(context)

    def sees(image: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = ~is_context[row] & (block[row] == block[key]) if mutual_visibility else row == key
        return torch.where(is_context[key], block[row] >= block[key], own)

    return sees
