"""The engine as the routes see it: a checked request in, pictures out, and a state to be closed in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import Receive

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
from lpd_tools.serve.schemas import Edit, Generation, ImageOptions, Sampling
from lpd_tools.serve.settings import Serving


class ImageService:
    """One model, its engine, limits and metrics."""

    def __init__(self, pipe: LPDPipeline, name: str, config: Serving) -> None:
        self.pipe, self.name, self.config = pipe, name, config
        self.metrics = Metrics()
        self.engine = Engine(pipe, config.max_images, max_waiting=config.max_waiting, on_step=self.metrics.on_step)
        self.metrics.watch(self.engine)
        self.draining = False
        self.open_requests = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its pictures, in pixels."""
        height, width = self.pipe.model.config.grid
        stride = self.pipe.tokenizer.config.stride
        return width * stride, height * stride

    @property
    def size_text(self) -> str:
        """As clients write it: 256x256."""
        return "{}x{}".format(*self.size)

    def check_open(self) -> None:
        """ApiError while the service is being shut down."""
        if self.draining:
            raise unavailable("the server is shutting down")

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Counts a request that is under way."""
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    def prepare(self, options: Generation) -> DecodeRequest:
        """The request of a generation; ApiError naming what cannot be drawn."""
        labels, sampling = self._call(options)
        with _refusals():
            return self.pipe.prepare(labels, **sampling)

    def prepare_edit(self, options: Edit, image: bytes, mask: bytes | None) -> Drawing:
        """The drawing of an edit of these files; ApiError naming what cannot be drawn."""
        labels, sampling = self._call(options)
        with _refusals("image"):
            picture = open_image(image, MAX_PIXELS)
            holes = picture if mask is None else open_image(mask, MAX_PIXELS)
            if mask is None and not picture.has_transparency_data:
                raise ValueError("mask must be given, or the image must have transparent parts, which are painted then")
        if holes.has_transparency_data:  # OpenAI's masks: what is transparent is to be painted
            holes = holes.convert("RGBA").getchannel("A").point(lambda alpha: 0 if alpha else 255)
        with _refusals():
            return plan_inpaint(
                self.pipe,
                picture,
                holes,
                labels,
                dilate=options.dilate or 0,
                feather=options.feather or 0,
                resize=options.resize,
                **sampling,
            )

    def _call(self, options: ImageOptions) -> tuple[list[int | str | None], dict[str, Any]]:
        """Labels and sampling options of a body."""
        if options.model not in (None, "", self.name):
            message = f"The model {options.model!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if options.size not in (None, "auto", self.size_text):
            raise ApiError(400, f"size must be {self.size_text!r} or 'auto', got {options.size!r}", param="size")
        count, most = options.n or 1, self.config.max_images_per_request
        if count > most:
            raise ApiError(400, f"n must be at most {most}, got {count}", param="n")
        if options.stream and count > 1:
            raise ApiError(400, f"n must be 1 with stream, got {count}", param="n")
        sampling = {name: getattr(options, name) for name in Sampling.model_fields if name != "seed"}
        return [parse_label(self.pipe, options.prompt)] * count, sampling | {"seeds": options.seed}

    def submit(self, request: DecodeRequest | Drawing, previews: int = 0) -> Handle:
        """Hand a request to the engine; ApiError where it is full or closed."""
        try:
            return self.engine.submit(request, previews)
        except EngineFullError as error:
            raise overloaded(str(error), error.steps * self.metrics.mean_step_seconds) from error
        except EngineClosedError as error:
            raise unavailable(str(error)) from error

    async def result(self, handle: Handle, receive: Receive) -> LPDPipelineOutput | None:
        """A request's images; None if the client left, whose request is cancelled then, as one that takes too long."""
        drawn = asyncio.ensure_future(_await(handle))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((drawn, gone), timeout=self.config.request_seconds, return_when=asyncio.FIRST_COMPLETED)
            if drawn.done():
                return drawn.result()
            if gone.done():
                return None
            raise unavailable(f"the request took longer than {self.config.request_seconds:g} seconds")
        finally:
            gone.cancel()
            drawn.cancel()
            handle.cancel()

    async def previews(self, handle: Handle) -> AsyncIterator[Preview | LPDPipelineOutput]:
        """A request's previews, then its images; ApiError if it takes too long. Leaving it cancels the request."""
        deadline = asyncio.get_running_loop().time() + self.config.request_seconds
        events = aiter(handle)
        try:
            while True:
                left = deadline - asyncio.get_running_loop().time()
                try:
                    yield await asyncio.wait_for(anext(events), left)
                except StopAsyncIteration:
                    break
            yield await asyncio.wait_for(_await(handle), max(0.1, deadline - asyncio.get_running_loop().time()))
        except asyncio.TimeoutError:
            raise unavailable(f"the request took longer than {self.config.request_seconds:g} seconds") from None
        finally:
            handle.cancel()

    def ready(self) -> bool:
        """Whether a request would be taken."""
        return not self.draining and self.engine.num_waiting < self.config.max_waiting

    def describe(self) -> dict[str, Any]:
        """An entry of `GET /v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "lpd_ext",
            "size": self.size_text,
            "num_classes": self.pipe.model.config.num_classes,
            "class_names": self.pipe.class_names,
            "num_tokens": self.pipe.model.config.num_tokens,
        }


@contextmanager
def _refusals(param: str | None = None) -> Iterator[None]:
    """What the library refuses is a 400."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ApiError(400, str(error), param=param) from error


async def _await(handle: Handle) -> LPDPipelineOutput:
    return await handle


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
