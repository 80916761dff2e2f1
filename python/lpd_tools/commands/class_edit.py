"""`lpd class-edit`: paint the masked part of a picture as part of another class."""

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
    Mask,
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


def class_edit(
    image: Image,
    mask: Mask,
    new_label: Annotated[str, typer.Argument(help="Class name, else index.")],
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
    """Paint the masked (white) part of a picture as part of another class.

    Example: lpd class-edit face.png mouth.png sad-face --guidance 4 --output sad.png
    """
    from lpd_ext.edit_plan import plan_inpaint
    from lpd_tools.edits import Edit, draw_edit
    from lpd_tools.sampling import Sampling

    sampling = Sampling(steps, guidance, order, temperature, top_k, top_p)
    edit = Edit("class-edit", new_label, model, tokenizer, dtype, device, sampling, output, images, seed, force)
    how: dict[str, Any] = {"dilate": dilate, "feather": feather, "paste": paste, "resize": resize}
    settings = {"image": image.name, "mask_image": mask.name, **how}
    draw_edit(edit, partial(plan_inpaint, images=image, masks=mask, **how), settings)
