"""`lpd study`: measures what the CSV file lacks, point by point, then draws the pictures and writes the tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lpd_ext.orders import ORDER_POLICIES, default_repulsion_threshold
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.state_files import write_text
from lpd_tools.checks import check_device
from lpd_tools.data.fashion_mnist import CLASS_NAMES, SIDE, load_fashion_mnist
from lpd_tools.data.model_files import model_files
from lpd_tools.data.token_cache import file_hash
from lpd_tools.progress import track
from lpd_tools.settings import Range, check_ranges
from lpd_tools.study.measure import Instruments
from lpd_tools.study.points import Measured, Point, Sweeps
from lpd_tools.study.results import append_result, note_beginning, read_results
from lpd_tools.study.settings import Study
from lpd_tools.study.times import read_times, time_points
from lpd_tools.training.judge import load_judge


def sweeps_of(config: Study, pipe: LPDPipeline) -> Sweeps:
    """The points, around the model's sampling defaults."""
    defaults = pipe.defaults
    repulsion = defaults.repulsion_threshold
    base = Point(
        trained="mutual",
        drawn="mutual",
        order="locality",
        steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        proximity_threshold=float(defaults.proximity_threshold),
        repulsion_threshold=default_repulsion_threshold(pipe.model.config.grid) if repulsion is None else repulsion,
        seed=0,
    )
    return Sweeps(
        base,
        sorted({*config.steps, pipe.model.config.num_tokens}),
        config.orders,
        config.seeds,
        config.proximities,
        config.repulsions,
        config.guidance_scales,
        twin=bool(config.twin),
    )


def run_study(config: Study) -> Path:
    """Measures, draws and writes; returns the CSV file.

    Raises ValueError for impossible settings, and for results that other models or settings began.
    """
    files = model_files(config.model, config.tokenizer)
    device = check_device(config.device)
    pipe = LPDPipeline.from_pretrained(files.model, tokenizer=files.tokenizer, device=device)
    check_model(pipe)
    check_ranges(
        config,
        steps=Range(1, pipe.model.config.num_tokens),
        scored_images=Range(1, config.images),  # or points of other seeds would share orders and images
    )
    unknown = sorted(set(config.orders) - set(ORDER_POLICIES))
    if unknown:
        raise ValueError(f"orders must be among {', '.join(ORDER_POLICIES)}, got {', '.join(unknown)}")
    used = {"model": files.weights, "tokenizer": files.tokenizer, "judge": Path(config.judge)}
    pipes = {"mutual": pipe}
    if config.twin:
        twin = model_files(config.twin, str(files.tokenizer))
        pipes["blind"] = LPDPipeline.from_pretrained(twin.model, tokenizer=twin.tokenizer, device=device)
        if pipes["blind"].model.config.mutual_visibility:
            raise ValueError(f"twin {config.twin!r} was trained with mutual visibility: it is no twin without")
        used["twin"] = twin.weights
    sweeps = sweeps_of(config, pipe)
    for point in sweeps.all_points():
        _check_point(pipe, point)
    test, judge = load_fashion_mnist("test", config.data_dir), load_judge(config.judge)
    table = Path(f"{config.out}.csv")
    depends_on: dict[str, Any] = {f"{name}_sha256": file_hash(file) for name, file in used.items() if file}
    depends_on |= {"temperature": pipe.defaults.temperature, "guidance_schedule": pipe.defaults.guidance_schedule}
    depends_on |= {"images": config.images, "scored_images": config.scored_images}
    note_beginning(Path(f"{config.out}.json"), depends_on)
    instruments = Instruments(pipes, judge, test, config.images, config.scored_images)
    done = read_results(table, Measured)
    begun = time.monotonic()
    missing = [point for point in sweeps.all_points() if point not in done]
    for point in track(missing, "measuring points"):
        if time.monotonic() - begun > 60 * config.minutes:
            break
        done[point] = instruments.measure(point)
        append_result(table, done[point])
    times = Path(f"{config.out}_times.json")
    if config.times:
        time_points(pipe, sweeps.all_points(), times)
    if done:
        report(done, sweeps, config, read_times(times))
    return table


def report(measured: dict[Point, Measured], sweeps: Sweeps, config: Study, times: Mapping[str, float]) -> None:
    """Draws the pictures and writes the tables of what is measured."""
    from lpd_tools.study.report import draw_knobs, draw_orders, draw_visibility, tables  # matplotlib only here

    said = {"command": "study", **asdict(config)}
    draw_orders(measured, sweeps, Path(f"{config.out}_orders.png"), said)
    draw_visibility(measured, sweeps, Path(f"{config.out}_visibility.png"), said)
    draw_knobs(measured, sweeps, Path(f"{config.out}_knobs.png"), said)
    write_text(f"{config.out}_tables.md", tables(measured, sweeps, times) + "\n")


def check_model(pipe: LPDPipeline) -> None:
    """ValueError for a model that does not draw what the judge and the real images show."""
    side, config = pipe.tokenizer.config.stride, pipe.model.config
    size = (config.grid[0] * side, config.grid[1] * side)
    if size != (SIDE, SIDE) or config.num_classes != len(CLASS_NAMES):
        raise ValueError(
            f"model: the study judges Fashion-MNIST, {len(CLASS_NAMES)} classes at {SIDE}x{SIDE} pixels, "
            f"but this one draws {config.num_classes} at {size[1]}x{size[0]}; `lpd evaluate` measures any model"
        )


def _check_point(pipe: LPDPipeline, point: Point) -> None:
    """ValueError for a point that cannot be drawn."""
    pipe.prepare(
        [0],
        seeds=[0],
        num_inference_steps=point.steps,
        order=point.order,
        guidance_scale=point.guidance_scale,
        proximity_threshold=point.proximity_threshold,
        repulsion_threshold=point.repulsion_threshold,
    )
