"""Options of the commands that draw pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lpd_tools.commands.model_options import DTYPE_HELP, MODEL_HELP, TOKENIZER_HELP

ORDER_HELP = "locality, random, raster, halton, spiral, outward, or an image: its bright parts first."

Model = Annotated[str | None, typer.Option(help=MODEL_HELP)]
Tokenizer = Annotated[str | None, typer.Option(help=TOKENIZER_HELP)]
DType = Annotated[str, typer.Option(help=DTYPE_HELP)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<index>; default: cuda if there is one.")]
Steps = Annotated[int | None, typer.Option(help="Decoding steps; default: the model's.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 switches it off.")]
Order = Annotated[str | None, typer.Option(help=ORDER_HELP)]
Temperature = Annotated[float | None, typer.Option(help="0 means argmax.")]
TopK = Annotated[int | None, typer.Option(help="0 switches it off.")]
TopP = Annotated[float | None, typer.Option(help="1 switches it off.")]

# Of the commands that edit pictures.
Image = Annotated[Path, typer.Argument(help="Picture to edit: any file that Pillow reads.")]
Mask = Annotated[Path, typer.Argument(help="Picture of the same size, white where to paint.")]
OUTPUT_HELP = "PNG file to write; default: {name}.png, or {name}-2.png and so on if that is there."
Output = Annotated[
    Path | None,
    typer.Option(help="PNG file to write, several images to numbered ones; default: a name that is not taken yet."),
]
Images = Annotated[int, typer.Option("--images", "-n", min=1, help="How many to draw, each by the next seed.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")]
Dilate = Annotated[int, typer.Option(min=0, help="Cells around the mask to repaint too.")]
Feather = Annotated[int, typer.Option(min=0, help="Pixels over which the new fades into the old.")]
Paste = Annotated[bool, typer.Option(help="Restore the unmasked pixels exactly.")]
Resize = Annotated[str | None, typer.Option(help="How to fit pictures of another size: stretch or crop.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")]
