"""`lpd sample`: draws a labelled grid of images, from options or from the settings that another picture carries."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.text import Text

from lpd_ext.class_names import short_name
from lpd_tools.checks import check_device, check_seeds
from lpd_tools.console import new_console
from lpd_tools.edits import ONE_PICTURE, draw_with_progress, plan_again, said
from lpd_tools.models import carried_names, load_pipeline, parse_label
from lpd_tools.outputs import picture_files
from lpd_tools.pictures import labelled_grid
from lpd_tools.png_settings import read_settings, save_png
from lpd_tools.sampling import Sampling

if TYPE_CHECKING:
    from lpd_ext import LPDPipeline

_IMAGES_PER_LABEL = 8


def draw_sample(
    labels: list[str] | None,
    of_model: Mapping[str, str | None],
    sampling: Sampling,
    output: Path | None,
    images_per_label: int | None,
    seed: int | None,
    like: Path | None,
    device: str,
    force: bool,
) -> None:
    """Draws and writes a grid; settings that are None come from the file `like`, or are the defaults."""
    (output,) = picture_files(output, "grid.png", force=force)
    where = check_device(device)
    console, start = new_console(), time.perf_counter()
    picture, before = (None, {}) if like is None else read_settings(like)
    if before.get("command", "sample") not in ("sample", *ONE_PICTURE):
        raise ValueError(f"like: {str(like)!r} was made by lpd {before['command']}, which sample cannot do again")
    model = {name: before.get(name) if value is None else value for name, value in of_model.items()}
    pipe = load_pipeline(model["model"], model["tokenizer"], model["dtype"] or "", where)
    sampling = sampling.over(Sampling.of(before)).resolved(pipe)
    seed = int(before.get("seed", 0)) if seed is None else seed
    if picture is not None and before["command"] in ONE_PICTURE:
        if labels or images_per_label is not None:
            raise ValueError(f"like: {str(like)!r} is one picture, which labels and --images cannot change")
        drawing = plan_again(pipe, picture, before, sampling, seed)
        image, count = draw_with_progress(lambda show: drawing.run("pil", show)).images[0], 1
        settings = before | carried_names(**model) | sampling.settings() | {"seed": seed}
    else:
        wanted = [parse_label(pipe, text) for text in labels] if labels else before.get("labels", _every_class(pipe))
        images = images_per_label or before.get("images", _IMAGES_PER_LABEL)
        image, count = _grid(pipe, wanted, images, sampling, seed), len(wanted) * images
        settings = {"command": "sample", **carried_names(**model), "labels": wanted, "images": images, "seed": seed}
        settings |= sampling.settings()
    save_png(image, output, settings)
    seconds = time.perf_counter() - start
    console.print(Text.assemble((str(output.resolve()), "bold"), f"  {said(count)} in {seconds:.1f} s"), soft_wrap=True)


def _grid(pipe: LPDPipeline, labels: list[int | str | None], images: int, sampling: Sampling, seed: int) -> Image.Image:
    per_image = [label for label in labels for _ in range(images)]
    options = {"seeds": check_seeds(seed, len(per_image)), **sampling.options()}
    drawn = draw_with_progress(lambda show: pipe(per_image, callback_on_step_end=show, **options))
    return labelled_grid(drawn.images, [_caption(pipe, label) for label in labels], images)


def _every_class(pipe: LPDPipeline) -> list[int]:
    return list(range(min(10, pipe.model.config.num_classes)))


def _caption(pipe: LPDPipeline, label: Any) -> str:
    if label is None:
        return "any"
    if isinstance(label, int) and pipe.class_names:
        return short_name(pipe.class_names[label])
    return str(label)
