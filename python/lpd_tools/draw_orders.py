"""Draws generation orders: grids whose cells are coloured and numbered by the step that draws them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

_CELL_INCHES = 0.2
_MAX_NUMBERED_CELLS = 48 * 48  # step numbers would be too small to read beyond
_KNOWN_COLOUR = "#d9d9d9"


def draw_orders(
    orders: Tensor,
    group_sizes: Sequence[Sequence[int]],
    grid: tuple[int, int],
    titles: Sequence[str],
    columns: int,
) -> Figure:
    """Returns a figure of the orders [B, N] (-1 after the last free cell), `columns` per row; known cells are grey.

    group_sizes: one list per order; titles: one per order.
    """
    height, width = grid
    rows = -(-len(orders) // columns)
    figure = Figure(
        figsize=(columns * (width * _CELL_INCHES + 0.3) + 1, rows * (height * _CELL_INCHES + 0.5)),
        layout="constrained",
    )
    norm = Normalize(0, max(1, max(map(len, group_sizes)) - 1))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, order, sizes, title in zip(axes.flat, orders, group_sizes, titles, strict=False):
        _draw_steps(axis, step_grid(order, sizes, grid), norm)
        axis.set_title(title)
    scale = ScalarMappable(norm, "viridis")
    figure.colorbar(scale, ax=axes, label="step", fraction=0.03, pad=0.01, ticks=MaxNLocator(integer=True))
    return figure


def step_grid(order: Tensor, group_sizes: Sequence[int], grid: tuple[int, int]) -> NDArray[np.int64]:
    """Returns the step that draws each cell, int64 [h, w]; -1 where a cell is known."""
    steps = np.full(grid[0] * grid[1], -1)
    steps[order.numpy()[: sum(group_sizes)]] = np.repeat(np.arange(len(group_sizes)), group_sizes)
    return steps.reshape(grid)


def _draw_steps(axis: Axes, steps: NDArray[np.int64], norm: Normalize) -> None:
    height, width = steps.shape
    colours = colormaps["viridis"].with_extremes(bad=_KNOWN_COLOUR)
    axis.imshow(np.ma.masked_less(steps, 0), cmap=colours, norm=norm)
    if steps.size > _MAX_NUMBERED_CELLS:
        return
    for y in range(height):
        for x in range(width):
            if steps[y, x] >= 0:
                ink = "white" if norm(steps[y, x]) < 0.55 else "black"
                axis.text(x, y, str(steps[y, x]), ha="center", va="center", color=ink, fontsize=6)
