"""Decodes tokens to pictures in a thread of its own, several at once, beside the steps that draw the next ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from threading import Condition, Thread
from time import monotonic

from PIL import Image
from torch import Tensor

from lpd_ext.drawing import Drawing, pictures

logger = logging.getLogger(__name__)
_TOGETHER = 4  # pictures decoded in one call: of the bundled model, one takes twice as long alone
_FOR_COMPANY = 0.03  # seconds that a finished image waits for others


@dataclass(frozen=True)
class PixelJob:
    """A grid to decode, and the callbacks for its picture."""

    drawing: Drawing
    tokens: Tensor  # int64 [h, w], -1 where not drawn
    row: int  # of the drawing's images
    deliver: Callable[[Image.Image], None]
    fail: Callable[[Exception], None]
    wanted: Callable[[], bool]  # whether someone waits for it still
    is_preview: bool = False


@dataclass(order=True)
class _Entry:
    due: float
    number: int
    job: PixelJob = field(compare=False)


class PixelThread:
    """Decodes jobs: urgent ones first, alone; then the due ones, together with others that are waiting."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._numbers = count()
        self._changed = Condition()
        self._num_urgent = 0  # not yet done
        self._hurried = self._closing = False
        self._thread = Thread(target=self._run, name="lpd-pixels", daemon=True)
        self._thread.start()

    def put(self, job: PixelJob, *, urgent: bool = False, may_wait: bool = False) -> None:
        """Takes a job; one that may wait does so until there are several, for a moment at most."""
        due = 0.0 if urgent else monotonic() + (_FOR_COMPANY if may_wait else 0.0)
        with self._changed:
            self._num_urgent += urgent
            heappush(self._entries, _Entry(due, next(self._numbers), job))
            self._hurried = False
            self._changed.notify_all()

    def hurry(self) -> None:
        """Tells that no other jobs will come soon, so that none need wait."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def wait_for_urgent(self, seconds: float) -> None:
        """Waits until urgent jobs are done, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_urgent, seconds)

    def close(self) -> None:
        """Ends the thread after all jobs put before; returns at once."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self) -> None:
        """Waits for the thread to end."""
        self._thread.join()

    def _run(self) -> None:
        while entries := self._next():
            _decode([entry.job for entry in entries if entry.job.wanted()])
            with self._changed:
                self._num_urgent -= sum(entry.due == 0 for entry in entries)
                self._changed.notify_all()

    def _next(self) -> list[_Entry]:
        """Returns the jobs to decode together; an empty list ends the thread."""
        with self._changed:
            while not self._is_ready():
                if self._closing and not self._entries:
                    return []
                self._changed.wait(self._entries[0].due - monotonic() if self._entries else None)
            taken = [heappop(self._entries)]
            while len(taken) < _TOGETHER and self._entries and self._goes_with(taken[0]):
                taken.append(heappop(self._entries))
            return taken

    def _is_ready(self) -> bool:
        if not self._entries:
            return False
        return self._hurried or self._closing or len(self._entries) >= _TOGETHER or self._entries[0].due <= monotonic()

    def _goes_with(self, first: _Entry) -> bool:
        """Whether the next job may join; nothing joins an urgent one, which would take longer."""
        entry = self._entries[0]
        one, other = (
            (job.drawing.tokenizer, job.drawing.pixel_dtype, job.drawing.preview_decoder, job.is_preview)
            for job in (first.job, entry.job)
        )
        return (first.due > 0 or entry.due == 0) and one == other


def _decode(jobs: Sequence[PixelJob]) -> None:
    if not jobs:
        return
    try:
        wanted = [(job.drawing, job.tokens, job.row) for job in jobs]
        images = pictures(wanted, approximate=jobs[0].is_preview)
    except Exception as error:
        if len(jobs) > 1:  # so that each gets its own error
            for job in jobs:
                _decode([job])
        else:
            _fail(jobs[0], error)
        return
    for job, image in zip(jobs, images, strict=True):
        try:
            job.deliver(image)
        except Exception as error:
            _fail(job, error)


def _fail(job: PixelJob, error: Exception) -> None:
    logger.error("an image could not be turned into pixels", exc_info=error)
    job.fail(error)
