"""The machines that `make gpu-report` runs on: a GPU, or for --dry-run the emulator that takes its place."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import emulation
import pytest
import torch
from lpd_tools.bench.cases import SHAPES, Shape
from lpd_tools.bench.timing import Times
from report_identity import BUILT
from report_programs import EMULATED
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from lpd_ext import ops
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.model import LPDConfig


class TinyShape(Shape):
    """Returns a shape like the named ones, of a model with little to compute."""

    @property
    def config(self) -> LPDConfig:
        return LPDConfig(64, 2, 2, vocab_size=96, num_classes=5, grid=self.grid)

    @property
    def group_sizes(self) -> list[int]:
        return [4, 5, 7]


class Card:
    """The GPU at hand."""

    emulated = False
    device = torch.device("cuda")
    shape = SHAPES["L-256-20"]
    batches: Sequence[int] = (1, 32)
    repeats = 20
    product_rows: Sequence[int] | None = None  # those of lpd bench
    checked_rows: Sequence[int] = (4, 16, 40, 77, 80, 128, 160, 192)
    program = BUILT / "csrc" / "bench" / "gpu" / "lpd_gpu_ceilings"
    model = "lpd_l, 256 px, 20 steps"
    kernels = ProfilerActivity.CUDA, DeviceType.CUDA

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets operators run there."""
        yield

    def graphs(self) -> DecodeGraphs:
        return DecodeGraphs()

    def wait(self) -> None:
        """Waits until all that was asked for is done."""
        torch.cuda.synchronize()

    def by_clock(self, run: Callable[[], Any]) -> Times:
        """Times single calls by the host's clock, the wait for the end included."""
        seconds = []
        for _ in range(self.repeats + 2):
            self.wait()
            begun = time.perf_counter()
            run()
            self.wait()
            seconds.append(time.perf_counter() - begun)
        return Times(seconds[2:])

    def by_events(self, run: Callable[[], Any]) -> Times:
        """Times single calls by events of the GPU."""
        seconds = []
        for _ in range(self.repeats + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(1e-3 * begin.elapsed_time(end))
        return Times(seconds[2:])


class StandIn(Card):
    """The emulated kernels, whose times say nothing."""

    emulated = True
    device = torch.device("cpu")
    shape = TinyShape((4, 4), 3, 1, 2.0, 1)
    batches: Sequence[int] = (1, 2)
    repeats = 1
    product_rows: Sequence[int] | None = (4, 20)
    checked_rows: Sequence[int] = (1, 20)
    program = EMULATED / "csrc" / "bench" / "gpu" / "lpd_gpu_ceilings"
    model = "a small model in three steps"
    kernels = ProfilerActivity.CPU, DeviceType.CPU

    @contextmanager
    def running(self) -> Iterator[None]:
        emulation.load()
        with pytest.MonkeyPatch.context() as patch, emulation.running("random", 1, emulation.SM_90):
            patch.setattr(ops, "_ops", torch.ops.lpd_emulated)
            yield

    def graphs(self) -> DecodeGraphs:
        return DecodeGraphs(capture=lambda runs: list(runs), device_type="cpu")

    def wait(self) -> None:
        """Nothing is ever under way."""

    def by_events(self, run: Callable[[], Any]) -> Times:
        return self.by_clock(run)


@contextmanager
def products(choice: str) -> Iterator[None]:
    """Sets LPD_PRODUCTS."""
    before = os.environ.get("LPD_PRODUCTS")
    os.environ["LPD_PRODUCTS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["LPD_PRODUCTS"]
        else:
            os.environ["LPD_PRODUCTS"] = before


def microseconds(times: Times) -> dict[str, float]:
    """The median of times and their spread, as a record has them."""
    spread = times.spread if len(times.seconds) > 1 else 0.0
    return {"microseconds": round(1e6 * statistics.median(times.seconds), 3), "spread": round(spread, 4)}
