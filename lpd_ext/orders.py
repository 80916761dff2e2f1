"""Generation orders: int64 [B, N], the free cells of each image as they are drawn, then -1.

Cells are row-major indices into the h x w grid. Cells known beforehand (editing), bool [B, N], are not free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_ext import ops
from lpd_ext.schedule import as_int, check_group_sizes, sizes_per_image

Grid = tuple[int, int]
Cells = Tensor | NDArray[np.integer] | Sequence[int] | Sequence[Sequence[int]]

ORDER_POLICIES = ("locality", "random", "raster", "halton", "spiral")
_MAX_CELLS = 65536
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def make_orders(
    policy: str | Cells,
    group_sizes_per_image: Sequence[Sequence[int]],
    grid: Grid,
    seeds: Tensor,
    known: Tensor | None = None,
    *,
    proximity_threshold: float = 1.0,
    repulsion_threshold: int | None = None,
) -> Tensor:
    """Orders [B, N] of a batch by one of ORDER_POLICIES, or the cells given instead (see `user_order`).

    group_sizes_per_image: the sizes of each image, summing to its free cells; seeds int64 [B]; known bool
    [B, N]; thresholds as in `locality_order`. Raises ValueError or TypeError naming the wrong argument.
    """
    if isinstance(policy, str) and policy not in ORDER_POLICIES:
        allowed = ", ".join(ORDER_POLICIES)
        raise ValueError(f"order must be a permutation of the free cells or one of {allowed}, got {policy!r}")
    if isinstance(policy, str) and policy == "locality":
        return locality_order(group_sizes_per_image, grid, seeds, proximity_threshold, repulsion_threshold, known)
    _check_batch(group_sizes_per_image, grid, seeds, known)
    _check_thresholds(proximity_threshold, repulsion_threshold, grid)
    if not isinstance(policy, str):
        return user_order(policy, grid, len(seeds), known).to(seeds.device)
    if policy == "random":
        return random_order(grid, seeds, known)
    fixed = {"raster": raster_order, "halton": halton_order, "spiral": spiral_order}[policy]
    return restrict_to_free(fixed(grid).to(seeds.device).expand(len(seeds), -1), known)


def locality_order(
    group_sizes: Sequence[int] | Sequence[Sequence[int]],
    grid: Grid,
    seeds: Tensor,
    proximity_threshold: float = 1.0,
    repulsion_threshold: int | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Locality-aware orders [B, N] (paper, section 3.3): close to what is generated, apart within a group.

    group_sizes: one list, or one per image; seeds int64 [B]. A group first takes cells whose proximity (sum
    of 1 / distance over the generated ones among their 8 neighbours) is >= proximity_threshold and whose
    Chebyshev distance from each other is > repulsion_threshold (None: `default_repulsion_threshold`), then
    the cells farthest apart.
    """
    sizes = _check_batch(group_sizes, grid, seeds, known)
    proximity, repulsion = _check_thresholds(proximity_threshold, repulsion_threshold, grid)
    table = torch.zeros(len(seeds), max(map(len, sizes), default=0), dtype=torch.int32)
    for image, row in enumerate(sizes):
        table[image, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return ops.locality_order(table.to(seeds.device), *grid, proximity, repulsion, seeds, known)


def default_repulsion_threshold(grid: Grid) -> int:
    """Repulsion of the published settings: 2 for 256 px (16 x 16 cells), 4 for 512 px (32 x 32)."""
    return 4 if min(grid) >= 32 else 2


def random_order(grid: Grid, seeds: Tensor, known: Tensor | None = None) -> Tensor:
    """Uniformly random orders [B, N], each a function of its seed (int64 [B]) and the grid alone."""
    height, width = _check_grid(grid)
    _check_seeds(seeds)
    # A group of all cells with nothing generated is a random cell, then the others by their random numbers.
    one_group = torch.tensor([height * width], dtype=torch.int32, device=seeds.device)
    return restrict_to_free(ops.locality_order(one_group, height, width, 1.0, 0, seeds), known)


def raster_order(grid: Grid) -> Tensor:
    """Cells row by row, int64 [N]."""
    height, width = _check_grid(grid)
    return torch.arange(height * width)


def halton_order(grid: Grid) -> Tensor:
    """Cells as the Halton sequence (rows: base 2, columns: base 3) first meets them, int64 [N]."""
    height, width = _check_grid(grid)
    # Each row of the unit square holds an interval [k / 2^a, (k + 1) / 2^a) once 2^a >= 2h, each column one
    # of base 3 once 3^b >= 2w, and any 2^a * 3^b consecutive points meet every pair of such intervals.
    num_points = _power_from(2, 2 * height) * _power_from(3, 2 * width)
    index = np.arange(1, num_points + 1)
    cells = _radical_inverse(index, 2, height) * width + _radical_inverse(index, 3, width)
    first_met = np.unique(cells, return_index=True)[1]
    return torch.from_numpy(np.argsort(first_met))


def spiral_order(grid: Grid) -> Tensor:
    """Cells along a square spiral from the centre outwards, those outside the grid left out, int64 [N]."""
    height, width = _check_grid(grid)
    row, column = np.divmod(np.arange(height * width), width)
    y, x = row - (height - 1) // 2, column - (width - 1) // 2
    ring = np.maximum(np.abs(y), np.abs(x))
    # A ring starts below its upper right corner and goes down, left, up and right: 2 * ring cells a side.
    right, bottom, left = (x == ring) & (y > -ring), y == ring, x == -ring
    along_ring = np.select(
        [right, bottom, left],
        [y + ring - 1, 3 * ring - 1 - x, 5 * ring - 1 - y],
        x + 7 * ring - 1,
    )
    return torch.from_numpy(np.lexsort((along_ring, ring)))


def user_order(order: Cells, grid: Grid, batch: int, known: Tensor | None = None) -> Tensor:
    """The given cells as orders [B, N]: one list for all images, or one per image.

    Each must hold the free cells of its image once and may end in -1s. Raises ValueError naming the image and
    the cell that is wrong, TypeError for anything but integers.
    """
    height, width = _check_grid(grid)
    num_cells = height * width
    num_free = _count_free_cells(known, num_cells, batch)
    rows = _integer_rows(order, batch)
    orders = torch.full((batch, num_cells), -1)
    for image, row in enumerate(rows):
        cells = row[: int((row != -1).sum())]
        name = f"order[{image}]"
        outside = cells[(cells < 0) | (cells >= num_cells)]
        if len(outside):
            raise ValueError(f"{name} contains {int(outside[0])}, but cells are 0 to {num_cells - 1}, -1 at the end")
        times = torch.bincount(cells, minlength=num_cells)
        if (times > 1).any():
            raise ValueError(f"{name} contains cell {int(times.argmax())} more than once")
        if known is not None and (times.bool() & known[image].cpu()).any():
            wrong = times.bool() & known[image].cpu()
            raise ValueError(f"{name} contains cell {int(wrong.nonzero()[0])}, which is known already")
        if len(cells) != num_free[image]:
            raise ValueError(f"{name} must hold all {num_free[image]} free cells, got {len(cells)}")
        orders[image, : len(cells)] = cells
    return orders


def restrict_to_free(orders: Tensor, known: Tensor | None) -> Tensor:
    """Orders [B, N] of all cells without the known ones (bool [B, N]), filled up with -1."""
    if known is None:
        return orders.contiguous()
    _check_known(known, orders.shape)
    is_known = known.gather(1, orders)
    free_first = is_known.to(torch.uint8).argsort(dim=1, stable=True)
    return orders.masked_fill(is_known, -1).gather(1, free_first)


def _power_from(base: int, low: int) -> int:
    """Smallest power of base that is >= low."""
    power = 1
    while power < low:
        power *= base
    return power


def _radical_inverse(index: NDArray[np.int64], base: int, intervals: int) -> NDArray[np.int64]:
    """In which of the equal intervals of [0, 1) the radical inverse of each index lies; exact integers."""
    mirrored, denominator = np.zeros_like(index), 1
    while index.any():
        index, digit = np.divmod(index, base)
        mirrored, denominator = mirrored * base + digit, denominator * base
    return mirrored * intervals // denominator


def _integer_rows(order: Cells, batch: int) -> list[Tensor]:
    """One int64 row per image, on the CPU."""
    if isinstance(order, Tensor | np.ndarray):
        order = torch.as_tensor(order).cpu()
        one_for_all = order.dim() == 1
        rows = [order] if one_for_all else list(order)
    elif isinstance(order, Sequence):
        one_for_all = not any(isinstance(row, Sequence | Tensor | np.ndarray) for row in order)
        rows = [_as_tensor(row, f"order[{i}]") for i, row in enumerate([order] if one_for_all else order)]
    else:
        raise TypeError(f"order must be a policy name, or the cells as integers, got {order!r}")
    if one_for_all:
        rows = rows * batch
    if len(rows) != batch:
        raise ValueError(f"order must hold one permutation, or one for each of {batch} images, got {len(rows)}")
    for image, row in enumerate(rows):
        integers = row.dim() == 1 and row.dtype in _INTEGERS
        if not integers and row.shape != (0,):  # an empty list has no integers to tell its dtype by
            raise TypeError(f"order[{image}] must be a list of integers, got {row.dtype} {list(row.shape)}")
    return [row.to(torch.int64) for row in rows]


def _as_tensor(row: object, name: str) -> Tensor:
    try:
        return torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a list of integers, got {row!r}") from error


def _check_thresholds(proximity: object, repulsion: int | None, grid: Grid) -> tuple[float, int]:
    """Both thresholds checked, the repulsion filled in."""
    if isinstance(proximity, bool) or not isinstance(proximity, Real):
        raise TypeError(f"proximity_threshold must be a number, got {proximity!r}")
    if math.isnan(float(proximity)):
        raise ValueError("proximity_threshold must be a number, got nan")
    repulsion = default_repulsion_threshold(grid) if repulsion is None else as_int(repulsion, "repulsion_threshold")
    if repulsion < 0:
        raise ValueError(f"repulsion_threshold must be >= 0, got {repulsion}")
    return float(proximity), min(repulsion, max(grid))  # no two cells are farther apart


def _check_batch(
    group_sizes: Sequence[int] | Sequence[Sequence[int]], grid: Grid, seeds: Tensor, known: Tensor | None
) -> list[list[int]]:
    """The group sizes of each image, once all arguments fit together."""
    height, width = _check_grid(grid)
    _check_seeds(seeds)
    per_image = sizes_per_image(group_sizes, len(seeds))
    if len(per_image) != len(seeds):
        raise ValueError(f"seeds must hold one seed for each of {len(per_image)} images, got {len(seeds)}")
    num_free = _count_free_cells(known, height * width, len(seeds))
    return [check_group_sizes(sizes, num_free[image], f"group_sizes[{image}]") for image, sizes in enumerate(per_image)]


def _check_grid(grid: Grid) -> Grid:
    if not isinstance(grid, Iterable) or len(grid) != 2:
        raise TypeError(f"grid must be (height, width), got {grid!r}")
    height, width = (as_int(side, "grid") for side in grid)
    if height < 1 or width < 1 or height * width > _MAX_CELLS:
        raise ValueError(f"grid must have 1 to {_MAX_CELLS} cells, got {height} x {width}")
    return height, width


def _check_seeds(seeds: Tensor) -> None:
    if not isinstance(seeds, Tensor):
        raise TypeError(f"seeds must be an int64 tensor of shape [B], got {type(seeds).__name__}")
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds must be int64 of shape [B], got {seeds.dtype} {list(seeds.shape)}")


def _count_free_cells(known: Tensor | None, num_cells: int, batch: int) -> list[int]:
    if known is None:
        return [num_cells] * batch
    _check_known(known, (batch, num_cells))
    return [int(count) for count in (~known).sum(dim=1)]


def _check_known(known: Tensor, shape: Sequence[int]) -> None:
    if not isinstance(known, Tensor):
        raise TypeError(f"known must be a bool tensor of shape {list(shape)}, got {type(known).__name__}")
    if known.dtype != torch.bool or tuple(known.shape) != tuple(shape):
        raise ValueError(f"known must be bool of shape {list(shape)}, got {known.dtype} {list(known.shape)}")
