"""`lpd orders`: draw generation orders as a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lpd_tools.console import new_console


def orders(
    policies: Annotated[
        list[str] | None, typer.Argument(help="Any of locality, random, raster, halton, spiral; one row each.")
    ] = None,
    height: Annotated[int, typer.Option(min=1, help="Rows of the token grid.")] = 16,
    width: Annotated[int, typer.Option(min=1, help="Columns of the token grid.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps.")] = 20,
    sizes: Annotated[
        str | None, typer.Option("--group-sizes", help="Tokens per step, such as '1,3,12'; replaces --steps.")
    ] = None,
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Orders per row.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first order; the next ones count up.")] = 0,
    proximity: Annotated[float, typer.Option(help="Locality: proximity from which a cell counts as near.")] = 1.0,
    repulsion: Annotated[
        int | None,
        typer.Option(min=0, help="Locality: spacing of a group's cells; default: 2, or 4 from 32x32."),
    ] = None,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("orders.png"),
) -> None:
    """Draw orders, cells coloured by the step that draws them.

    Example: lpd orders locality raster --steps 10 --output orders.png
    """
    import torch

    from lpd_ext.orders import default_repulsion_threshold, make_orders
    from lpd_ext.schedule import check_group_sizes, group_sizes, parse_group_sizes
    from lpd_tools.checks import check_output, check_seeds
    from lpd_tools.draw_orders import draw_orders
    from lpd_tools.pictures import write_png

    check_output(output, ".png")
    seeds = torch.tensor(check_seeds(seed, images))
    grid = (height, width)
    num_tokens = height * width
    schedule = (
        group_sizes(num_tokens, steps) if sizes is None else check_group_sizes(parse_group_sizes(sizes), num_tokens)
    )
    spacing = default_repulsion_threshold(grid) if repulsion is None else repulsion
    rows = policies or ["locality"]
    drawn = [
        make_orders(
            policy,
            [schedule] * images,
            grid,
            seeds,
            proximity_threshold=proximity,
            repulsion_threshold=spacing,
        )
        for policy in rows
    ]
    figure = draw_orders(
        torch.cat(drawn),
        [schedule] * (len(rows) * images),
        grid,
        [f"{policy}, seed {number}" for policy in rows for number in seeds.tolist()],
        columns=images,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_png(output, partial(figure.savefig, dpi=120))
    new_console().print(str(output.resolve()), style="bold", soft_wrap=True)
