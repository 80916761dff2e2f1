"""An engine for servers: requests come at any time and are drawn together, oldest first, by continuous batching."""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from threading import Condition, Thread
from time import perf_counter
from types import TracebackType

from lpd_ext.checks import as_int, as_positive_int
from lpd_ext.continuous_batch import ContinuousBatch
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.decode_state import cache_bytes
from lpd_ext.drawing import Drawing
from lpd_ext.handle import Handle
from lpd_ext.pace import Pace
from lpd_ext.parts import available
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.pixel_thread import PixelThread
from lpd_ext.request import DecodeRequest
from lpd_ext.submission import Part, Submission

logger = logging.getLogger(__name__)
_GRAPHS_KEPT = 64  # each of one step, for a mix of images seen before


class EngineFullError(RuntimeError):
    """The queue is full; after `steps` more steps the next image starts."""

    def __init__(self, steps: int, max_waiting: int) -> None:
        super().__init__(f"{max_waiting} images wait already: the next one would begin in {steps} steps")
        self.steps = steps


class EngineClosedError(RuntimeError):
    """The engine is closed and takes no requests."""


@dataclass(frozen=True)
class StepReport:
    """One step of the engine, for metrics."""

    seconds: float
    images: int  # images that it drew tokens of
    waiting: int  # images still waiting after it


