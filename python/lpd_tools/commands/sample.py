"""`lpd sample`: draw images with a pipeline and save them as one labelled grid."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpd_tools.commands.model_options import DTYPE_HELP, MODEL_HELP, TOKENIZER_HELP
from lpd_tools.console import new_console

if TYPE_CHECKING:
    from lpd_ext import LPDPipeline


def sample(
    labels: Annotated[
        list[str] | None,
        typer.Argument(
            help="Class names, else indices, or 'none' for unconditional; default: every class (at most 10)."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "",
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("grid.png"),
    images_per_label: Annotated[int, typer.Option("--images", "-n", min=1, help="Images per label.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Decoding steps; default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 switches it off.")] = None,
    order: Annotated[str | None, typer.Option(help="locality, random, raster, halton or spiral.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 means argmax.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 switches it off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 switches it off.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    animate: Annotated[
        Path | None, typer.Option(help="WebP or GIF file that shows the images forming, in place of the grid.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="With --animate: orders side by side on one clock, as in 'locality,raster:256' (:steps)."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<index>; default: cuda if there is one.")] = "",
) -> None:
    """Draw images and write them as one labelled grid.

    Example: lpd sample --model lpd_l_256 "golden retriever" goldfish -n 4 --output dogs.png
    """
    from rich.progress import Progress
    from rich.text import Text

    from lpd_tools.checks import check_device, check_output, check_seeds
    from lpd_tools.commands.model_options import load_pipeline
    from lpd_tools.pictures import labelled_grid, write_png

    if animate is None:
        if compare:
            raise ValueError("compare needs animate, the file to write")
        check_output(output, ".png")
    else:
        check_output(animate, ".webp", ".gif", name="animate")
    where = check_device(device)
    console = new_console()
    start = time.perf_counter()
    pipe = load_pipeline(model, tokenizer, dtype, where)
    every = range(min(10, pipe.model.config.num_classes))
    wanted = [_parse_label(pipe, text) for text in labels] if labels else list(every)
    per_image = [label for label in wanted for _ in range(images_per_label)]
    seeds = check_seeds(seed, len(per_image))
    options: dict[str, Any] = {
        "guidance_scale": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seeds": seeds,
    }
    if animate is not None:
        from lpd_tools.animation import record_orders, write_animation

        entries = [entry for text in compare or [] for entry in text.replace(",", " ").split()]
        write_animation(record_orders(pipe, per_image, entries, steps, order, **options), animate)
        console.print(Text.assemble((str(animate.resolve()), "bold")), soft_wrap=True)
        return
    with Progress(console=console) as progress:
        task = progress.add_task("Drawing", total=None)
        result = pipe(
            per_image,
            num_inference_steps=steps,
            order=order,
            **options,
            callback_on_step_end=lambda step, total: progress.update(task, completed=step, total=total),
        )
    captions = [_caption(pipe, label) for label in wanted]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_png(output, labelled_grid(result.images, captions, images_per_label).save)
    seconds = time.perf_counter() - start
    written = Text.assemble((str(output.resolve()), "bold"), f"  {len(per_image)} images in {seconds:.1f} s")
    console.print(written, soft_wrap=True)


def _parse_label(pipe: LPDPipeline, text: str) -> int | str | None:
    """A class of that name, and only if there is none what else the text may mean."""
    if text in pipe.class_names:
        return text
    if text.lower() == "none":
        return None
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text


def _caption(pipe: LPDPipeline, label: int | str | None) -> str:
    from lpd_ext.class_names import short_name

    if label is None:
        return "any"
    if isinstance(label, int) and pipe.class_names:
        return short_name(pipe.class_names[label])
    return str(label)
