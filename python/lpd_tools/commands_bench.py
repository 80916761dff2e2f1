"""`lpd bench`: operators, and on request whole decodes, against plain torch in the same run, at named shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lpd_ext import _C
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.model import LPDModel
from lpd_ext.orders import make_orders
from lpd_ext.sampler import DecodeRequest, generate
from lpd_tools.bench_cases import SHAPES, Case, Shape, cases
from lpd_tools.bench_timing import Times, copy_bandwidth, interleaved, machine
from lpd_tools.checks import check_device, check_output
from lpd_tools.plain_decode import decode_plain

_FIRST_SHAPE = next(iter(SHAPES))


def bench(
    device: Annotated[str, typer.Option(help="cpu (fp32) or cuda (bf16).")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(SHAPES)}, or both.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Decoding step; default: the shape's own.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images (twice as many sequences); default 1.")] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each, interleaved.")] = 30,
    decode: Annotated[bool, typer.Option("--decode", help="Time whole decodes of lpd_l too.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Time operators against plain torch, interleaved in one run; medians, and half the span of the middle half."""
    if output is not None:
        check_output(output, ".json")
    place = check_device(device)
    if place.type == "cuda" and not _C.build_config()["cuda_architectures"]:
        raise ValueError("device cuda: lpd_ext was built without CUDA kernels; install it again where nvcc is found")
    names = shape or [_FIRST_SHAPE]
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
        if step is not None and step >= SHAPES[name].steps:
            raise ValueError(f"step must be below the {SHAPES[name].steps} steps of {name}, got {step}")
    console = Console()
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    results = []
    with torch.inference_mode():
        bandwidth = copy_bandwidth(place, min(repeats, 10))
        for name in names:
            for images in batch or [1]:
                at = SHAPES[name].step if step is None else step
                title = f"{name} step {at}, B = {images}, {str(dtype).removeprefix('torch.')}"
                timed = cases(SHAPES[name], at, images, place, dtype)
                rows = [
                    _time_case(case, repeats, place, bandwidth)
                    for case in track(timed, f"Timing {title}", console=console, transient=True)
                ]
                if decode:
                    rows += _time_decodes(SHAPES[name], images, place, dtype, console)
                console.print(_table(title, rows))
                results += [{"shape": name, "step": at, "batch": images} | row for row in rows]
    about = machine(place) | {"copy GB/s": round(bandwidth * 1e-9, 1)}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
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


def _time_decodes(
    shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, console: Console
) -> list[dict[str, Any]]:
    """Whole decodes: ours (on CUDA as one graph, and eagerly) and the published style, weights drawn at random."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LPDModel(shape.config).to(dtype).eval()
    sizes, labels = shape.group_sizes, list(range(batch))
    orders = make_orders(
        "locality", [sizes] * batch, shape.grid, torch.arange(batch), repulsion_threshold=shape.repulsion_threshold
    ).to(device)
    request = DecodeRequest(
        labels=labels,
        group_sizes=[sizes] * batch,
        orders=orders,
        guidance_scale=[shape.guidance_scale] * batch,
        temperature=[1.0] * batch,
        top_k=[0] * batch,
        top_p=[1.0] * batch,
        seeds=labels,
    )
    label_ids = torch.tensor(labels, device=device)
    graphs = DecodeGraphs()
    runs: dict[str, Callable[[], Tensor]] = {"decode": lambda: generate(model, request, graphs)}
    if device.type == "cuda":
        runs["decode, eager"] = lambda: generate(model, request)

    def plain() -> Tensor:
        return decode_plain(model, label_ids, sizes, orders, shape.guidance_scale)

    with console.status(f"Timing decodes of {len(sizes)} steps"):
        *ours, published = interleaved([*runs.values(), plain], 3, device, in_graph=False)
    return [_row(name, times, published) for name, times in zip(runs, ours, strict=True)]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("operator", "time", "spread", "GB/s", "of copy", "GFLOP/s", "torch", "ratio"):
        table.add_column(column, justify="left" if column == "operator" else "right", no_wrap=True)
    for row in rows:
        ours, plain = Times(row["seconds"]), Times(row["plain_seconds"])
        low, high = ours.middle_half
        table.add_row(
            row["operator"],
            _text(ours.median),
            f"±{(high - low) / 2 / ours.median:.0%}",
            f"{row['GB/s']:.1f}" if "GB/s" in row else "",
            f"{row['share']:.0%}" if "share" in row else "",
            f"{row['GFLOP/s']:.0f}" if "GFLOP/s" in row else "",
            _text(plain.median),
            f"{row['ratio']:.{1 if row['ratio'] < 100 else 0}f}x",
        )
    return table


def _text(seconds: float) -> str:
    """Three digits in the unit that suits: 35.2 µs, 4.81 ms, 4.04 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            break
    value = seconds / size
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"