class Engine:
    """Draws requests as they arrive, batched; safe from any thread and from asyncio.

    An image starts as soon as a slot is free, oldest first, independently of others in its request. Its tokens are
    those that `pipe` draws with the same seed (on a GPU, GEMMs of other sizes round differently). A separate thread
    decodes pixels, several images at once, during the next steps. Use it in a `with` block, or `close` it.

    Replaced weights are used from the next step on; requests fail if the model is moved.

    on_step: called after each step, in the engine's thread. Raises ValueError for sizes below 1, and for a KV cache
    larger than the free memory.
    """

    def __init__(
        self,
        pipe: LPDPipeline,
        max_images: int = 8,
        *,
        max_waiting: int = 256,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        """max_images: images drawn at once, two cache slots each; max_waiting: images queued beyond them."""
        self.pipe = pipe
        self.max_images = as_positive_int(max_images, "max_images")
        self.max_waiting = as_positive_int(max_waiting, "max_waiting")
        self._on_step = on_step
        self._check_memory()
        graphs = DecodeGraphs(limit=_GRAPHS_KEPT) if pipe.cuda_graphs else None
        self._batch = ContinuousBatch(pipe.model, self.max_images, graphs=graphs)
        self._changed = Condition()
        self._waiting: deque[Part] = deque()
        self._running: list[Part] = []
        self._closing = False
        self._device = pipe.model.pos_embed.device
        self._pace = Pace(self._device)
        self._pixels = PixelThread()
        self._thread = Thread(target=self._run, name="lpd-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, finish=False)  # a thread in a kernel at Python's exit takes the process down
        logger.info("engine: %d images at once, %.1f MB of KV cache", self.max_images, self.cache_bytes / 1e6)

    def _check_memory(self) -> None:
        """Checks the free memory: a CPU's system would promise more than it has, and fail while images are drawn."""
        model = self.pipe.model
        free, each = available(model.pos_embed.device), cache_bytes(model.config, model.pos_embed.dtype, images=1)
        if (needed := self.max_images * each) > free:
            raise ValueError(
                f"max_images = {self.max_images} needs {needed} bytes of KV cache, but {int(free)} bytes of memory are "
                f"available, enough for {int(free // each)} images"
            )

    @property
    def cache_bytes(self) -> int:
        """Size of the KV caches, allocated once; they never grow."""
        return self._batch.cache_bytes

    @property
    def num_running(self) -> int:
        """Images being drawn."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Images that have not started."""
        return len(self._waiting)

    def submit(self, work: DecodeRequest | Drawing, previews: int | None = 0) -> Handle:
        """Submits a request of `pipe.prepare`, or an edit of `editing.plan_inpaint`; returns at once.

        previews: number per image, evenly over its steps; None: after every group. The preview decoder draws them, if
        there is one; `dataclasses.replace(drawing, preview_decoder=None)` makes them exact. Raises
        ValueError for a request of another model, EngineFullError while too many wait, EngineClosedError after `close`.
        """
        drawing = work if isinstance(work, Drawing) else self.pipe.drawing(work)
        request = drawing.request
        if request.config != self.pipe.model.config:
            raise ValueError(f"request was made for a model of {request.config}, got {self.pipe.model.config}")
        if previews is not None and as_int(previews, "previews") < 0:
            raise ValueError(f"previews must be None or >= 0, got {previews}")
        submitted = Submission(drawing, previews)
        parts = submitted.parts()
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is closed and takes no requests")
            if len(parts) > self.max_waiting + self.max_images:
                raise ValueError(
                    f"request must have at most max_images + max_waiting = {self.max_images} + {self.max_waiting} "
                    f"images, got {len(parts)}"
                )
            if parts and len(self._waiting) + len(parts) > self.max_waiting + self._num_free:
                raise EngineFullError(self._steps_until_begun(), self.max_waiting)
            self._waiting += parts
            self._changed.notify_all()
        submitted.handle.add_done_callback(lambda _: self._wake())
        if not parts:
            submitted.finish()
        return submitted.handle

    def steps_until_begun(self) -> int:
        """Returns the steps until an image submitted now would start; fewer if others are cancelled."""
        with self._changed:
            return self._steps_until_begun()

    def close(self, *, finish: bool = True) -> None:
        """Refuses new requests, finishes accepted ones or, with finish=False, cancels them, and ends."""
        with self._changed:
            self._closing = True
            owners = {part.owner for part in (*self._waiting, *self._running)} if not finish else set()
            self._changed.notify_all()
        for owner in owners:
            owner.handle.cancel()
        self._thread.join()
        self._pixels.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        """Returns the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the engine; after an exception, cancels the open requests."""
        self.close(finish=kind is None)

    @property
    def _num_free(self) -> int:
        return self.max_images - len(self._running)

    def _steps_until_begun(self) -> int:
        # Each image keeps its place for as many steps as it has left; the next in turn takes the first that is free.
        free_at = [part.steps_left for part in self._running] + [0] * self._num_free
        heapify(free_at)
        for part in self._waiting:
            heappush(free_at, heappop(free_at) + part.steps_left)
        return free_at[0]

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                self._drop_cancelled()
                if self._closing and not self._waiting and not self._running:
                    self._pixels.close()
                    return
                admitted = self._begin_waiting()
            try:
                for part in admitted:
                    (part.running,) = self._batch.admit(part.request)
                self._step()
            except Exception as error:  # whatever it is, the owners must be told and the engine must go on
                logger.exception("a step failed; the %d images in it are lost", len(self._running))
                self._fail_running(error)

    def _drop_cancelled(self) -> None:
        for part in [part for part in self._running if part.owner.handle.done()]:
            self._leave(part)
        if any(part.owner.handle.done() for part in self._waiting):
            self._waiting = deque(part for part in self._waiting if not part.owner.handle.done())

    def _begin_waiting(self) -> list[Part]:
        admitted = []
        while self._waiting and self._num_free:
            admitted.append(self._waiting.popleft())
            self._running.append(admitted[-1])
        return admitted

    def _leave(self, part: Part) -> None:
        self._running.remove(part)
        if part.running is not None:
            self._batch.release([part.running])

    def _step(self) -> None:
        begun = perf_counter()
        num_images = len(self._running)
        self._batch.advance()
        self._pace.keep()
        for part in list(self._running):
            image = part.running
            assert image is not None
            num_groups = len(image.schedule.group_sizes)
            group = image.steps_done - len(image.schedule.prefill)
            if image.finished:
                self._pixels.put(part.to_finish(self._batch.tokens(image)), may_wait=True)
                with self._changed:
                    self._leave(part)
            elif part.wants_preview(group, num_groups):
                urgent = not part.previews
                self._pixels.put(part.to_show(self._batch.tokens(image), group, num_groups), urgent=urgent)
        if not self._running:
            self._pixels.hurry()
        seconds = perf_counter() - begun
        if self._on_step is not None:
            self._on_step(StepReport(seconds, num_images, len(self._waiting)))
        if self._device.type == "cpu":  # where the next step would take the cores from it
            self._pixels.wait_for_urgent(seconds)

    def _fail_running(self, error: Exception) -> None:
        with self._changed:
            lost = list(self._running)
            for part in lost:
                self._leave(part)
            owners = {part.owner for part in lost}
            self._waiting = deque(part for part in self._waiting if part.owner not in owners)
        for owner in owners:
            owner.handle.finish(error)
