"""`lpd outpaint`: continue a picture beyond its edges."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from lpd_tools.commands.draw_options import (
    Device,
    Dilate,
    DType,
    Feather,
    Force,
    Guidance,
    Image,
    Images,
    Model,
    Order,
    Output,
    Paste,
    Resize,
    Seed,
    Steps,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
)  # fmt: skip


def outpaint(
    image: Image,
    margins: Annotated[str, typer.Argument(help="Pixels to add: one number, or left,top,right,bottom.")],
    label: Annotated[str, typer.Argument(help="Class name, else index, or 'none' for unconditional.")],
    output: Output = None,
    images: Images = 1,
    model: Model = None,
    tokenizer: Tokenizer = None,
    dtype: DType = "",
    steps: Steps = None,
    guidance: Guidance = None,
    order: Order = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    dilate: Dilate = 0,
    feather: Feather = 0,
    paste: Paste = True,
    resize: Resize = None,
    device: Device = "",
    force: Force = False,
) -> None:
    """Continue a picture beyond its edges, to the size that the model draws.

    Example: lpd outpaint face.png 16,0,16,0 happy-face --resize crop --output whole.png
    """
    from lpd_ext.edit_plan import plan_outpaint
    from lpd_tools.edits import Edit, draw_edit, parse_margins
    from lpd_tools.sampling import Sampling

    sampling = Sampling(steps, guidance, order, temperature, top_k, top_p)
    edit = Edit("outpaint", label, model, tokenizer, dtype, device, sampling, output, images, seed, force)
    sides = parse_margins(margins)
    how: dict[str, Any] = {"dilate": dilate, "feather": feather, "paste": paste, "resize": resize}
    settings = {"image": image.name, "margins": sides, **how}
    draw_edit(edit, partial(plan_outpaint, images=image, margins=sides, **how), settings)
