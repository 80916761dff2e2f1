"""Generation orders: int64 [B, N], the free cells of each image in the order they are drawn, then -1.

Cells are row-major indices into the h x w grid. Cells known beforehand (editing), bool [B, N], are not free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_ext import ops
from lpd_ext.checks import Grid, as_grid, as_int, as_real, check_tensor, per_image
from lpd_ext.priority import PriorityMap, by_priority, is_priority_map, maps_of, outward, priority_of
from lpd_ext.schedule import check_group_sizes, sizes_per_image

Cells = Tensor | NDArray[np.integer] | Sequence[int] | Sequence[Sequence[int]]
Order = str | Cells | PriorityMap | Sequence[str | Cells | PriorityMap]

ORDER_POLICIES = ("locality", "random", "raster", "halton", "spiral", "outward")
_BY_MAP = "a priority map"  # no policy by name
_MAX_CELLS = 65536
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def make_orders(
    order: Order,
    group_sizes: Sequence[int] | Sequence[Sequence[int]],
    grid: Grid,
    seeds: Tensor,
    known: Tensor | None = None,
    *,
    proximity_threshold: float | Sequence[float] = 1.0,
    repulsion_threshold: int | Sequence[int | None] | None = None,
) -> Tensor:
    """Makes orders [B, N] by one of ORDER_POLICIES, by a priority map, or from given cells (see `user_order`).

    A priority map (an image or floats [h, w], see priority.py) says where to begin; cells of equal priority come in the
    locality order. "outward" is the map of distances to the known cells, or to the centre if there are none. order and
    the thresholds (as in `locality_order`) are one for all images or a list with one entry per image.
    group_sizes: one list, or one per image, summing to its free cells; seeds int64 [B]; known bool [B, N]. Raises
    ValueError or TypeError with the name of the wrong argument.
    """
    grid = _check_grid(grid)
    sizes = check_batch(group_sizes, grid, seeds, known)
    return make_checked_orders(order, sizes, grid, seeds, known, proximity_threshold, repulsion_threshold)


def make_checked_orders(
    order: Order,
    group_sizes: Sequence[Sequence[int]],
    grid: Grid,
    seeds: Tensor,
    known: Tensor | None,
    proximity_threshold: float | Sequence[float],
    repulsion_threshold: int | Sequence[int | None] | None,
) -> Tensor:
    """`make_orders` with group sizes, grid, seeds and known cells already checked."""
    batch, num_cells = len(seeds), grid[0] * grid[1]
    if isinstance(order, str) and order in ORDER_POLICIES and _is_one(proximity_threshold, repulsion_threshold):
        thresholds = _check_proximity(proximity_threshold), _check_repulsion(repulsion_threshold, grid)
        return _orders_by_policy(order, *thresholds, group_sizes, grid, seeds, known)
    proximity = [_check_proximity(value) for value in per_image(proximity_threshold, "proximity_threshold", batch)]
    repulsion = [_check_repulsion(v, grid) for v in per_image(repulsion_threshold, "repulsion_threshold", batch)]
    parts = order if isinstance(order, Sequence) and not isinstance(order, str) else [order]
    if not any(map(_is_policy, parts)):
        return _user_orders(order, num_cells, batch, known).to(seeds.device)
    alike: dict[tuple[str, float, int], list[int]] = {}  # images whose orders one call makes
    orders = torch.full((batch, num_cells), -1, device=seeds.device)
    priority = torch.zeros(batch, num_cells, dtype=torch.float64)
    entries = maps_of(order, batch) if is_priority_map(order) else per_image(order, "order", batch)
    for image, policy in enumerate(entries):
        if is_priority_map(policy):
            priority[image] = priority_of(policy, grid, f"order[{image}]")
            alike.setdefault((_BY_MAP, proximity[image], repulsion[image]), []).append(image)
        elif not isinstance(policy, str):
            known_row = None if known is None else known[image].cpu()
            cells = _check_cells(_integer_row(policy, f"order[{image}]"), f"order[{image}]", num_cells, known_row)
            orders[image, : len(cells)] = cells.to(seeds.device)
        elif policy in ORDER_POLICIES:
            alike.setdefault((policy, proximity[image], repulsion[image]), []).append(image)
        else:
            allowed = ", ".join(ORDER_POLICIES)
            raise ValueError(f"order must be a permutation of the free cells or one of {allowed}, got {policy!r}")
    for kind, images in alike.items():
        if len(images) == batch:
            return _orders_by_policy(*kind, group_sizes, grid, seeds, known, priority)
        rows = torch.tensor(images, device=seeds.device)
        sizes, known_rows = [group_sizes[image] for image in images], None if known is None else known[rows]
        orders[rows] = _orders_by_policy(*kind, sizes, grid, seeds[rows], known_rows, priority[images])
    return orders


def _is_one(*thresholds: object) -> bool:
    """Whether all are plain numbers for all images, so that one check is enough: the host's time counts here."""
    return all(threshold is None or type(threshold) in (int, float) for threshold in thresholds)


