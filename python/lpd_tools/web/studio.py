"""The functions of the page, without the page: one engine draws for all visitors, each watching their own pictures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from PIL import Image

from lpd_ext.class_names import short_name
from lpd_ext.drawing import Drawing
from lpd_ext.editing import plan_inpaint
from lpd_ext.engine import Engine
from lpd_ext.handle import Handle, Preview
from lpd_ext.masks import masked_cells
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.request import seeds_for
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.edits import known_settings
from lpd_tools.sampling import Sampling
from lpd_tools.web.painted import fitted
from lpd_tools.web.visit import Choice, Visit, entry
from lpd_tools.web.watch import Shown, StepClock, Watch

ANY_CLASS = "any class"
_TICK = 1.0  # seconds between updates to a waiting visitor; a closed page is noticed at the next


class Studio:
    """A model and its engine. Use it in a `with` block; its end cancels what is being drawn.

    of_model: the names that pictures carry of the model, its tokenizer and its dtype.
    """

    def __init__(
        self,
        pipe: LPDPipeline,
        name: str,
        max_images: int = 8,
        max_waiting: int = 64,
        of_model: Mapping[str, str | None] | None = None,
    ) -> None:
        self.pipe, self.name, self.of_model = pipe, name, dict(of_model or {})
        self.clock = StepClock()
        self.engine = Engine(pipe, max_images, max_waiting=max_waiting, on_step=self.clock.on_step)

    def __enter__(self) -> Studio:
        """Returns the studio."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the engine."""
        self.engine.close(finish=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        height, width = self.pipe.model.config.grid
        stride = self.pipe.tokenizer.config.stride
        return height * stride, width * stride

    def class_name(self, label: int | None) -> str:
        """Returns the name of a class for display."""
        if label is None:
            return ANY_CLASS
        return short_name(self.pipe.class_names[label]) if self.pipe.class_names else f"class {label}"

    async def draw(self, visit: Visit, choice: Choice) -> AsyncGenerator[Shown, None]:
        """Starts drawing a picture. Raises, like the others, ValueError for a wrong choice and EngineFullError if full.

        The returned iterator shows the picture forming; closing it cancels.
        """
        return await self.compare(visit, choice, [choice.order])

    async def compare(self, visit: Visit, choice: Choice, orders: Sequence[str]) -> AsyncGenerator[Shown, None]:
        """Starts drawing the same picture, with the same seed, in several orders side by side."""
        (seed,) = seeds_for(choice.seed, 1)
        choices = [replace(choice, order=order, seed=seed) for order in orders]
        options = choice.options() | {"order": list(orders), "seeds": [seed] * len(orders)}
        drawing = self.pipe.drawing(self.pipe.prepare([choice.label] * len(orders), **options))
        return self._submit(visit, drawing, "draw", choices, Image.new("RGB", self.size[::-1]))

    async def inpaint(
        self, visit: Visit, choice: Choice, painting: Mapping[str, Any] | None
    ) -> AsyncGenerator[Shown, None]:
        """Starts redrawing the painted pixels; painting as in `painted.fitted`. Takes at most one step per cell."""
        picture, mask = fitted(painting, self.size)
        num_free = int(masked_cells(mask[None], self.pipe.tokenizer.config.stride).sum())
        (seed,) = seeds_for(choice.seed, 1)
        choice = replace(choice, seed=seed, steps=min(choice.steps, num_free))
        options = {**choice.options(), "seeds": [seed]}
        # The tokenizer may take long; others watch their pictures meanwhile.
        drawing = await asyncio.to_thread(plan_inpaint, self.pipe, picture, mask, [choice.label], **options)
        before = Image.fromarray(VQTokenizer.to_pixels(picture[None]).numpy()[0])
        return self._submit(visit, drawing, "inpaint", [choice], before)

    def _submit(
        self, visit: Visit, drawing: Drawing, kind: str, choices: Sequence[Choice], before: Image.Image
    ) -> AsyncGenerator[Shown, None]:
        if visit.is_drawing():
            raise ValueError("a picture of yours is being drawn: wait for it, or cancel it")
        watch = Watch(self.clock, drawing.request, before, self.engine.steps_until_begun())
        visit.handle = self.engine.submit(drawing, previews=None)
        return self._watch(visit, visit.handle, watch, drawing, kind, choices)

    async def _watch(
        self, visit: Visit, handle: Handle, watch: Watch, drawing: Drawing, kind: str, choices: Sequence[Choice]
    ) -> AsyncGenerator[Shown, None]:
        try:
            async with aclosing(_with_ticks(handle)) as previews:
                async for preview in previews:
                    yield watch.after(preview)
            if handle.cancelled():
                yield watch.cancelled()
                return
            output = handle.result()
        finally:
            handle.cancel()
        entries = [
            entry(picture, kind, self.class_name(choice.label), choice, self._settings(drawing, b))
            for b, (picture, choice) in enumerate(zip(output.images, choices, strict=True))
        ]
        visit.keep(entries)
        yield watch.finished([entry.picture for entry in entries])

    def _settings(self, drawing: Drawing, row: int) -> dict[str, Any]:
        """Returns the settings that a picture of a drawing carries beside the visitor's choices."""
        edit = {} if drawing.request.known_tokens is None else known_settings(drawing, row)
        return self.of_model | Sampling.of_options(asdict(self.pipe.defaults)).settings() | edit


async def _with_ticks(handle: Handle) -> AsyncGenerator[Preview | None, None]:
    """Yields the previews, and None at once and after each second without one."""
    yield None
    previews = aiter(handle)
    pending: asyncio.Future[Preview] = asyncio.ensure_future(anext(previews))
    try:
        while True:
            await asyncio.wait([pending], timeout=_TICK)
            if not pending.done():
                yield None
                continue
            try:
                preview = pending.result()
            except StopAsyncIteration:
                return
            pending = asyncio.ensure_future(anext(previews))
            yield preview
    finally:
        pending.cancel()
