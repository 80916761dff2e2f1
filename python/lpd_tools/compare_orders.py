"""`lpd orders`: several orders as one picture, and in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lpd_ext.checks import Grid
from lpd_ext.image_input import fit_mask, read_masks
from lpd_ext.orders import ORDER_POLICIES, default_repulsion_threshold, make_orders
from lpd_ext.schedule import check_group_sizes, group_sizes, parse_group_sizes
from lpd_tools.console import say
from lpd_tools.draw_orders import draw_orders
from lpd_tools.order_figures import apart_and_near
from lpd_tools.png_settings import save_figure
from lpd_tools.sampling import is_image_file


@dataclass(frozen=True)
class Orders:
    """The orders to draw: for each policy or image of priorities, one per seed."""

    policies: Sequence[str]
    grid: Grid
    steps: int
    group_sizes: str | None
    seeds: Sequence[int]
    proximity: float
    repulsion: int | None
    mask: Path | None


def compare_orders(wanted: Orders, side_by_side: bool, output: Path) -> None:
    """Draws orders to a PNG file that carries their settings, and prints how the policies differ."""
    grid, images = wanted.grid, len(wanted.seeds)
    free = _free_cells(wanted.mask, grid)
    num_free = int(free.sum())
    schedule = (
        group_sizes(num_free, wanted.steps)
        if wanted.group_sizes is None
        else check_group_sizes(parse_group_sizes(wanted.group_sizes), num_free)
    )
    drawn = [
        make_orders(
            Path(policy) if policy not in ORDER_POLICIES and is_image_file(policy) else policy,
            [schedule] * images,
            grid,
            torch.tensor(wanted.seeds),
            None if wanted.mask is None else (~free).repeat(images, 1),
            proximity_threshold=wanted.proximity,
            repulsion_threshold=default_repulsion_threshold(grid) if wanted.repulsion is None else wanted.repulsion,
        )
        for policy in wanted.policies
    ]
    for policy, orders in zip(wanted.policies, drawn, strict=True) if len(drawn) > 1 else ():
        apart, near = apart_and_near(orders, schedule, grid)
        say(f"{policy}: cells of a group {apart:.2f} apart, {near:.0%} of a cell's neighbours there before it")
    titles = [[f"{policy}, seed {seed}" for seed in wanted.seeds] for policy in wanted.policies]
    count = len(wanted.policies)
    places = [(p, i) for p in range(count) for i in range(images)]
    if side_by_side:
        places.sort(key=lambda place: place[::-1])
    figure = draw_orders(
        torch.stack([drawn[p][i] for p, i in places]),
        [schedule] * len(places),
        grid,
        [titles[p][i] for p, i in places],
        columns=count if side_by_side else images,
    )
    settings = asdict(wanted) | {"mask": None if wanted.mask is None else wanted.mask.name}
    save_figure(figure, output, {"command": "orders", **settings}, dpi=120)


def _free_cells(mask: Path | None, grid: Grid) -> Tensor:
    if mask is None:
        return torch.ones(grid[0] * grid[1], dtype=torch.bool)
    ((pixels,), _) = read_masks(mask, "mask")
    free = fit_mask(pixels, grid, "stretch", "mask").flatten()
    if not bool(free.any()):
        raise ValueError(f"mask: {str(mask)!r} is empty: nothing is to be painted (white is)")
    return free
