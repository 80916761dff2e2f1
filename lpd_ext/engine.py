"""A pipeline that serves: requests come at any time and are drawn together, oldest first, by continuous batching."""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from threading import Condition, Thread
from time import perf_counter
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor

from lpd_ext.checks import as_int, as_positive_int
from lpd_ext.continuous_batch import ContinuousBatch, RunningImage
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.drawing import Drawing, LPDPipelineOutput
from lpd_ext.handle import Handle, Preview
from lpd_ext.pace import Pace
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.pixel_thread import PixelJob, PixelThread
from lpd_ext.request import DecodeRequest

logger = logging.getLogger(__name__)
_GRAPHS_KEPT = 64  # each of one step, for a mix of images that came before


class EngineFullError(RuntimeError):
    """As many images wait as may; `steps` more steps bring the next one's turn."""

    def __init__(self, steps: int, max_waiting: int) -> None:
        super().__init__(f"{max_waiting} images wait already: the next one would begin in {steps} steps")
        self.steps = steps


class EngineClosedError(RuntimeError):
    """The engine takes no requests any more."""


@dataclass(frozen=True)
class StepReport:
    """One step of the engine, for metrics."""

    seconds: float
    images: int  # that it drew tokens of
    waiting: int  # images, after it


@dataclass(eq=False)
class _Part:
    """One image of a submitted request."""

    owner: _Submitted
    index: int
    request: DecodeRequest
    running: RunningImage | None = None

    @property
    def steps_left(self) -> int:
        done = 0 if self.running is None else self.running.steps_done
        return self.request.schedules[0].num_steps - done


@dataclass(eq=False)
class _Submitted:
    """A request, the images of it that are finished, and the groups after which a preview is wanted."""

    drawing: Drawing
    handle: Handle
    previews: int | None
    tokens: Tensor  # int64 [B, h, w], -1 where not drawn; for the thread of pixels
    pictures: dict[int, object] = field(default_factory=dict)  # of finished images
    preview_pending: set[int] = field(default_factory=set)
    shown: set[int] = field(default_factory=set)  # images of which there was a preview

    def wants_preview(self, group: int, num_groups: int) -> bool:
        """Whether after this group, from 1, which is not the last: that one's picture is the result."""
        if self.previews is None:
            return group >= 1  # not of known cells
        return group in {round(num_groups * i / (self.previews + 1)) for i in range(1, self.previews + 1)}


