"""Timing for benchmarks: functions interleaved in one run, on a CPU by the clock, on a GPU by events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[[], Any]
CALLS_PER_GRAPH = 20  # per pair of events, whose resolution is about half a microsecond


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry per repeat."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def middle_half(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high

    @property
    def spread(self) -> float:
        """Half the span of the middle half, as a share of the median."""
        low, high = self.middle_half
        return (high - low) / 2 / self.median


def interleaved(
    functions: list[Function],
    repeats: int,
    device: torch.device,
    in_graph: bool = True,
    warm_up: int = 2,
    calls: int = CALLS_PER_GRAPH,
) -> list[Times]:
    """Times the functions in turn, `repeats` times each after `warm_up` rounds.

    On CUDA so many calls are captured in a graph, so that the host does not hide short kernels; in_graph=False times
    single calls, for functions that cannot be captured.
    """
    measure = (
        _gpu_timer(functions, calls if in_graph else 0)
        if device.type == "cuda"
        else [_clocked(run) for run in functions]
    )
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + warm_up):
        for timed, record in zip(measure, seconds, strict=True):
            elapsed = timed()
            if repeat >= warm_up:
                record.append(elapsed)
    return [Times(record) for record in seconds]


def _clocked(run: Function) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def _gpu_timer(functions: list[Function], calls_per_graph: int) -> list[Callable[[], float]]:
    """Times single calls if there are none per graph."""

    def timed_by_events(run: Function, calls: int) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed() -> float:
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3 / calls

        return timed

    if not calls_per_graph:
        return [timed_by_events(run, 1) for run in functions]
    return [timed_by_events(_recorded(run, calls_per_graph), calls_per_graph) for run in functions]


def _recorded(run: Function, calls: int) -> Function:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # on which the operands were written
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def time_text(seconds: float) -> str:
    """Formats a time with three digits in a suitable unit: 35.2 µs, 4.81 ms, 4.04 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            break
    value = seconds / size
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Measures the bytes per second, read and written, of a copy too large for any cache."""
    source = torch.zeros((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (times,) = interleaved([lambda: target.copy_(source)], repeats, device, in_graph=False)
    return 2 * source.numel() / times.median
