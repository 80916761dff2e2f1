"""Decodes as CUDA graphs: captured once per batch layout, replayed with any orders, labels, seeds and settings."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, RLock
from typing import Any, ClassVar, Generic, TypeVar

import torch

from lpd_ext import _C

# Up to this many steps form one graph; beyond, that graph would be slow to build, so each step has its own.
MAX_STEPS_PER_GRAPH = 64

log = logging.getLogger(__name__)
State = TypeVar("State")
Run = Callable[[], None]


_CAPTURING = Lock()  # CUDA allows one capture at a time per process


class _OwnStream:
    """A stream of the current GPU that nobody else launches to; reused by later captures once it is collected.

    torch hands out 32 streams in turn, so one of them may belong to another thread too; and all captures on a stream
    share the scratch memory of its GEMMs.
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
    """Replays a capture."""

    graph: torch.cuda.CUDAGraph
    recorded_on: _OwnStream

    def __call__(self) -> None:
        self.graph.replay()


def capture_cuda_graphs(runs: Sequence[Run]) -> Sequence[Run]:
    """Captures the launches of each of `runs` on the current device; the results replay them on the same memory.

    Runs each once before. Allocations come from one pool, so the results must be called one after the other. During the
    capture other threads may launch kernels, but not draw from torch's CUDA generator.
    """
    with _CAPTURING:
        own, pool = _OwnStream(), torch.cuda.graph_pool_handle()
        return [_capture(run, own, pool) for run in runs]


def _capture(run: Run, own: _OwnStream, pool: Any) -> Run:
    graph, stream = torch.cuda.CUDAGraph(), own.stream
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            run()  # libraries initialise in their first call, which cannot be captured
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                run()
    finally:  # after a failed run too: its launches use memory that others get now
        torch.cuda.current_stream().wait_stream(stream)
    return _Recording(graph, own)


@dataclass(frozen=True)
class CapturedDecode(Generic[State]):
    """The buffers of a decode, the steps that use them, and the captures of these steps.

    steps: also kept for the memory that they read, since a capture holds addresses only.
    """

    state: State
    steps: Sequence[Run]
    _recorded: dict[bool, Sequence[Run]] = field(default_factory=dict)  # key: whether each step has its own graph

    def is_recorded(self, each_step: bool) -> bool:
        """Whether the decode is captured, as a whole or step by step."""
        return self._one_by_one(each_step) in self._recorded

    def replays(self, each_step: bool) -> Sequence[Run]:
        """Returns functions that replay the steps, one after the other."""
        return self._recorded[self._one_by_one(each_step)]

    def replay(self) -> None:
        """Replays all steps, captured as a whole, without waiting for them."""
        for run in self.replays(each_step=False):
            run()

    def record(self, each_step: bool, capture: Callable[[Sequence[Run]], Sequence[Run]]) -> None:
        """Captures the steps in one graph, or each in its own; runs each once or twice on the state."""

        def run_all() -> None:
            for run in self.steps:
                run()

        one_by_one = self._one_by_one(each_step)
        self._recorded[one_by_one] = capture(self.steps if one_by_one else [run_all])

    def _one_by_one(self, each_step: bool) -> bool:
        return each_step or len(self.steps) > MAX_STEPS_PER_GRAPH


class DecodeGraphs:
    """Captured decodes of one model, by batch layout; drops the least recently used one beyond `limit`.

    Each holds the KV caches of its batch. Hold `lock` from `find` until the device is done, since the buffers are
    shared. A decode that pauses between its steps borrows them by `lent` instead.
    """

    def __init__(
        self,
        limit: int = 4,
        capture: Callable[[Sequence[Run]], Sequence[Run]] = capture_cuda_graphs,
        device_type: str = "cuda",
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self.lock = RLock()  # the garbage collector may return a lent decode in any thread
        self._limit = limit
        self._capture = capture
        self._device_type = device_type
        self._weights: Hashable = None
        self._captured: OrderedDict[Hashable, CapturedDecode[Any]] = OrderedDict()
        self._lent: Counter[Hashable] = Counter()
        self._failed: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._captured)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start empty: captured launches belong to the memory that they were captured on."""
        return DecodeGraphs, (self._limit, self._capture, self._device_type)

    def supports(self, device: torch.device) -> bool:
        """Whether decodes on this device can be captured; the plain twins of a build without CUDA kernels cannot."""
        if device.type == "cuda" and not _C.build_config()["cuda_architectures"]:
            return False
        return device.type == self._device_type

    def has(self, layout: Hashable) -> bool:
        """Whether a decode of this layout is captured; its weights may have changed since."""
        return layout in self._captured

    def clear(self) -> None:
        """Frees the memory of all captured decodes."""
        self._captured.clear()

    def find(
        self, weights: Hashable, layout: Hashable, new: Callable[[], CapturedDecode[State]], each_step: bool = False
    ) -> CapturedDecode[State] | None:
        """Returns the decode captured for `layout`, or captures what `new` returns, as a whole or step by step.

        Drops all captures if the weights have changed. Returns None, with a warning that says why, if capturing fails;
        it is tried again only with other weights, or if memory was short.
        """
        if weights != self._weights:
            self.clear()
            self._failed.clear()
            self._weights = weights
        captured = self._captured.pop(layout, None)
        if layout not in self._failed and (captured is None or not captured.is_recorded(each_step)):
            if captured is None:
                self._make_room()  # before the new one allocates memory
            begun = time.perf_counter()
            try:
                captured = new() if captured is None else captured
                captured.record(each_step, self._capture)
                log.info("recorded a batch layout as CUDA graphs in %.2f s", time.perf_counter() - begun)
            except Exception as error:
                captured = None
                if isinstance(error, torch.OutOfMemoryError):
                    self.clear()  # captures hold the caches of several batches; one alone may fit
                else:
                    self._failed.add(layout)
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"decoding without a CUDA graph, which could not be captured: {reason}", stacklevel=2)
        if captured is None or not captured.is_recorded(each_step):
            return None
        self._captured[layout] = captured
        return captured

    @contextmanager
    def lent(
        self, weights: Hashable, layout: Hashable, new: Callable[[], CapturedDecode[State]]
    ) -> Iterator[CapturedDecode[State] | None]:
        """Finds a decode captured step by step for one owner, who need not hold the lock; None while it is lent."""
        with self.lock:
            captured = None
            if layout in self._captured or not self._lent[layout]:
                captured = self.find(weights, layout, new, each_step=True)
            if captured is not None:
                del self._captured[layout]
                self._lent[layout] += 1
        try:
            yield captured
        finally:
            with self.lock:
                if captured is not None:
                    self._lent -= Counter((layout,))
                    if weights == self._weights and layout not in self._captured:
                        self._make_room()
                        self._captured[layout] = captured

    def _make_room(self) -> None:
        while len(self._captured) >= self._limit:
            self._captured.popitem(last=False)