class Engine:
    """Draws requests as they come, many at once; for any number of threads, and for asyncio.

    An image takes its place as soon as one is free, oldest first, whether or not others of its request have theirs.
    Tokens are those of `pipe` alone with the same seed (on a GPU, GEMMs of other sizes round differently). Pictures are
    decoded in a thread of their own, several at once, beside the next steps. Use it in a `with` block, or `close` it.

    on_step: called after each step, in the engine's thread. Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        pipe: LPDPipeline,
        max_images: int = 8,
        *,
        max_waiting: int = 256,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        """max_images: drawn at once, each with two cache slots; max_waiting: images that may wait beside them."""
        self.pipe = pipe
        self.max_images = as_positive_int(max_images, "max_images")
        self.max_waiting = as_positive_int(max_waiting, "max_waiting")
        self._on_step = on_step
        graphs = DecodeGraphs(limit=_GRAPHS_KEPT) if pipe.cuda_graphs else None
        self._batch = ContinuousBatch(pipe.model, self.max_images, graphs=graphs)
        self._changed = Condition()
        self._waiting: deque[_Part] = deque()
        self._running: list[_Part] = []
        self._closing = False
        self._device = pipe.model.pos_embed.device
        self._pace = Pace(self._device)
        self._pixels = PixelThread()
        self._thread = Thread(target=self._run, name="lpd-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, finish=False)  # a thread that Python's end finds in a kernel takes the process down
        logger.info("engine: %d images at once, %.1f MB of KV cache", self.max_images, self.cache_bytes / 1e6)

    @property
    def cache_bytes(self) -> int:
        """Size of the KV caches, taken once; they never grow."""
        return self._batch.cache_bytes

    @property
    def num_running(self) -> int:
        """Images being drawn."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Images whose turn has not come."""
        return len(self._waiting)

    def submit(self, work: DecodeRequest | Drawing, previews: int | None = 0) -> Handle:
        """Take a request, as `pipe.prepare` makes it, or an edit, as `editing.plan_inpaint`; returns at once.

        previews: how many of each image, evenly over its steps; None: after every group. Raises ValueError for a
        request of another model, EngineFullError while too many wait, EngineClosedError after `close`.
        """
        drawing = work if isinstance(work, Drawing) else self.pipe.drawing(work)
        request = drawing.request
        if request.config != self.pipe.model.config:
            raise ValueError(f"request was made for a model of {request.config}, got {self.pipe.model.config}")
        if previews is not None and as_int(previews, "previews") < 0:
            raise ValueError(f"previews must be None or >= 0, got {previews}")
        tokens = torch.full((len(request.labels), *request.config.grid), -1, device=self._device)
        submitted = _Submitted(drawing, Handle(request), previews, tokens)
        parts = [_Part(submitted, b, request.images(slice(b, b + 1))) for b in range(len(request.labels))]
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
            self._finish(submitted)
        return submitted.handle

    def steps_until_begun(self) -> int:
        """Steps after which an image submitted now has its place: exact unless someone cancels, then fewer."""
        with self._changed:
            return self._steps_until_begun()

    def close(self, *, finish: bool = True) -> None:
        """Refuse new requests and end: after all that were taken are drawn, or, with finish=False, cancelling them."""
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
        """The engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an exception without drawing what waits."""
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
            except Exception as error:  # whatever it is, its owners must hear of it and the engine must go on
                logger.exception("a step failed; the %d images in it are lost", len(self._running))
                self._fail_running(error)

    def _drop_cancelled(self) -> None:
        for part in [part for part in self._running if part.owner.handle.done()]:
            self._leave(part)
        if any(part.owner.handle.done() for part in self._waiting):
            self._waiting = deque(part for part in self._waiting if not part.owner.handle.done())

    def _begin_waiting(self) -> list[_Part]:
        admitted = []
        while self._waiting and self._num_free:
            admitted.append(self._waiting.popleft())
            self._running.append(admitted[-1])
        return admitted

    def _leave(self, part: _Part) -> None:
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
                self._finish_later(part, self._batch.tokens(image))
                with self._changed:
                    self._leave(part)
            elif part.owner.wants_preview(group, num_groups) and part.index not in part.owner.preview_pending:
                self._show_later(part, self._batch.tokens(image), group, num_groups)
        if not self._running:
            self._pixels.hurry()
        seconds = perf_counter() - begun
        if self._on_step is not None:
            self._on_step(StepReport(seconds, num_images, len(self._waiting)))
        if self._device.type == "cpu":  # where the next step would take the cores from it
            self._pixels.wait_for_urgent(seconds)

    def _show_later(self, part: _Part, tokens: Tensor, step: int, num_steps: int) -> None:
        owner = part.owner
        owner.preview_pending.add(part.index)

        def show(picture: Image.Image) -> None:
            owner.preview_pending.discard(part.index)
            grid = job.tokens.cpu()
            owner.handle.publish(Preview(part.index, step, num_steps, grid, picture))

        job = self._job(part, tokens, show)
        self._pixels.put(job, urgent=part.index not in owner.shown)
        owner.shown.add(part.index)

    def _finish_later(self, part: _Part, tokens: Tensor) -> None:
        owner = part.owner

        def finish(picture: Image.Image) -> None:
            if bool((job.tokens < 0).any()):
                raise RuntimeError("logits contain NaN or are -inf throughout: nothing can be drawn")
            owner.tokens[part.index] = job.tokens
            owner.pictures[part.index] = picture
            if len(owner.pictures) == len(owner.tokens):
                self._finish(owner)

        job = self._job(part, tokens, finish)
        self._pixels.put(job, may_wait=True)

    def _job(self, part: _Part, tokens: Tensor, deliver: Callable[[Image.Image], None]) -> PixelJob:
        owner, handle = part.owner, part.owner.handle
        grid = tokens.unflatten(0, self.pipe.model.config.grid)
        return PixelJob(owner.drawing, grid, part.index, deliver, handle.finish, lambda: not handle.done())

    def _finish(self, owner: _Submitted) -> None:
        request = owner.handle.request
        images = [owner.pictures[b] for b in range(len(request.labels))]
        owner.handle.finish(LPDPipelineOutput(images, owner.tokens, list(request.seeds)))

    def _fail_running(self, error: Exception) -> None:
        with self._changed:
            lost = list(self._running)
            for part in lost:
                self._leave(part)
            owners = {part.owner for part in lost}
            self._waiting = deque(part for part in self._waiting if part.owner not in owners)
        for owner in owners:
            owner.handle.finish(error)
