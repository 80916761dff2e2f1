"""Decodes as CUDA graphs: captured once per batch layout, replayed with other orders, labels, seeds and settings."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from lpd_ext import _C

# Up to this many steps make one graph; with more, the graph of a whole decode is slow to build and each has its own.
MAX_STEPS_PER_GRAPH = 64

log = logging.getLogger(__name__)
State = TypeVar("State")
Run = Callable[[], None]


_CAPTURING = Lock()  # CUDA has one capture under way per process


def capture_cuda_graphs(runs: Sequence[Run]) -> list[Run]:
    """Record what each of `runs` launches on the current device; the results launch it again, on the same memory.

    Each runs once before. What they allocate comes from one pool: the results must be called one after the other.
    Meanwhile other threads may launch kernels, but not draw from torch's CUDA generator.
    """
    # A stream of its own: torch's default one belongs to the GPU of the first capture, and the scratch memory of a
    # stream's GEMMs is shared by all that was recorded on it.
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    with _CAPTURING:
        return [_capture(run, stream, pool) for run in runs]


def _capture(run: Run, stream: torch.cuda.Stream, pool: Any) -> Run:
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries set themselves up in their first call, which cannot be recorded
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def weights_of(model: nn.Module) -> Hashable:
    """Where the model's weights lie: equal as long as none has been replaced or moved."""
    # `model.parameters()` takes ten times as long, a millisecond of each decode.
    addresses: list[int] = []
    modules: list[nn.Module] = [model]
    for module in modules:  # which grows
        for weight in module._parameters.values():
            if weight is not None:
                addresses.append(weight.data_ptr())
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
    return tuple(addresses)


@dataclass(frozen=True)
class CapturedDecode(Generic[State]):
    """The buffers of a decode and the recorded steps that work on them."""

    state: State
    replays: Sequence[Run]

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

    def clear(self) -> None:
        """Give the memory of all captured decodes back."""
        self._captured.clear()

    def find(
        self, weights: Hashable, layout: Hashable, capture: Callable[[], CapturedDecode[State]]
    ) -> CapturedDecode[State]:
        """The decode captured for `layout`, or the one that `capture` returns; with other weights none is kept."""
        if weights != self._weights:
            self.clear()
            self._weights = weights
        captured = self._captured.pop(layout, None)
        if captured is None:
            while len(self._captured) >= self._limit:
                self._captured.popitem(last=False)  # before the new one asks for memory
            begun = time.perf_counter()
            captured = capture()
            log.info("recorded a batch layout as CUDA graphs in %.2f s", time.perf_counter() - begun)
        self._captured[layout] = captured
        return captured

    def capture(self, state: State, steps: Sequence[Run]) -> CapturedDecode[State]:
        """Record the steps, in one graph or, if there are many, in one each. Each runs once, or twice, on the state."""

        def run_all() -> None:
            for run in steps:
                run()

        runs = [run_all] if len(steps) <= MAX_STEPS_PER_GRAPH else steps
        return CapturedDecode(state, self._capture(runs))
