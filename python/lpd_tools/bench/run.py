"""`lpd bench`: times the chosen parts at named shapes, prints tables and writes a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lpd_ext import _C, product_table
from lpd_ext.bundled import BUNDLED
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.product_check import check_pair
from lpd_ext.products import Product, step_pairs
from lpd_ext.state_files import write_text
from lpd_tools.bench.cases import SHAPES, Case, cases
from lpd_tools.bench.decode import BASELINES, PUBLISHED, Decode, time_on_cpu, time_on_cuda
from lpd_tools.bench.host import time_host
from lpd_tools.bench.image import time_decoders, time_images
from lpd_tools.bench.preview import published_size, time_previews
from lpd_tools.bench.products import keep, product_cases, products_of
from lpd_tools.bench.result import Result, cell
from lpd_tools.bench.settings import Bench, Part
from lpd_tools.bench.timing import copy_bandwidth, interleaved, time_text
from lpd_tools.bench.training import time_training
from lpd_tools.checks import check_device, check_output
from lpd_tools.console import new_console, say
from lpd_tools.machine import machine

_FIRST_SHAPE = next(iter(SHAPES))
_TRAINING_BATCH = 4


def run_bench(chosen: Bench) -> None:
    """Times, prints and writes; ValueError with the name of a wrong choice before anything is timed."""
    if chosen.output is not None:
        check_output(chosen.output, ".json")
    run = _Run.of(chosen)
    results: list[Result] = []
    for name in run.shapes:
        for images in chosen.batches or [1]:
            if Part.operators in run.parts:
                results += run.operators(name, images)
            if Part.decode in run.parts:
                results += run.decodes(name, images)
    if Part.host in run.parts:
        for name in run.shapes:
            for images in chosen.batches or [1]:
                results += run.host(name, images)
    if Part.products in run.parts:
        for name in run.shapes:
            results += run.products(name)
    if Part.training in run.parts:
        for name in run.shapes:
            for images in chosen.batches or [_TRAINING_BATCH]:
                results += run.training(name, images)
    if Part.tokenizer in run.parts:
        for images in chosen.batches or [1]:
            results += run.pixels(images)
    if Part.preview in run.parts:
        for images in chosen.batches or [1]:
            results += run.previews(images)
    if Part.image in run.parts:
        for images in chosen.batches or [1]:
            results += run.images(images)
    described = machine(run.device) | {"copy GB/s": round(run.bandwidth * 1e-9, 1)}
    run.console.print(", ".join(f"{key} {value}" for key, value in described.items()), style="dim")
    if chosen.output is not None:
        rows = [result.to_json() for result in results]
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(chosen.output, json.dumps({"machine": described, "results": rows}, indent=1) + "\n")
        say(str(chosen.output.resolve()))


@dataclass(frozen=True)
class _Run:
    """The checked choices, with defaults, and the timing of each part."""

    chosen: Bench
    parts: set[Part]
    device: torch.device
    dtype: torch.dtype
    shapes: list[str]
    baselines: list[str]
    bandwidth: float  # of a copy, in bytes per second
    console: Console

    @classmethod
    def of(cls, chosen: Bench) -> _Run:
        device = check_device(chosen.device)
        parts = set(chosen.parts or [Part.operators])
        on_cuda = device.type == "cuda"
        if on_cuda and not _C.build_config()["cuda_architectures"]:
            raise ValueError(
                "device cuda: lpd_ext was built without CUDA kernels; install it again where nvcc is found"
            )
        if on_cuda and parts - {Part.operators, Part.decode, Part.products}:
            raise ValueError(
                "part must be operators, decode or products on device cuda: the others time kernels of the CPU"
            )
        if Part.products in parts and not (on_cuda and torch.cuda.get_device_capability(device) >= (9, 0)):
            raise ValueError(
                "part products needs device cuda of compute capability 9.0 or newer: it times the products that only "
                "such GPUs have, and keeps the times for decodes there; nothing is timed or kept on other devices"
            )
        shapes = chosen.shapes or [_FIRST_SHAPE]
        for name in shapes:
            if name not in SHAPES:
                raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
            if chosen.step is not None and chosen.step >= SHAPES[name].steps:
                raise ValueError(f"step must be below the {SHAPES[name].steps} steps of {name}, got {chosen.step}")
        baselines = chosen.baselines or ([PUBLISHED] if on_cuda else list(BASELINES))
        for name in baselines:
            if name not in BASELINES:
                raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {name!r}")
        dtype = torch.bfloat16 if on_cuda else torch.float32
        with torch.inference_mode():
            bandwidth = copy_bandwidth(device, min(chosen.repeats, 10))
        return cls(chosen, parts, device, dtype, shapes, baselines, bandwidth, new_console())

    def operators(self, name: str, images: int) -> list[Result]:
        shape = SHAPES[name]
        step = shape.step if self.chosen.step is None else self.chosen.step
        title = f"{name} step {step}, B = {images}, {str(self.dtype).removeprefix('torch.')}"
        with torch.inference_mode():
            timed_cases = cases(shape, step, images, self.device, self.dtype)
            results = [
                _time_case(case, self.chosen.repeats, self.device, self.bandwidth)
                for case in track(timed_cases, f"Timing {title}", console=self.console, transient=True)
            ]
        self.console.print(_operator_table(title, results))
        return [result.at(name, images, step) for result in results]

    def decodes(self, name: str, images: int) -> list[Result]:
        shape = SHAPES[name]
        step = shape.step if self.chosen.step is None else self.chosen.step
        decode = Decode.at_random(shape, images, self.device, self.dtype, self.chosen.depth)
        layers = decode.model.config.depth
        timed = time_on_cuda if self.device.type == "cuda" else time_on_cpu
        title = f"Decode of {name}, {layers} layers, B = {images}"
        results = self.shown(title, lambda: timed(decode, self.chosen.decodes, self.baselines))
        return [result.at(name, images, step, layers) for result in results]

    def products(self, name: str) -> list[Result]:
        """Times the products, and keeps the times for the decodes that choose by them, unless a product is wrong."""
        results = []
        layers = products_of(SHAPES[name], self.dtype)
        wrong = self._wrong_pair(layers)
        for layer, product in layers.items():
            with torch.inference_mode():
                timed_cases = product_cases(layer, product, self.device)
                timed = [_time_case(case, self.chosen.repeats, self.device, self.bandwidth) for case in timed_cases]
            if wrong is None:
                keep(product, timed, self.device)
            results += timed
        self.console.print(_operator_table(f"Products of {name}, {str(self.dtype).removeprefix('torch.')}", results))
        told = f"LPD_PRODUCTS=auto chooses by these times, kept in {product_table.path()}"
        self.console.print(told if wrong is None else f"times are not kept: {wrong}", style="dim")
        return [result.at(name, 1) for result in results]

    def _wrong_pair(self, layers: Mapping[str, Product]) -> str | None:
        try:
            with torch.inference_mode():
                for pair in step_pairs(layers).values():
                    check_pair(pair, self.device)
        except RuntimeError as error:
            return str(error)
        return None

    def host(self, name: str, images: int) -> list[Result]:
        title = f"Before the first step of {name}, B = {images}"
        results = self.shown(title, lambda: time_host(SHAPES[name], images, self.chosen.repeats))
        return [result.at(name, images) for result in results]

    def previews(self, images: int) -> list[Result]:
        results: list[Result] = []
        models: list[tuple[str, Callable[[], LPDPipeline], int]] = [
            *((name, partial(LPDPipeline.from_pretrained, name), self.chosen.repeats) for name in BUNDLED),
            (_FIRST_SHAPE, published_size, self.chosen.decodes),
        ]
        for name, load, repeats in models:
            measure = partial(time_previews, load(), images, repeats)
            timed = self.shown(f"Previews, {name}, B = {images}", measure)
            results += [result.at(name, images) for result in timed]
        return results

    def training(self, name: str, images: int) -> list[Result]:
        title = f"Training attention of {name}, B = {images}"
        results = self.shown(title, lambda: time_training(SHAPES[name], images, self.chosen.decodes))
        return [result.at(name, images) for result in results]

    def pixels(self, images: int) -> list[Result]:
        title = f"Tokens to pixels, 256 px, B = {images}"
        results = self.shown(title, lambda: time_decoders(images, self.chosen.decodes))
        return [result.at("256 px", images) for result in results]

    def images(self, images: int) -> list[Result]:
        title = f"From a label to a PNG, B = {images}"
        results = self.shown(title, lambda: time_images(images, self.chosen.decodes))
        return [result.at("256 px", images) for result in results]

    def shown(self, title: str, measure: Callable[[], list[Result]]) -> list[Result]:
        """Returns the results of `measure` after printing them as a table."""
        with self.console.status(f"Timing: {title}"):
            results = measure()
        _print_ratios(self.console, title, results)
        return results


def _time_case(case: Case, repeats: int, device: torch.device, bandwidth: float) -> Result:
    if case.plain_in_graph:
        ours, plain = interleaved([case.ours, case.plain], repeats, device, calls=case.calls)
    else:
        (ours,) = interleaved([case.ours], repeats, device)
        (plain,) = interleaved([case.plain], min(repeats, 5), device, in_graph=False)
    more: dict[str, Any] = {}
    if case.gigabytes:
        rate = case.gigabytes / ours.median
        more |= {"gigabytes_per_second": rate, "share": 1e9 * rate / bandwidth}
    if case.gigaflops:
        more["gigaflops_per_second"] = case.gigaflops / ours.median
    return Result.against_plain(case.name, ours, plain, **more)


def _print_ratios(console: Console, title: str, results: Sequence[Result]) -> None:
    """Prints results with their times, and how many times as long each baseline takes."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    baselines = list(dict.fromkeys(name for result in results for name in result.ratios or {}))
    for column in ("", "time", "spread", *(f"{name} /" for name in baselines)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for result in results:
        of_it = result.ratios or {}
        ratios = [f"{of_it[name]:.2f}x" if name in of_it else "" for name in baselines]
        table.add_row(result.operator, time_text(result.times.median), f"±{result.times.spread:.0%}", *ratios)
    console.print(table)
    for result in results:
        if result.note:
            console.print(f"{result.operator}: {result.note}", style="dim")


def _operator_table(title: str, results: Sequence[Result]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("operator", "time", "spread", "GB/s", "of copy", "GFLOP/s", "torch", "ratio"):
        table.add_column(column, justify="left" if column == "operator" else "right", no_wrap=True)
    for result in results:
        assert result.ratio is not None
        table.add_row(
            result.operator,
            time_text(result.times.median),
            f"±{result.times.spread:.0%}",
            cell(result.gigabytes_per_second, ".1f"),
            cell(result.share, ".0%"),
            cell(result.gigaflops_per_second, ".0f"),
            time_text(result.plain_times.median),
            f"{result.ratio:.{1 if result.ratio < 100 else 0}f}x",
        )
    return table
