"""`lpd orders`: draw generation orders as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lpd_tools.commands.draw_options import OUTPUT_HELP, Force
from lpd_tools.console import new_console


def orders(
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any of locality, random, raster, halton, spiral, outward, or images whose bright parts come first."
        ),
    ] = None,
    height: Annotated[int, typer.Option(min=1, help="Rows of the token grid.")] = 16,
    width: Annotated[int, typer.Option(min=1, help="Columns of the token grid.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps.")] = 20,
    sizes: Annotated[
        str | None, typer.Option("--group-sizes", help="Tokens per step, such as '1,3,12'; replaces --steps.")
    ] = None,
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Orders of each policy.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first order; the next ones count up.")] = 0,
    proximity: Annotated[float, typer.Option(help="Locality: proximity from which a cell counts as near.")] = 1.0,
    repulsion: Annotated[
        int | None,
        typer.Option(min=0, help="Locality: spacing of a group's cells; default: 2, or 4 from 32x32."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Edit mask: draws only the cells under its white.")] = None,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="A column for each policy, not a row.")] = False,
    output: Annotated[Path | None, typer.Option(help=OUTPUT_HELP.format(name="orders"))] = None,
    force: Force = False,
) -> None:
    """Plot orders, cells coloured by decoding step; for several policies, print how they differ.

    Example: lpd orders locality outward --steps 10 --side-by-side --output orders.png
    """
    from lpd_tools.checks import check_seeds
    from lpd_tools.compare_orders import Orders, compare_orders
    from lpd_tools.outputs import picture_files

    (file,) = picture_files(output, "orders.png", force=force)
    seeds = check_seeds(seed, images)
    wanted = Orders(policies or ["locality"], (height, width), steps, sizes, seeds, proximity, repulsion, mask)
    compare_orders(wanted, side_by_side, file)
    new_console().print(str(file.resolve()), style="bold", soft_wrap=True)