def _is_policy(order: object) -> bool:
    return isinstance(order, str) or is_priority_map(order)


def _orders_by_policy(
    policy: str,
    proximity: float,
    repulsion: int,
    group_sizes: Sequence[Sequence[int]],
    grid: Grid,
    seeds: Tensor,
    known: Tensor | None,
    priority: Tensor | None = None,
) -> Tensor:
    if policy in ("outward", _BY_MAP):
        near = _orders_by_policy("locality", proximity, repulsion, group_sizes, grid, seeds, known)
        start = torch.zeros_like(near, dtype=torch.bool) if known is None else known
        return by_priority(near, outward(start, grid) if priority is None or policy == "outward" else priority)
    if policy == "locality":
        if len(set(map(tuple, group_sizes))) == 1:
            table = torch.from_numpy(np.array(group_sizes[0], np.int32))
        else:
            longest = max(map(len, group_sizes), default=0)
            padded = [[*sizes, *[0] * (longest - len(sizes))] for sizes in group_sizes]
            table = torch.tensor(padded, dtype=torch.int32).reshape(len(padded), longest)
        known = None if known is None else known.contiguous()
        return ops.locality_order(table.to(seeds.device), *grid, proximity, repulsion, seeds.contiguous(), known)
    if policy == "random":
        return _random_order(grid, seeds, known)
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
    """Makes locality-aware orders [B, N] (paper, section 3.3): close to what is drawn, apart within a group.

    group_sizes: one list, or one per image; seeds int64 [B]. A group first takes cells whose proximity (the sum of
    1 / distance over the drawn cells among their 8 neighbours) is >= proximity_threshold and whose Chebyshev distance
    from each other is > repulsion_threshold (None: `default_repulsion_threshold`), then the cells farthest apart.
    """
    grid = _check_grid(grid)
    sizes = check_batch(group_sizes, grid, seeds, known)
    thresholds = _check_proximity(proximity_threshold), _check_repulsion(repulsion_threshold, grid)
    return _orders_by_policy("locality", *thresholds, sizes, grid, seeds, known)


def default_repulsion_threshold(grid: Grid) -> int:
    """Returns the published repulsion threshold: 2 for 256 px (16 x 16 cells), 4 for 512 px (32 x 32)."""
    return 4 if min(grid) >= 32 else 2


def random_order(grid: Grid, seeds: Tensor, known: Tensor | None = None) -> Tensor:
    """Makes uniformly random orders [B, N], each a function of its seed (int64 [B]) and the grid alone."""
    _check_seeds(seeds)
    return _random_order(_check_grid(grid), seeds, known)


def _random_order(grid: Grid, seeds: Tensor, known: Tensor | None) -> Tensor:
    height, width = grid
    # One group of all cells with nothing drawn: a random cell, then the others by their random numbers.
    one_group = torch.tensor([height * width], dtype=torch.int32, device=seeds.device)
    return restrict_to_free(ops.locality_order(one_group, height, width, 1.0, 0, seeds.contiguous()), known)


