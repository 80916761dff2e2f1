"""`lpd training-cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def training_cost(
    recipes: Annotated[list[Path], typer.Argument(help="TOML files with tables [cache-tokens] and [train].")],
    vocab_size: Annotated[int, typer.Option(help="Codes of the tokenizer.", min=1)] = 16384,
    classes: Annotated[int, typer.Option(help="Classes of the data set.", min=1)] = 1000,
    stride: Annotated[int, typer.Option(help="Pixels per token, along a side.", min=1)] = 16,
    peak_tflops: Annotated[float, typer.Option(help="Of one GPU in the training's precision.", min=1e-3)] = 989.0,
    utilisation: Annotated[
        float, typer.Option(help="Share of that peak which training reaches.", min=1e-3, max=1)
    ] = 0.4,
) -> None:
    """Estimate the cost of recipes from counted operations; print a Markdown table.

    Example: lpd training-cost recipes/lpd_l_256.toml --utilisation 0.5
    """
    from lpd_tools.training.cost import cost_table

    typer.echo(cost_table(recipes, vocab_size, classes, stride, 1e12 * peak_tflops * utilisation))
