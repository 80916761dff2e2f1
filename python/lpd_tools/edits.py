"""One picture edited at the command line: planned, drawn under a progress bar, written with all its settings."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from lpd_ext.drawing import Drawing, LPDPipelineOutput, StepCallback
from lpd_ext.edit_plan import Paste, picture_size
from lpd_ext.image_input import fit_picture, read_pictures
from lpd_tools.checks import check_device, check_seeds
from lpd_tools.console import new_console
from lpd_tools.models import carried_names, load_pipeline, parse_label
from lpd_tools.outputs import picture_files
from lpd_tools.png_settings import save_png
from lpd_tools.sampling import Sampling

if TYPE_CHECKING:
    from lpd_ext import LPDPipeline


# Commands whose files have one picture each.
ONE_PICTURE = ("inpaint", "outpaint", "class-edit", "generate", "demo draw", "demo inpaint")

_FILES = {"inpaint": "inpainted.png", "outpaint": "outpainted.png", "class-edit": "class_edit.png"}


@dataclass(frozen=True)
class Edit:
    """The arguments that all editing commands share."""

    command: str
    label: str
    model: str | None
    tokenizer: str | None
    dtype: str
    device: str
    sampling: Sampling
    output: Path | None
    images: int
    seed: int
    force: bool


def draw_edit(edit: Edit, plan: Callable[..., Drawing], settings: dict[str, Any]) -> None:
    """Draws plan(pipe, class_labels=..., **options) and writes its images; settings: further entries of the files.

    Raises ValueError, and writes nothing, if a file exists and is not to be overwritten.
    """
    outputs = picture_files(edit.output, _FILES[edit.command], edit.images, force=edit.force)
    device, seeds = check_device(edit.device), check_seeds(edit.seed, edit.images)
    console, start = new_console(), time.perf_counter()
    pipe = load_pipeline(edit.model, edit.tokenizer, edit.dtype, device)
    label = parse_label(pipe, edit.label)
    sampling = edit.sampling.resolved(pipe)
    options = sampling.options() | {"num_inference_steps": edit.sampling.steps}
    drawing = plan(pipe, class_labels=label, seeds=seeds, **options)
    result = draw_with_progress(lambda show: drawing.run("pil", show))
    names = carried_names(edit.model, edit.tokenizer, edit.dtype)
    for b, (path, image) in enumerate(zip(outputs, result.images, strict=True)):
        steps = {"steps": len(drawing.request.group_sizes[b])}
        what = {"command": edit.command, **names, "label": label, "seed": seeds[b]}
        known = known_settings(drawing, b)
        save_png(image, path, what | sampling.settings() | steps | settings | known)
    seconds = time.perf_counter() - start
    for path in outputs:
        console.print(str(path.resolve()), style="bold", soft_wrap=True)
    console.print(f"{said(edit.images)} in {seconds:.1f} s")


def draw_with_progress(draw: Callable[[StepCallback], LPDPipelineOutput]) -> LPDPipelineOutput:
    """Returns draw(callback_on_step_end), showing a bar of the steps."""
    with Progress(console=new_console()) as progress:
        task = progress.add_task("Drawing", total=None)

        def show(step: int, total: int) -> None:
            progress.update(task, completed=step, total=total)

        return draw(show)


def said(count: int) -> str:
    """Returns a count with its noun."""
    return f"{count} image{'' if count == 1 else 's'}"


def known_settings(drawing: Drawing, row: int) -> dict[str, Any]:
    """Returns the settings that redraw an edit from its own file: the known cells, and the painted pixels as bits.

    The file holds the other pixels; there is no mask if nothing was pasted.
    """
    request = drawing.request
    assert request.known_tokens is not None
    settings: dict[str, Any] = {"known_tokens": request.known_tokens[row].tolist()}
    if isinstance(drawing.finish, Paste):
        painted = drawing.finish.share[row, 0].cpu().numpy() >= 1
        settings["mask"] = base64.b64encode(np.packbits(painted).tobytes()).decode()
    return settings


def plan_again(
    pipe: LPDPipeline, picture: Image.Image, settings: dict[str, Any], sampling: Sampling, seed: int
) -> Drawing:
    """Plans the drawing of one picture, edited or not, from its own file and the settings in it."""
    options, size = sampling.options(), picture_size(pipe)
    if "mask" in settings and (picture.height, picture.width) != size:
        raise ValueError(
            f"like: the file has {picture.width} x {picture.height} pixels, but the model draws {size[1]} x {size[0]}: "
            "what is known of an edit is in its file as it was drawn"
        )
    try:
        if "known_tokens" in settings:
            known = torch.tensor([settings["known_tokens"]], dtype=torch.int64)
            options["known_tokens"] = known
        mask = _unpacked(settings["mask"], picture.height, picture.width) if "mask" in settings else None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"like: what the file says of known cells is damaged: {error}") from error
    request = pipe.prepare([settings.get("label")], seeds=[seed], **options)
    if mask is None:
        return pipe.drawing(request)
    ((pixels,), _, _) = read_pictures(picture, "like")
    fitted = fit_picture(pixels, size, None, "like")
    return pipe.drawing(request, finish=Paste(fitted[None], mask))


def _unpacked(text: str, height: int, width: int) -> Tensor:
    """Unpacks the mask float32 [1, 1, H, W] from the bits of `known_settings`."""
    bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(bits) != -(-height * width // 8):
        raise ValueError(f"{len(bits)} bytes are no mask of {width} x {height} pixels")
    mask = np.unpackbits(bits, count=height * width).reshape(1, 1, height, width)
    return torch.from_numpy(mask.astype(np.float32))


def parse_margins(text: str) -> int | tuple[int, ...]:
    """Parses margins; ValueError for any other text."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (1, 4) or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise ValueError(f"margins must be a number or left,top,right,bottom, such as 8,0,8,0, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))
