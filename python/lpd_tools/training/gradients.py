"""Gradients of one optimisation step: the forward and backward passes over a process's share of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from lpd_tools.data.fashion_mnist import step_generator
from lpd_tools.training.parallel import whole, without_reduction
from lpd_tools.training.precision import autocast

Batch = TypeVar("Batch")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes dropout in a step a function of (seed, step, rank), so that resuming needs no random state."""
    torch.manual_seed(step_generator(seed, step, stream=2 + rank).initial_seed())


def micro_batches(share: slice, size: int) -> list[slice]:
    """Cuts a process's share of a batch into the rows of its forward passes, `size` each except perhaps the last."""
    size = size or share.stop - share.start
    return [slice(i, min(i + size, share.stop)) for i in range(share.start, share.stop, size)]


def add_gradients(
    model: nn.Module,
    parts: Sequence[slice],
    batch_of: Callable[[slice], Batch],
    losses_of: Callable[[nn.Module, Batch], dict[str, Tensor]],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, float]:
    """Adds gradients of the mean "loss" over the rows of all `parts`; returns the means of all losses.

    Only the last backward pass adds up gradients over the processes.
    """
    count = sum(rows.stop - rows.start for rows in parts)
    means: dict[str, float] = {}
    for i, rows in enumerate(parts):
        weight = (rows.stop - rows.start) / count
        batch = batch_of(rows)
        with without_reduction(model) if i < len(parts) - 1 else nullcontext():
            with autocast(dtype, device):
                losses = losses_of(model, batch)
            (losses["loss"] * weight).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + float(value.detach()) * weight
    return means


def clip_gradients(network: nn.Module, limit: float) -> float:
    """Scales the gradients so that their norm, over all parts of all parameters, is at most `limit` (0: none).

    Returns the norm before.
    """
    return float(whole(torch.nn.utils.clip_grad_norm_(network.parameters(), limit or math.inf)))
