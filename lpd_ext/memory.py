"""Memory of a decode: caches and results, taken once and written throughout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpd_ext import _C


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; large memory on a CPU is asked to lie on huge pages: a fault brings 2 MB then, instead of 4 KB."""
    memory = torch.empty(tuple(shape), dtype=dtype, device=device)
    if memory.device.type == "cpu":
        _C.prefer_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory
