"""Handles of requests that an engine draws: progress, previews, result, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Condition
from typing import Any

from PIL import Image
from torch import Tensor

from lpd_ext.drawing import LPDPipelineOutput
from lpd_ext.request import DecodeRequest


@dataclass(frozen=True)
class Preview:
    """An image after group `step` (from 1) of `num_steps`: tokens int64 [h, w], -1 where not drawn, and a picture."""

    image: int  # index in the request
    step: int
    num_steps: int
    tokens: Tensor
    picture: Image.Image


class Handle:
    """The handle that `Engine.submit` returns; safe to use from any thread.

    `result()` waits; in asyncio, `await handle`. `previews()` and `async for` yield the newest preview of each image
    until the request ends; slow readers miss some. `cancel()` frees the request's places.
    """

    def __init__(self, request: DecodeRequest) -> None:
        self.request = request
        self._future: Future[LPDPipelineOutput] = Future()
        self._newest: dict[int, Preview] = {}
        self._changed = Condition()
        self._watchers: list[Callable[[], None]] = []
        self._future.add_done_callback(lambda _: self._notify())

    def result(self, timeout: float | None = None) -> LPDPipelineOutput:
        """Waits for the images. Raises CancelledError, TimeoutError, or the drawing's error (RuntimeError for NaN)."""
        return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits for the end and returns the drawing's error or None; raises CancelledError and TimeoutError."""
        return self._future.exception(timeout)

    def cancel(self) -> bool:
        """Cancels the request: the engine frees its places before its next step. False if it had ended already."""
        return self._future.cancel()

    def done(self) -> bool:
        """Whether the request has ended, with images, with an error, or cancelled."""
        return self._future.done()

    def cancelled(self) -> bool:
        """Whether the request was cancelled."""
        return self._future.cancelled()

    def add_done_callback(self, function: Callable[[Handle], Any]) -> None:
        """Calls function(handle) in the thread that ends the request, or at once if it has ended."""
        self._future.add_done_callback(lambda _: function(self))

    def __await__(self) -> Generator[Any, None, LPDPipelineOutput]:
        """Waits as `result()` does. A task that is cancelled while it waits cancels the request."""
        return asyncio.wrap_future(self._future).__await__()

    def previews(self) -> Iterator[Preview]:
        """Yields previews until the request ends, waiting for each."""
        seen: dict[int, Preview] = {}
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.done() or self._newer(seen))
                newer = self._newer(seen)
            if not newer:
                return
            for preview in newer:
                seen[preview.image] = preview
                yield preview

    async def __aiter__(self) -> AsyncIterator[Preview]:
        """As `previews()`, in asyncio."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        seen: dict[int, Preview] = {}

        def wake() -> None:
            with suppress(RuntimeError):  # the watcher's loop is closed
                loop.call_soon_threadsafe(changed.set)

        with self._watching(wake):
            while True:
                changed.clear()
                done = self.done()
                with self._changed:
                    newer = self._newer(seen)
                for preview in newer:
                    seen[preview.image] = preview
                    yield preview
                if done and not newer:
                    return
                if not newer:
                    await changed.wait()

    @contextmanager
    def _watching(self, wake: Callable[[], None]) -> Iterator[None]:
        with self._changed:
            self._watchers.append(wake)
        try:
            yield
        finally:
            with self._changed:
                self._watchers.remove(wake)

    def _newer(self, seen: dict[int, Preview]) -> list[Preview]:
        return [preview for image, preview in self._newest.items() if seen.get(image) is not preview]

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            watchers = list(self._watchers)
        for wake in watchers:
            wake()

    # For the engine.

    def publish(self, preview: Preview) -> None:
        """Publishes a preview."""
        with self._changed:
            self._newest[preview.image] = preview
        self._notify()

    def finish(self, outcome: LPDPipelineOutput | BaseException) -> None:
        """Ends the request with images or an error; does nothing if it was cancelled or has ended."""
        if self._future.done() or not self._future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, BaseException):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
