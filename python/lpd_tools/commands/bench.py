"""`lpd bench`: operators, whole decodes and images at named shapes, against plain torch in the same run."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lpd_ext import _C
from lpd_tools.bench.cases import SHAPES, Case, cases
from lpd_tools.bench.decode import BASELINES, PUBLISHED, Decode, time_on_cpu, time_on_cuda
from lpd_tools.bench.image import time_decoders, time_images
from lpd_tools.bench.timing import Times, copy_bandwidth, interleaved, machine, time_text
from lpd_tools.bench.training import time_training
from lpd_tools.checks import check_device, check_output

_FIRST_SHAPE = next(iter(SHAPES))
_TRAINING_BATCH = 4


class Part(str, Enum):
    """What `lpd bench` can time."""

    operators = "operators"
    decode = "decode"
    tokenizer = "tokenizer"
    image = "image"
    training = "training"


def bench(
    part: Annotated[list[Part] | None, typer.Option(help="What to time; default operators.")] = None,
    device: Annotated[str, typer.Option(help="cpu (fp32) or cuda (bf16).")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(SHAPES)}, or both.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Decoding step; default: the shape's own.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images (twice as many sequences); default 1, 4 in training.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each operator, interleaved.")] = 30,
    decodes: Annotated[int, typer.Option(min=2, help="Timed runs of decodes, decoders and training, interleaved.")] = 3,
    baseline: Annotated[
        list[str] | None, typer.Option(help=f"Of decodes; default all: {', '.join(BASELINES)}.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers of the decodes' lpd_l; default its 24.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Time our code against plain torch, interleaved in one run; medians, and half the span of the middle half."""
    if output is not None:
        check_output(output, ".json")
    place = check_device(device)
    parts = set(part or [Part.operators])
    if place.type == "cuda" and not _C.build_config()["cuda_architectures"]:
        raise ValueError("device cuda: lpd_ext was built without CUDA kernels; install it again where nvcc is found")
    if place.type == "cuda" and parts - {Part.operators, Part.decode}:
        raise ValueError("part must be operators or decode on device cuda: the others time kernels of the CPU")
    names = shape or [_FIRST_SHAPE]
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
        if step is not None and step >= SHAPES[name].steps:
            raise ValueError(f"step must be below the {SHAPES[name].steps} steps of {name}, got {step}")
    against = baseline or ([PUBLISHED] if place.type == "cuda" else list(BASELINES))
    for name in against:
        if name not in BASELINES:
            raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {name!r}")
    console = Console()
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    results = []
    with torch.inference_mode():
        bandwidth = copy_bandwidth(place, min(repeats, 10))
    for name in names:
        for images in batch or [1]:
            at = SHAPES[name].step if step is None else step
            about = {"shape": name, "step": at, "batch": images}
            if Part.operators in parts:
                title = f"{name} step {at}, B = {images}, {str(dtype).removeprefix('torch.')}"
                with torch.inference_mode():
                    timed_cases = cases(SHAPES[name], at, images, place, dtype)
                    rows = [
                        _time_case(case, repeats, place, bandwidth)
                        for case in track(timed_cases, f"Timing {title}", console=console, transient=True)
                    ]
                console.print(_table(title, rows))
                results += [about | row for row in rows]
            if Part.decode in parts:
                decode = Decode.at_random(SHAPES[name], images, place, dtype, depth)
                timed = time_on_cuda if place.type == "cuda" else time_on_cpu
                with console.status(f"Timing decodes of {name}, B = {images}"):
                    rows = timed(decode, decodes, against)
                layers = decode.model.config.depth
                title = f"Decode of {name}, {layers} layers, B = {images}"
                _print_ratios(console, title, rows)
                results += [about | {"depth": layers} | row for row in rows]
    if Part.training in parts:
        for name in names:
            for images in batch or [_TRAINING_BATCH]:
                title = f"Training attention of {name}, B = {images}"
                with console.status(f"Timing: {title}"):
                    rows = time_training(SHAPES[name], images, decodes)
                _print_ratios(console, title, rows)
                results += [{"shape": name, "batch": images} | row for row in rows]
    for chosen, title, measure in (
        (Part.tokenizer, "Tokens to pixels, 256 px", time_decoders),
        (Part.image, "From a label to a PNG", time_images),
    ):
        if chosen in parts:
            for images in batch or [1]:
                with console.status(f"Timing: {title}, B = {images}"):
                    rows = measure(images, decodes)
                _print_ratios(console, f"{title}, B = {images}", rows)
                results += [{"shape": "256 px", "batch": images} | row for row in rows]
    described = machine(place) | {"copy GB/s": round(bandwidth * 1e-9, 1)}
    console.print(", ".join(f"{key} {value}" for key, value in described.items()), style="dim")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": described, "results": results}, indent=1) + "\n")
        console.print(str(output.resolve()), markup=False, soft_wrap=True)


def _time_case(case: Case, repeats: int, device: torch.device, bandwidth: float) -> dict[str, Any]:
    if case.plain_in_graph:
        ours, plain = interleaved([case.ours, case.plain], repeats, device)
    else:
        (ours,) = interleaved([case.ours], repeats, device)
        (plain,) = interleaved([case.plain], min(repeats, 5), device, in_graph=False)
    row = _row(case.name, ours, plain)
    if case.gigabytes:
        row |= {"GB/s": case.gigabytes / ours.median, "share": 1e9 * case.gigabytes / ours.median / bandwidth}
    if case.gigaflops:
        row["GFLOP/s"] = case.gigaflops / ours.median
    return row


def _row(name: str, ours: Times, plain: Times) -> dict[str, Any]:
    return {
        "operator": name,
        "seconds": ours.seconds,
        "plain_seconds": plain.seconds,
        "ratio": plain.median / ours.median,
    }


def _print_ratios(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Rows with their times, and how many times as long each of the baselines among them takes."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    baselines = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    for column in ("", "time", "spread", *(f"{name} /" for name in baselines)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        times = Times(row["seconds"])
        low, high = times.middle_half
        ratios = [f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "" for name in baselines]
        spread = f"±{(high - low) / 2 / times.median:.0%}"
        table.add_row(row["operator"], time_text(times.median), spread, *ratios)
    console.print(table)
    for row in rows:
        if row.get("note"):
            console.print(f"{row['operator']}: {row['note']}", style="dim")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("operator", "time", "spread", "GB/s", "of copy", "GFLOP/s", "torch", "ratio"):
        table.add_column(column, justify="left" if column == "operator" else "right", no_wrap=True)
    for row in rows:
        ours, plain = Times(row["seconds"]), Times(row["plain_seconds"])
        low, high = ours.middle_half
        table.add_row(
            row["operator"],
            time_text(ours.median),
            f"±{(high - low) / 2 / ours.median:.0%}",
            f"{row['GB/s']:.1f}" if "GB/s" in row else "",
            f"{row['share']:.0%}" if "share" in row else "",
            f"{row['GFLOP/s']:.0f}" if "GFLOP/s" in row else "",
            time_text(plain.median),
            f"{row['ratio']:.{1 if row['ratio'] < 100 else 0}f}x",
        )
    return table
