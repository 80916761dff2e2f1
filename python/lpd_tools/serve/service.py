"""The service behind the routes: takes checked work and returns picture files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from lpd_ext.drawing import Drawing, LPDPipelineOutput
from lpd_ext.editing import plan_inpaint
from lpd_ext.engine import Engine, EngineClosedError, EngineFullError
from lpd_ext.handle import Handle, Preview
from lpd_ext.image_input import MAX_PIXELS
from lpd_ext.picture import open_image
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.request import DecodeRequest
from lpd_tools.models import parse_label
from lpd_tools.serve.errors import ApiError, overloaded, unavailable
from lpd_tools.serve.metrics import Metrics
from lpd_tools.serve.pictures import encode
from lpd_tools.serve.schemas import Edit, ImageOptions, Sampling
from lpd_tools.serve.settings import Serving
from lpd_tools.serve.work import Accepted, Finished, Progress, Shown, Work


class ImageService:
    """A `Backend` of one model with its engine, limits and metrics."""

    def __init__(self, pipe: LPDPipeline, name: str, config: Serving) -> None:
        self.pipe, self.name, self.config = pipe, name, config
        self.figures = Metrics()
        self.engine = Engine(pipe, config.max_images, max_waiting=config.max_waiting, on_step=self.figures.on_step)
        self.figures.watch(self.engine)

    @property
    def size(self) -> str:
        """Width and height of the pictures in pixels, in the form 256x256."""
        height, width = self.pipe.model.config.grid
        stride = self.pipe.tokenizer.config.stride
        return f"{width * stride}x{height * stride}"

    async def draw(self, work: Work) -> Progress:
        """As `Backend` has it."""
        options = work.options
        drawing = await asyncio.to_thread(self._prepare, work)
        handle = self._submit(drawing, options.partial_images or 0)
        try:
            yield Accepted(self.size, self.pipe.model.config.num_tokens)
            async for item in self._until_deadline(handle):
                if isinstance(item, Preview):
                    (picture,) = await self._encoded([item.picture], options)
                    yield Shown(picture, item.step, item.num_steps)
                else:
                    pictures = await self._encoded(item.images, options)
                    self.figures.images.inc(len(pictures))
                    yield Finished(pictures, item.seeds)
        finally:
            handle.cancel()

    async def describe(self) -> dict[str, Any]:
        """As `Backend` has it."""
        config = self.pipe.model.config
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "lpd_ext",
            "size": self.size,
            "num_classes": config.num_classes,
            "class_names": self.pipe.class_names,
            "num_tokens": config.num_tokens,
        }

    async def ready(self) -> bool:
        """As `Backend` has it."""
        return self.engine.num_waiting < self.config.max_waiting

    async def metrics(self) -> bytes:
        """As `Backend` has it."""
        return self.figures.text()

    def _prepare(self, work: Work) -> DecodeRequest | Drawing:
        """Prepares work; ApiError with the name of what cannot be drawn."""
        options = work.options
        labels, sampling = self._call(options)
        if not isinstance(options, Edit):
            with _refusals():
                return self.pipe.prepare(labels, **sampling)
        assert work.image is not None
        with _refusals("image"):
            picture = open_image(work.image, MAX_PIXELS)
            holes = picture if work.mask is None else open_image(work.mask, MAX_PIXELS)
            if work.mask is None and not picture.has_transparency_data:
                raise ValueError("mask must be given, or the image must have transparent parts, which are painted then")
        if holes.has_transparency_data:  # OpenAI's masks: transparent pixels are painted
            holes = holes.convert("RGBA").getchannel("A").point(lambda alpha: 0 if alpha else 255)
        fitting: dict[str, Any] = {
            "dilate": options.dilate or 0,
            "feather": options.feather or 0,
            "resize": options.resize,
        }
        with _refusals():
            return plan_inpaint(self.pipe, picture, holes, labels, **fitting, **sampling)

    def _call(self, options: ImageOptions) -> tuple[list[int | str | None], dict[str, Any]]:
        """Returns the labels and sampling options of a body."""
        if options.model not in (None, "", self.name):
            message = f"The model {options.model!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if options.size not in (None, "auto", self.size):
            raise ApiError(400, f"size must be {self.size!r} or 'auto', got {options.size!r}", param="size")
        count, most = options.n or 1, self.config.max_images_per_request
        if count > most:
            raise ApiError(400, f"n must be at most {most}, got {count}", param="n")
        sampling = {name: getattr(options, name) for name in Sampling.model_fields if name != "seed"}
        return [parse_label(self.pipe, options.prompt)] * count, sampling | {"seeds": options.seed}

    def _submit(self, drawing: DecodeRequest | Drawing, previews: int) -> Handle:
        """Submits work to the engine; ApiError if it is full or closed."""
        try:
            return self.engine.submit(drawing, previews)
        except EngineFullError as error:
            raise overloaded(str(error), error.steps * self.figures.mean_step_seconds) from error
        except EngineClosedError as error:
            raise unavailable(str(error)) from error
        except ValueError as error:  # more images than it can ever hold
            raise ApiError(400, str(error), param="n") from error

    async def _until_deadline(self, handle: Handle) -> AsyncIterator[Preview | LPDPipelineOutput]:
        """Yields the previews, then the images; ApiError if they take too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.request_seconds
        events = aiter(handle)
        try:
            while True:
                try:
                    yield await asyncio.wait_for(anext(events), deadline - loop.time())
                except StopAsyncIteration:
                    break
            yield await asyncio.wait_for(_await(handle), max(0.1, deadline - loop.time()))
        except asyncio.TimeoutError:
            raise unavailable(f"the request took longer than {self.config.request_seconds:g} seconds") from None

    async def _encoded(self, pictures: list[Image.Image], options: ImageOptions) -> list[bytes]:
        """Encodes a picture in a thread, since it may take as long as a step."""
        kind, compression = options.output_format or "png", options.output_compression
        return await asyncio.to_thread(lambda: [encode(picture, kind, compression) for picture in pictures])


@contextmanager
def _refusals(param: str | None = None) -> Iterator[None]:
    """Turns the library's errors about arguments into a 400."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ApiError(400, str(error), param=param) from error


async def _await(handle: Handle) -> LPDPipelineOutput:
    return await handle
