"""Who sees whom in the teacher-forced pass.

Rows are 1 + N - m_last context rows (condition, then every group but the last), then N query rows, both in decoding
order. Context block i (the condition is block 0, group t is block t + 1) sees context blocks <= i; query group t sees
context blocks <= t and its own group (paper, section 3.2), or with `mutual_visibility` off itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def training_mask(
    group_sizes: Sequence[int], device: torch.device | None = None, mutual_visibility: bool = True
) -> Tensor:
    """Returns the mask of the teacher-forced pass, bool [rows, rows]: True where a row may see a key."""
    sees = visibility_of(group_sizes, device, mutual_visibility)
    unused = torch.zeros((), dtype=torch.int64, device=device)
    rows = torch.arange(1 + 2 * sum(group_sizes) - group_sizes[-1], device=device)
    return sees(unused, unused, rows[:, None], rows[None, :])


def visibility_of(group_sizes: Sequence[int], device: torch.device | None, mutual_visibility: bool) -> Sees:
    """Returns FlexAttention's mask_mod, of (image, head, row, key): whether a row sees a key; indices broadcast."""
    sizes = torch.tensor(list(group_sizes), device=device)
    steps = torch.arange(len(sizes), device=device)
    context = torch.cat([steps.new_zeros(1), (steps[:-1] + 1).repeat_interleave(sizes[:-1])])
    block = torch.cat([context, steps.repeat_interleave(sizes)])
    # Tensors only: a number would be compiled into FlexAttention's kernel, once per table.
    is_context = torch.arange(len(block), device=device) < len(context)

    def sees(image: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = ~is_context[row] & (block[row] == block[key]) if mutual_visibility else row == key
        return torch.where(is_context[key], block[row] >= block[key], own)

    return sees
