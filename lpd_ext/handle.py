"""A request that was handed to an engine, as its owner sees it: progress, previews, result, cancellation."""

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
    """An image after group `step` of `num_steps` (from 1): tokens int64 [h, w], -1 where not drawn, and a picture."""

    image: int  # which of the request's
    step: int
    num_steps: int
    tokens: Tensor
    picture: Image.Image


class Handle:
    """What `Engine.submit` returns; safe to use from any thread.

    `result()` waits, `await handle` does in asyncio. `previews()` and `async for` give the newest preview of each image
    when there is one; whoever is slow misses some, and they end with the request. `cancel()` frees its places.
    """

    def __init__(self, request: DecodeRequest) -> None:
        self.request = request
        self._future: Future[LPDPipelineOutput] = Future()
        self._newest: dict[int, Preview] = {}
        self._changed = Condition()
        self._watchers: list[Callable[[], None]] = []
        self._future.add_done_callback(lambda _: self._notify())

    def result(self, timeout: float | None = None) -> LPDPipelineOutput:
        """The images. Raises CancelledError, TimeoutError, or what went wrong (RuntimeError for NaN logits)."""
        return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, None if nothing; raises CancelledError and TimeoutError."""
        return self._future.exception(timeout)

    def cancel(self) -> bool:
        """Give the request up; the engine frees its places before its next step. False if it had ended already."""
        return self._future.cancel()

    def done(self) -> bool:
        """Whether it has ended: with images, an error, or cancelled."""
        return self._future.done()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._future.cancelled()

    def add_done_callback(self, function: Callable[[Handle], Any]) -> None:
        """Call function(handle) when the request has ended, in the thread that ends it; at once if it has."""
        self._future.add_done_callback(lambda _: function(self))

    def __await__(self) -> Generator[Any, None, LPDPipelineOutput]:
        """The images, as `result()`. A task that is cancelled meanwhile cancels the request."""
        return asyncio.wrap_future(self._future).__await__()

    def previews(self) -> Iterator[Preview]:
        """Previews as they come, until the request has ended; waits for the next one."""
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
            with suppress(RuntimeError):  # the loop of whoever watched is closed
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
        """Show a preview."""
        with self._changed:
            self._newest[preview.image] = preview
        self._notify()

    def finish(self, outcome: LPDPipelineOutput | BaseException) -> None:
        """End with images or an error; nothing happens if it was cancelled or has ended."""
        if self._future.done() or not self._future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, BaseException):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