def raster_order(grid: Grid) -> Tensor:
    """Returns the cells row by row, int64 [N]."""
    height, width = _check_grid(grid)
    return torch.arange(height * width)


def halton_order(grid: Grid) -> Tensor:
    """Returns the cells as the Halton sequence (rows: base 2, columns: base 3) first meets them, int64 [N]."""
    height, width = _check_grid(grid)
    # Each row of the unit square holds an interval [k / 2^a, (k + 1) / 2^a) once 2^a >= 2h, each column one
    # of base 3 once 3^b >= 2w, and any 2^a * 3^b consecutive points meet every pair of such intervals.
    num_points = _power_from(2, 2 * height) * _power_from(3, 2 * width)
    index = np.arange(1, num_points + 1)
    cells = _radical_inverse(index, 2, height) * width + _radical_inverse(index, 3, width)
    first_met = np.unique(cells, return_index=True)[1]
    return torch.from_numpy(np.argsort(first_met))


def spiral_order(grid: Grid) -> Tensor:
    """Returns the cells along a square spiral from the centre outwards, int64 [N]."""
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
    """Returns the given cells as orders [B, N]: one list for all images, or one per image.

    Each must hold the free cells of its image once and may end in -1s. Raises ValueError with the image and the cell
    that is wrong, TypeError for anything but integers.
    """
    height, width = _check_grid(grid)
    known = None if known is None else _check_known(known, (batch, height * width))
    return _user_orders(order, height * width, batch, known)


def _user_orders(order: Any, num_cells: int, batch: int, known: Tensor | None) -> Tensor:
    orders, known = torch.full((batch, num_cells), -1), None if known is None else known.cpu()
    for image, row in enumerate(_integer_rows(order, batch)):
        cells = _check_cells(row, f"order[{image}]", num_cells, None if known is None else known[image])
        orders[image, : len(cells)] = cells
    return orders


def _check_cells(row: Tensor, name: str, num_cells: int, known: Tensor | None) -> Tensor:
    """Returns the cells of one image's order without the -1s at its end, checked; known bool [N]."""
    cells = row[: int((row != -1).sum())]
    outside = cells[(cells < 0) | (cells >= num_cells)]
    if len(outside):
        raise ValueError(f"{name} contains {int(outside[0])}, but cells are 0 to {num_cells - 1}, -1 at the end")
    times = torch.bincount(cells, minlength=num_cells)
    if (times > 1).any():
        raise ValueError(f"{name} contains cell {int(times.argmax())} more than once")
    num_free = num_cells
    if known is not None:
        num_free -= int(known.sum())
        if (wrong := times.bool() & known).any():
            raise ValueError(f"{name} contains cell {int(wrong.nonzero()[0])}, which is known already")
    if len(cells) != num_free:
        raise ValueError(f"{name} must hold all {num_free} free cells, got {len(cells)}")
    return cells


def restrict_to_free(orders: Tensor, known: Tensor | None) -> Tensor:
    """Removes the known cells (bool [B, N]) from orders [B, N] of all cells and pads with -1."""
    if known is None:
        return orders.contiguous()
    _check_known(known, orders.shape)
    is_known = known.gather(1, orders)
    free_first = is_known.to(torch.uint8).argsort(dim=1, stable=True)
    return orders.masked_fill(is_known, -1).gather(1, free_first)


def known_first(orders: Tensor, known: Tensor) -> Tensor:
    """Extends orders of the free cells (then -1) to permutations of all cells: known ones first, in raster order."""
    num_known = known.sum(dim=1, keepdim=True)
    place = torch.arange(orders.shape[1], device=orders.device) - num_known  # among the free cells; negative: known
    in_raster_order = (~known).to(torch.uint8).argsort(dim=1, stable=True)
    return torch.where(place < 0, in_raster_order, orders.gather(1, place.clamp(min=0)))


