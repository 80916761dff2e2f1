"""Times images in a pass of its own: the rest of the study may share the machine with other work."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lpd_ext.content import content_of, read_json
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.state_files import write_text
from lpd_tools.bench.timing import interleaved
from lpd_tools.machine import machine
from lpd_tools.study.points import Point

BATCH = 100  # images drawn at a time
_REPEATS = 3


def kind_of(point: Point) -> str:
    """Returns what an image's time depends on: steps, and whether it is guided. Orders cost microseconds."""
    return f"{point.steps} steps, {'unguided' if point.guidance_scale == 1 else 'guided'}"


def time_points(pipe: LPDPipeline, points: Sequence[Point], path: Path) -> None:
    """Times images, label to pixels in batches, for each kind of point that the kernels draw; writes to `path`."""
    kinds = {kind_of(point): point for point in points if point.drawn == "mutual"}
    labels = [i % pipe.model.config.num_classes for i in range(BATCH)]
    draws: list[Callable[[], Any]] = [
        partial(
            pipe,
            labels,
            num_inference_steps=point.steps,
            guidance_scale=point.guidance_scale,
            seeds=0,
            output_type="np",
        )
        for point in kinds.values()
    ]
    times = interleaved(draws, _REPEATS, torch.device("cpu"), warm_up=1)  # by the clock: a call ends with the pixels
    found = {
        "machine": machine(pipe.model.pos_embed.device),
        "images per batch": BATCH,
        "milliseconds per image": {
            kind: round(1e3 * taken.median / BATCH, 3) for kind, taken in zip(kinds, times, strict=True)
        },
    }
    write_text(path, json.dumps(found, indent=2) + "\n")


def read_times(path: Path) -> Mapping[str, float]:
    """Reads milliseconds per image by `kind_of`; empty if not measured."""
    if not path.exists():
        return {}
    with content_of(path, "holds no times of a study"):
        times = read_json(path, "holds no times of a study")["milliseconds per image"]
        return {str(kind): float(time) for kind, time in times.items()}
