"""Measures of orders: how far apart a group's cells lie, and how close to the cells drawn before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lpd_ext.checks import Grid
from lpd_tools.draw_orders import step_grid


def apart_and_near(orders: Tensor, group_sizes: Sequence[int], grid: Grid) -> tuple[float, float]:
    """Returns two means over the drawn cells of orders [B, N] (-1 after the last free cell).

    The first is the distance to the nearest other cell of the same group, if there is one; the second the share of a
    cell's neighbours (up to 8) that are known or drawn in earlier groups.
    """
    cells = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), 1)
    distance = np.sqrt(((cells[:, None] - cells) ** 2).sum(2))
    beside = (distance > 0) & (distance < 2)
    apart, near = [], []
    for order in orders:
        steps = step_grid(order, group_sizes, grid).flatten()
        drawn = np.flatnonzero(steps >= 0)
        others = (steps[:, None] == steps) & (distance > 0)
        of_group = np.where(others, distance, np.inf).min(1)[drawn]
        apart.append(of_group[np.isfinite(of_group)])
        earlier = beside & (steps[None] < steps[:, None])
        near.append((earlier.sum(1) / np.maximum(beside.sum(1), 1))[drawn])
    lone = all(len(distances) == 0 for distances in apart)
    return float("nan") if lone else float(np.concatenate(apart).mean()), float(np.concatenate(near).mean())