def _power_from(base: int, low: int) -> int:
    """Returns the smallest power of base that is >= low."""
    power = 1
    while power < low:
        power *= base
    return power


def _radical_inverse(index: NDArray[np.int64], base: int, intervals: int) -> NDArray[np.int64]:
    """Returns the index of the interval of [0, 1), cut into equal ones, that holds each radical inverse; exact."""
    mirrored, denominator = np.zeros_like(index), 1
    while index.any():
        index, digit = np.divmod(index, base)
        mirrored, denominator = mirrored * base + digit, denominator * base
    return mirrored * intervals // denominator


def _integer_rows(order: Any, batch: int) -> list[Tensor]:
    """Returns one int64 row per image, on the CPU."""
    if isinstance(order, Tensor | np.ndarray):
        order = torch.as_tensor(order).cpu()
        rows = [order] * batch if order.dim() == 1 else list(order)
    elif isinstance(order, Sequence):
        one_for_all = not any(isinstance(row, Sequence | Tensor | np.ndarray) for row in order)
        rows = [order] * batch if one_for_all else list(order)
    else:
        raise TypeError(f"order must be a policy name, or the cells as integers, got {order!r}")
    if len(rows) != batch:
        raise ValueError(f"order must hold one permutation, or one for each of {batch} images, got {len(rows)}")
    return [_integer_row(row, f"order[{image}]") for image, row in enumerate(rows)]


def _integer_row(row: Any, name: str) -> Tensor:
    try:
        cells = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a list of integers, got {row!r}") from error
    integers = cells.dim() == 1 and cells.dtype in _INTEGERS
    if not integers and cells.shape != (0,):  # an empty list has no dtype of its own
        raise TypeError(f"{name} must be a list of integers, got {cells.dtype} {list(cells.shape)}")
    return cells.cpu().to(torch.int64)


def _check_proximity(threshold: object) -> float:
    proximity = as_real(threshold, "proximity_threshold")
    if math.isnan(proximity):
        raise ValueError("proximity_threshold must be a number, got nan")
    return proximity


def _check_repulsion(threshold: object, grid: Grid) -> int:
    """Returns the threshold (None: the published one), at most the grid's side, beyond which no cells are apart."""
    repulsion = default_repulsion_threshold(grid) if threshold is None else as_int(threshold, "repulsion_threshold")
    if repulsion < 0:
        raise ValueError(f"repulsion_threshold must be >= 0, got {repulsion}")
    return min(repulsion, max(grid))


def check_batch(
    group_sizes: Sequence[int] | Sequence[Sequence[int]], grid: Grid, seeds: Tensor, known: Tensor | None
) -> list[list[int]]:
    """Checks that the arguments fit together; returns the group sizes of each image."""
    _check_seeds(seeds)
    sizes = sizes_per_image(group_sizes, len(seeds))
    if len(sizes) != len(seeds):
        raise ValueError(f"seeds must hold one seed for each of {len(sizes)} images, got {len(seeds)}")
    num_free = _count_free_cells(known, grid[0] * grid[1], len(seeds))
    return [check_group_sizes(row, num_free[image], f"group_sizes[{image}]") for image, row in enumerate(sizes)]


def _check_grid(grid: Grid) -> Grid:
    return as_grid(grid, _MAX_CELLS)


def _check_seeds(seeds: Tensor) -> None:
    if not isinstance(seeds, Tensor):
        raise TypeError(f"seeds must be an int64 tensor of shape [B], got {type(seeds).__name__}")
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds must be int64 of shape [B], got {seeds.dtype} {list(seeds.shape)}")


def _count_free_cells(known: Tensor | None, num_cells: int, batch: int) -> list[int]:
    if known is None:
        return [num_cells] * batch
    return (~_check_known(known, (batch, num_cells))).sum(dim=1).tolist()


def _check_known(known: Tensor, shape: Sequence[int]) -> Tensor:
    check_tensor(known, "known", torch.bool, shape)
    return known
