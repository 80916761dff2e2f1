"""Priority maps: numbers over the cells, highest first, and orders sorted by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lpd_ext.checks import Grid
from lpd_ext.image_input import Picture, fit_mask, read_masks, read_pictures

# An image, bright first, or a file of one; or floats [h, w], one for each cell. Integers are cells instead.
PriorityMap = Image.Image | Path | Tensor | NDArray[np.floating]


def is_priority_map(value: object) -> bool:
    """Whether the value is a priority map or an array of several [B, h, w], rather than cells in order."""
    if isinstance(value, Tensor | np.ndarray):
        floating = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
        return floating and value.ndim >= 2
    return isinstance(value, Image.Image | Path)


def priority_of(value: PriorityMap, grid: Grid, name: str) -> Tensor:
    """Returns the priority float64 [N] of each cell; of an image, the mean over the cell.

    Raises ValueError for an array of another shape than the grid, and for numbers that are not finite.
    """
    if isinstance(value, Image.Image | Path):
        ((picture,), _, _) = read_pictures(value, name)
        return F.interpolate(picture.mean(0).double()[None, None], grid, mode="area").flatten()
    priority = torch.as_tensor(value).detach().cpu().double()
    if tuple(priority.shape) != tuple(grid):
        raise ValueError(f"{name} must have the {list(grid)} cells of the grid, got {list(priority.shape)}")
    if not bool(priority.isfinite().all()):
        raise ValueError(f"{name} must be finite numbers")
    return priority.flatten()


def outward_map(mask: Picture, grid: Grid) -> Tensor:
    """Returns a priority map float64 [h, w]: first the cells in the mask, then the others by distance to the nearest.

    mask: as in image_input.py, of any size; ValueError for an empty one.
    """
    (pixels,), _ = read_masks(mask, "mask")
    start = fit_mask(pixels, grid, "stretch", "mask")
    if not bool(start.any()):
        raise ValueError("mask is empty: nothing in it is white")
    return outward(start.view(1, -1), grid).view(grid)


def outward(start: Tensor, grid: Grid) -> Tensor:
    """Returns priorities float64 [B, N], higher nearer to the cells of start, bool [B, N], or to the centre."""
    height, width = grid
    y, x = (torch.arange(side, device=start.device) for side in grid)
    from_centre = (2 * y - (height - 1)).square()[:, None] + (2 * x - (width - 1)).square()
    centre = (from_centre == from_centre.min()).flatten()
    cells = torch.where(start.any(1, keepdim=True), start, centre).view(-1, height, width)
    # Squared distances, exact: first along rows, then the nearest over all rows.
    beyond = height * height + width * width
    in_row = torch.where(cells[:, :, None], (x[:, None] - x).square(), beyond).amin(3)
    squared = ((y[:, None] - y).square()[None, :, :, None] + in_row[:, None]).amin(2)
    return -squared.flatten(1).double().sqrt()


def by_priority(orders: Tensor, priority: Tensor) -> Tensor:
    """Sorts orders [B, N] (-1 after the last free cell) by priority [B, N], highest first; ties keep their order."""
    of_cells = priority.to(orders.device).gather(1, orders.clamp(min=0)).masked_fill(orders < 0, -torch.inf)
    return orders.gather(1, of_cells.argsort(dim=1, descending=True, stable=True))


def maps_of(order: Any, batch: int) -> list[Any]:
    """Returns one map per image, from one for all or an array [B, h, w]; ValueError for another number of maps."""
    if isinstance(order, Tensor | np.ndarray) and order.ndim == 3:
        if len(order) != batch:
            raise ValueError(f"order must hold one map, or one for each of {batch} images, got {len(order)}")
        return list(order)
    return [order] * batch
