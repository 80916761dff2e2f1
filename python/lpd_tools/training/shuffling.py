"""Chooses the images of each optimisation step: epochs, each a permutation, as a function of (seed, step)."""

from __future__ import annotations

import torch
from torch import Tensor

from lpd_tools.data.fashion_mnist import step_generator


class EpochShuffle:
    """Batches of `batch_size` of `count` images; epoch e is a permutation from (seed, e), without the incomplete batch.

    Raises ValueError unless batch_size is in [1, count].
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if not 0 < batch_size <= count:
            raise ValueError(f"batch_size must be in 1..{count}, got {batch_size}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.per_epoch = count // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """Indices int64 [batch_size] of the images of optimisation step `step` (from 0)."""
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = step_generator(self.seed, epoch, stream=1)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self._order[i * self.batch_size : (i + 1) * self.batch_size]
