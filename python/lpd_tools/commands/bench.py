"""`lpd bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lpd_tools.bench.settings import Bench, Part


def bench(
    part: Annotated[list[Part] | None, typer.Option(help="What to time; default operators.")] = None,
    device: Annotated[str, typer.Option(help="cpu (fp32) or cuda (bf16).")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help="L-256-20 or L-512-48, or both.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Decoding step; default: the shape's own.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images (twice as many sequences); default 1, 4 in training.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each operator, interleaved.")] = 30,
    decodes: Annotated[int, typer.Option(min=2, help="Timed runs of decodes, decoders and training, interleaved.")] = 3,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Baselines: published, two calls, compiled, next token; default all."),
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers of lpd_l in decodes; default 24.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Time lpd_ext against plain torch, interleaved in one run; print medians and half interquartile ranges.

    Example: lpd bench --part decode --shape L-256-20 --baseline published --output bench.json
    """
    from lpd_tools.bench.run import run_bench

    run_bench(Bench(part, device, shape, step, batch, repeats, decodes, baseline, depth, output))
