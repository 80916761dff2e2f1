"""Decodes as CUDA graphs: captured once per batch layout, replayed with other orders, labels, seeds and settings."""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar, Generic, TypeVar

import torch

from lpd_ext import _C

# Up to this many steps make one graph; with more, the graph of a whole decode is slow to build and each has its own.
MAX_STEPS_PER_GRAPH = 64

log = logging.getLogger(__name__)
State = TypeVar("State")
Run = Callable[[], None]


_CAPTURING = Lock()  # CUDA has one capture under way per process


class _OwnStream:
    """A stream of the current GPU that nobody else launches to; once it is collected, the next recording may have it.

    torch deals out 32 in turn, so one of them may be another thread's too. And the scratch memory of a stream's GEMMs
    is shared by all that was recorded on it.
    """

    _free: ClassVar[dict[int, list[int]]] = {}

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        free = self._free.setdefault(self._device, [])
        self._handle = free.pop() if free else _C.create_stream()
        self.stream = torch.cuda.ExternalStream(self._handle, self._device)

    def __del__(self) -> None:
        self._free[self._device].append(self._handle)


@dataclass(frozen=True)
class _Recording:
    """Launches again what was recorded."""

    graph: torch.cuda.CUDAGraph
    recorded_on: _OwnStream

    def __call__(self) -> None:
        self.graph.replay()


def capture_cuda_graphs(runs: Sequence[Run]) -> Sequence[Run]:
    """Record what each of `runs` launches on the current device; the results launch it again, on the same memory.

    Each runs once before. What they allocate comes from one pool: the results must be called one after the other.
    Meanwhile other threads may launch kernels, but not draw from torch's CUDA generator.
    """
    with _CAPTURING:
        own, pool = _OwnStream(), torch.cuda.graph_pool_handle()
        return [_capture(run, own, pool) for run in runs]


def _capture(run: Run, own: _OwnStream, pool: Any) -> Run:
    graph, stream = torch.cuda.CUDAGraph(), own.stream
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            run()  # libraries set themselves up in their first call, which cannot be recorded
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                run()
    finally:  # of a run that fails too: what it has launched works on memory that others get now
        torch.cuda.current_stream().wait_stream(stream)
    return _Recording(graph, own)


@dataclass(frozen=True)
class CapturedDecode(Generic[State]):
    """The buffers of a decode and the recorded steps that work on them.

    steps: what was recorded, kept for the memory that it reads; a recording knows addresses only.
    """

    state: State
    replays: Sequence[Run]
    steps: Sequence[Run]

    def replay(self) -> None:
        """Run all steps; the host does not wait for them."""
        for run in self.replays:
            run()


class DecodeGraphs:
    """Captured decodes of one model, by batch layout; beyond `limit` the least recently used one is dropped.

    Each holds the caches of its batch. Hold `lock` from `find` until the device has ended: the buffers are shared.
    """

    def __init__(
        self,
        limit: int = 4,
        capture: Callable[[Sequence[Run]], Sequence[Run]] = capture_cuda_graphs,
        device_type: str = "cuda",
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self.lock = Lock()
        self._limit = limit
        self._capture = capture
        self._device_type = device_type
        self._weights: Hashable = None
        self._captured: OrderedDict[Hashable, CapturedDecode[Any]] = OrderedDict()
        self._failed: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._captured)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, as of a pipeline, starts empty: recorded launches belong to the memory they were recorded on."""
        return DecodeGraphs, (self._limit, self._capture, self._device_type)

    def supports(self, device: torch.device) -> bool:
        """Whether work on this device can be captured: the plain twins of a build without CUDA kernels cannot."""
        if device.type == "cuda" and not _C.build_config()["cuda_architectures"]:
            return False
        return device.type == self._device_type

    def has(self, layout: Hashable) -> bool:
        """Whether a decode of this layout is captured; its weights may have changed since."""
        return layout in self._captured

    def clear(self) -> None:
        """Give the memory of all captured decodes back."""
        self._captured.clear()

    def find(
        self, weights: Hashable, layout: Hashable, capture: Callable[[], CapturedDecode[State]]
    ) -> CapturedDecode[State] | None:
        """The decode captured for `layout`, or the one that `capture` returns; with other weights none is kept.

        None where capturing fails, of which a warning says why. It is tried again with other weights only, or where
        memory was short.
        """
        if weights != self._weights:
            self.clear()
            self._failed.clear()
            self._weights = weights
        captured = self._captured.pop(layout, None)
        if captured is None and layout not in self._failed:
            while len(self._captured) >= self._limit:
                self._captured.popitem(last=False)  # before the new one asks for memory
            begun = time.perf_counter()
            try:
                captured = capture()
                log.info("recorded a batch layout as CUDA graphs in %.2f s", time.perf_counter() - begun)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    self.clear()  # they hold the caches of several batches; one alone may fit
                else:
                    self._failed.add(layout)
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"decoding without a CUDA graph, which could not be captured: {reason}", stacklevel=2)
        if captured is not None:
            self._captured[layout] = captured
        return captured

    def capture(self, state: State, steps: Sequence[Run]) -> CapturedDecode[State]:
        """Record the steps, in one graph or, if there are many, in one each. Each runs once, or twice, on the state."""

        def run_all() -> None:
            for run in steps:
                run()

        runs = [run_all] if len(steps) <= MAX_STEPS_PER_GRAPH else steps
        return CapturedDecode(state, self._capture(runs), steps)
