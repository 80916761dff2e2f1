"""`lpd inpaint`: paint the masked part of a picture anew."""

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


def inpaint(
    image: Image,
    mask: Mask,
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
    """Paint the masked (white) part of a picture anew, to fit the rest.

    Example: lpd inpaint face.png hole.png happy-face --images 4 --output repaired.png
    """
    from lpd_ext.edit_plan import plan_inpaint
    from lpd_tools.edits import Edit, draw_edit
    from lpd_tools.sampling import Sampling

    sampling = Sampling(steps, guidance, order, temperature, top_k, top_p)
    edit = Edit("inpaint", label, model, tokenizer, dtype, device, sampling, output, images, seed, force)
    how: dict[str, Any] = {"dilate": dilate, "feather": feather, "paste": paste, "resize": resize}
    settings = {"image": image.name, "mask_image": mask.name, **how}
    draw_edit(edit, partial(plan_inpaint, images=image, masks=mask, **how), settings)
