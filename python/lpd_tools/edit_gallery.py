"""`lpd edit-gallery`: rows of edits of one picture, each after the picture that it starts from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lpd_ext.drawing import Drawing
from lpd_ext.edit_plan import Paste, picture_size, plan_inpaint, plan_outpaint, plan_variations
from lpd_ext.image_input import fit_picture, read_pictures
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.checks import check_device, check_seeds
from lpd_tools.console import new_console
from lpd_tools.edits import draw_with_progress, parse_margins
from lpd_tools.models import carried_names, load_pipeline, parse_label
from lpd_tools.outputs import picture_files
from lpd_tools.pictures import labelled_grid
from lpd_tools.png_settings import save_png
from lpd_tools.sampling import Sampling

if TYPE_CHECKING:
    from lpd_ext import LPDPipeline


@dataclass(frozen=True)
class Given:
    """The picture, the edits and the model."""

    image: Path
    mask: Path
    label: str
    new_label: str
    margins: str
    keep: float
    model: str | None
    tokenizer: str | None
    dtype: str
    device: str


def draw_gallery(given: Given, sampling: Sampling, images: int, seed: int, output: Path | None, force: bool) -> None:
    """Draws the rows and writes them; raises the edits' errors before anything is written."""
    (output,) = picture_files(output, "editing.png", force=force)
    device, seeds = check_device(given.device), check_seeds(seed, images)
    pipe = load_pipeline(given.model, given.tokenizer, given.dtype, device)
    steps, sampling = sampling.steps, sampling.resolved(pipe)
    pictures: list[Image.Image] = []
    rows = _rows(pipe, given, seeds, sampling.options() | {"num_inference_steps": steps})
    for drawing in rows.values():
        drawn = draw_with_progress(partial(drawing.run, "pil"))
        pictures += [_begun_from(pipe, given, drawing), *drawn.images]
    settings = {"command": "edit-gallery", **asdict(given), **sampling.settings(), "images": images, "seed": seed}
    settings |= {"image": given.image.name, "mask": given.mask.name}
    settings |= carried_names(given.model, given.tokenizer, given.dtype)
    save_png(labelled_grid(pictures, list(rows), images + 1), output, settings)
    new_console().print(str(output.resolve()), style="bold", soft_wrap=True)


def _rows(pipe: LPDPipeline, given: Given, seeds: list[int], options: dict[str, Any]) -> dict[str, Drawing]:
    label, new = parse_label(pipe, given.label), parse_label(pipe, given.new_label)
    options = {"seeds": seeds, "resize": "stretch", **options}
    margins, whole = parse_margins(given.margins), _picture(pipe, given)
    left, top, right, bottom = (margins,) * 4 if isinstance(margins, int) else margins
    part = whole[:, top : whole.shape[1] - bottom, left : whole.shape[2] - right]
    return {
        "inpaint": plan_inpaint(pipe, given.image, given.mask, label, **options),
        "class edit": plan_inpaint(pipe, given.image, given.mask, new, **options),
        "outpaint": plan_outpaint(pipe, part, margins, label, **options),
        "variations": plan_variations(pipe, given.image, given.keep, label, **options),
    }


def _picture(pipe: LPDPipeline, given: Given) -> Tensor:
    """Returns the picture [3, H, W], stretched to the model's size."""
    ((picture,), _, _) = read_pictures(given.image, "image")
    return fit_picture(picture, picture_size(pipe), "stretch", "image")


def _begun_from(pipe: LPDPipeline, given: Given, drawing: Drawing) -> Image.Image:
    """Returns the picture that the first image of a row starts from, hatched where it is painted."""
    if isinstance(drawing.finish, Paste):
        picture, painted = drawing.finish.pictures[0], drawing.finish.share[0, 0] >= 1
    else:
        stride, picture = pipe.tokenizer.config.stride, _picture(pipe, given)
        assert drawing.request.known_tokens is not None
        cells = drawing.request.known_tokens[0].view(pipe.model.config.grid) < 0
        painted = cells.repeat_interleave(stride, 0).repeat_interleave(stride, 1).cpu()
    y, x = torch.meshgrid(*map(torch.arange, painted.shape), indexing="ij")
    hatched = torch.where((y + x) % 4 < 2, 0.5, 0.0).expand_as(picture)
    return Image.fromarray(VQTokenizer.to_pixels(torch.where(painted, hatched, picture)[None])[0].numpy())
