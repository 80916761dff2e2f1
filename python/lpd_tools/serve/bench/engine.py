"""The engine beside the pipeline: mixed requests one at a time, in fixed batches, and as they come."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lpd_ext.engine import Engine, StepReport
from lpd_ext.pipeline import LPDPipeline
from lpd_tools.progress import track
from lpd_tools.serve.bench.settings import ServeBench

_STEPS = (5, 20)
_BATCHES = (4, 8, 16, 32, 64)  # of the fixed batches, the best of which is the mark
_IN_FLIGHT = 8  # requests, while the time to the first preview is taken

Call = dict[str, Any]  # one image: label, seed and options of `LPDPipeline.prepare`


def mixed_calls(pipe: LPDPipeline, count: int, seed: int) -> list[Call]:
    """Images of 5 to 20 steps, half of them guided, of any class."""
    rng = random.Random(seed)
    most = min(_STEPS[1], pipe.model.config.num_tokens)
    return [
        {
            "class_labels": rng.randrange(pipe.model.config.num_classes),
            "num_inference_steps": rng.randint(min(_STEPS[0], most), most),
            "guidance_scale": rng.choice((1.0, 3.0)),
            "seeds": rng.randrange(2**53),
        }
        for _ in range(count)
    ]


def throughput(pipe: LPDPipeline, config: ServeBench) -> dict[str, Any]:
    """Images per second, tokens to pictures included, of each way; medians over rounds that take turns."""
    calls = mixed_calls(pipe, config.images, config.seed)
    sizes = sorted({*_BATCHES, config.max_images})
    with Engine(pipe, config.max_images, max_waiting=len(calls)) as engine:
        ways: dict[str, Callable[[], list[bytes]]] = {
            "one at a time": partial(_in_batches, pipe, calls, 1),
            **{f"batches of {size}": partial(_in_batches, pipe, calls, size) for size in sizes},
            "engine": partial(_by_engine, engine, pipe, calls),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}  # of all threads: others' work disturbs it less
        pictures: dict[str, list[bytes]] = {}
        jobs = [(name, way) for _ in range(config.rounds + 1) for name, way in ways.items()]
        for name, way in track(jobs, "throughput"):
            begun, processor_begun = time.perf_counter(), time.process_time()
            pictures[name] = way()
            seconds[name].append(time.perf_counter() - begun)
            processor[name].append(time.process_time() - processor_begun)
    rates = {name: len(calls) / statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    best = max((name for name in ways if name.startswith("batches")), key=lambda name: rates[name])
    # A larger batch has more caches: how the engine does with its own places is told beside.
    equal = f"batches of {config.max_images}"
    return {
        "images": len(calls),
        "images per second": rates,
        "processor milliseconds per image, least": {
            name: 1000 * min(values) / len(calls) for name, values in processor.items()
        },
        "best fixed batch": best,
        "engine / best fixed batch": rates["engine"] / rates[best],
        f"engine / {equal}": rates["engine"] / rates[equal],
        "engine / one at a time": rates["engine"] / rates["one at a time"],
        "equal pictures": sum(a == b for a, b in zip(pictures["engine"], pictures["one at a time"], strict=True)),
    }


def _in_batches(pipe: LPDPipeline, calls: Sequence[Call], size: int) -> list[bytes]:
    images = []
    for start in range(0, len(calls), size):
        part = calls[start : start + size]
        options: dict[str, Any] = {name: [call[name] for call in part] for name in part[0]}
        images += pipe(**options).images
    return [image.tobytes() for image in images]


def _by_engine(engine: Engine, pipe: LPDPipeline, calls: Sequence[Call]) -> list[bytes]:
    handles = [engine.submit(pipe.prepare(**call)) for call in calls]
    return [handle.result().images[0].tobytes() for handle in handles]


def first_preview(pipe: LPDPipeline, config: ServeBench) -> dict[str, Any]:
    """Measures how long a request waits for its first preview while others are in flight, in steps of that time."""
    reports: list[StepReport] = []
    waits = []
    rng = np.random.default_rng(config.seed)
    with Engine(pipe, max(config.max_images, _IN_FLIGHT + 1), on_step=reports.append) as engine:
        steps = min(_STEPS[1], pipe.model.config.num_tokens)
        others = [engine.submit(pipe.prepare(0, num_inference_steps=steps)) for _ in range(_IN_FLIGHT)]
        for _ in track(range(50), "time to the first preview"):
            others = [
                other if not other.done() else engine.submit(pipe.prepare(0, num_inference_steps=steps))
                for other in others
            ]
            time.sleep(float(rng.uniform(0, 0.02)))
            done_before = len(reports)
            begun = time.perf_counter()
            handle = engine.submit(pipe.prepare(1, num_inference_steps=steps), previews=None)
            next(handle.previews())
            seconds = time.perf_counter() - begun
            during = [report.seconds for report in reports[done_before:]] or [reports[-1].seconds]
            waits.append((seconds, seconds / statistics.mean(during)))
            handle.result()
    return {
        "in flight": _IN_FLIGHT,
        "median milliseconds": 1000 * statistics.median(seconds for seconds, _ in waits),
        "median steps": statistics.median(steps for _, steps in waits),
        "p99 steps": float(np.quantile([steps for _, steps in waits], 0.99)),
    }
