"""`lpd edit-gallery`: everything that editing does to one picture, as a picture."""

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
    Image,
    Mask,
    Model,
    Order,
    Steps,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
)  # fmt: skip


def edit_gallery(
    image: Image,
    mask: Mask,
    label: Annotated[str, typer.Argument(help="Class name, else index.")],
    new_label: Annotated[str, typer.Argument(help="Class name, else index, for the row of class edits.")],
    margins: Annotated[
        str, typer.Option(help="Pixels that are cut off and painted anew: one number, or left,top,right,bottom.")
    ] = "8,0,8,0",
    keep: Annotated[float, typer.Option(help="Share of the cells that variations keep.")] = 0.25,
    output: Annotated[Path | None, typer.Option(help=OUTPUT_HELP.format(name="editing"))] = None,
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Results in each row.")] = 6,
    model: Model = None,
    tokenizer: Tokenizer = None,
    dtype: DType = "",
    steps: Steps = None,
    guidance: Guidance = None,
    order: Order = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Annotated[int, typer.Option(help="Seed of the first result in each row.")] = 0,
    device: Device = "",
    force: Force = False,
) -> None:
    """Inpaint, edit, outpaint and vary one picture: a row each, input first, redrawn parts hatched.

    Example: lpd edit-gallery face.png mouth.png happy-face sad-face --output editing.png
    """
    from lpd_tools.edit_gallery import Given, draw_gallery
    from lpd_tools.sampling import Sampling

    sampling = Sampling(steps, guidance, order, temperature, top_k, top_p)
    given = Given(image, mask, label, new_label, margins, keep, model, tokenizer, dtype, device)
    draw_gallery(given, sampling, images, seed, output, force)
