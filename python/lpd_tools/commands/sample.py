"""`lpd sample`: draw images with a pipeline and save them as one labelled grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lpd_tools.commands.draw_options import (
    OUTPUT_HELP,
    Device,
    DType,
    Force,
    Guidance,
    Model,
    Order,
    Steps,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
)  # fmt: skip


def sample(
    labels: Annotated[
        list[str] | None,
        typer.Argument(
            help="Class names, else indices, or 'none' for unconditional; default: every class (at most 10)."
        ),
    ] = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    dtype: DType = "",
    output: Annotated[Path | None, typer.Option(help=OUTPUT_HELP.format(name="grid"))] = None,
    images_per_label: Annotated[
        int | None, typer.Option("--images", "-n", min=1, help="Images per label; default: 8.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    order: Order = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first image, default 0; the next ones count up.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="PNG file written by lpd: take its settings unless overridden.")
    ] = None,
    animate: Annotated[
        Path | None, typer.Option(help="WebP or GIF file that shows the images forming, in place of the grid.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="With --animate: orders to show side by side, 'locality,raster:256' (order:steps)."),
    ] = None,
    device: Device = "",
    force: Force = False,
) -> None:
    """Draw images and write them as one labelled grid.

    Example: lpd sample --model lpd_l_256 "golden retriever" goldfish -n 4 --output dogs.png
    """
    from lpd_tools.sample_grid import draw_sample
    from lpd_tools.sampling import Sampling

    sampling = Sampling(steps, guidance, order, temperature, top_k, top_p)
    of_model = {"model": model, "tokenizer": tokenizer, "dtype": dtype or None}
    if animate is not None:
        if like is not None:
            raise ValueError("animate and like exclude each other")
        from lpd_tools.animation import animate_sample

        animate_sample(labels, of_model, sampling, animate, compare or [], images_per_label, seed or 0, device, force)
        return
    if compare:
        raise ValueError("compare needs animate, the file to write")
    draw_sample(labels, of_model, sampling, output, images_per_label, seed, like, device, force)
