"""The routes: OpenAI's image API, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException

from lpd_ext.drawing import Drawing
from lpd_ext.handle import Handle, Preview
from lpd_ext.request import DecodeRequest
from lpd_tools.serve import errors
from lpd_tools.serve.errors import ApiError
from lpd_tools.serve.forms import read_edit
from lpd_tools.serve.limits import Limits, read_keys
from lpd_tools.serve.metrics import Measured
from lpd_tools.serve.pictures import encode_base64
from lpd_tools.serve.schemas import Generation, ImageOptions
from lpd_tools.serve.service import ImageService


def create_app(service: ImageService) -> FastAPI:
    """The application of a service, which it closes at its end. Raises OSError or ValueError for its file of keys."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.engine.close(finish=False)

    app = FastAPI(title="lpd_ext", lifespan=lifespan, docs_url=None, redoc_url=None)
    config = service.config
    app.add_middleware(
        Limits, max_bytes=config.max_body_bytes, seconds=config.body_seconds, keys=read_keys(config.api_keys)
    )
    app.add_exception_handler(ApiError, errors.answer_api_error)
    app.add_exception_handler(RequestValidationError, errors.answer_invalid)
    app.add_exception_handler(HTTPException, errors.answer_http)
    app.add_exception_handler(Exception, errors.answer_unforeseen)
    app.add_middleware(Measured, metrics=service.metrics)

    @app.post("/v1/images/generations", response_model=None)
    async def generations(body: Generation, request: Request) -> Response:
        check_streaming(body)
        service.check_open()
        return await answer(service, body, service.prepare(body), request, "image_generation")

    @app.post("/v1/images/edits", response_model=None)
    async def edits(request: Request) -> Response:
        options, image, mask = await read_edit(request)
        check_streaming(options)
        service.check_open()
        drawing = await asyncio.to_thread(service.prepare_edit, options, image, mask)
        return await answer(service, options, drawing, request, "image_edit")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"The model {name!r} does not exist", param="model", code="model_not_found")
        return service.describe()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        is_ready = service.ready()
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def check_streaming(options: ImageOptions) -> None:
    """ApiError for previews that nobody would see."""
    if options.partial_images and not options.stream:
        raise ApiError(400, "partial_images needs stream to be true", param="partial_images")


async def answer(
    service: ImageService, options: ImageOptions, work: DecodeRequest | Drawing, request: Request, event: str
) -> Response:
    """Draw, and answer with the images, or with a stream of events whose names begin with `event`."""
    if options.stream:
        handle = service.submit(work, options.partial_images or 0)
        return StreamingResponse(_events(service, options, handle, event), media_type="text/event-stream")
    with service.open_request():
        handle = service.submit(work)
        output = await service.result(handle, request.receive)
        if output is None:
            return Response(status_code=499)  # nobody reads it
        kind = options.output_format or "png"
        data = [
            {"b64_json": await _encoded(picture, options), "seed": seed}
            for picture, seed in zip(output.images, output.seeds, strict=True)
        ]
        service.metrics.images.inc(len(data))
        answered = {"created": int(time.time()), "data": data, "output_format": kind, "size": service.size_text}
        return JSONResponse(answered | {"background": "opaque", "usage": _usage(service, len(data))})


async def _events(service: ImageService, options: ImageOptions, handle: Handle, event: str) -> AsyncIterator[bytes]:
    kind = options.output_format or "png"
    common = {
        "created_at": int(time.time()),
        "output_format": kind,
        "size": service.size_text,
        "background": "opaque",
        "quality": "auto",
    }
    index = 0
    with service.open_request():
        try:
            async for item in service.previews(handle):
                if isinstance(item, Preview):
                    picture = await _encoded(item.picture, options)
                    more: dict[str, Any] = {"partial_image_index": index, "step": item.step, "steps": item.num_steps}
                    yield _event(f"{event}.partial_image", {"b64_json": picture} | common | more)
                    index += 1
                else:
                    picture = await _encoded(item.images[0], options)
                    more = {"usage": _usage(service, 1), "seed": item.seeds[0]}
                    service.metrics.images.inc()
                    yield _event(f"{event}.completed", {"b64_json": picture} | common | more)
        except ApiError as error:
            yield _event("error", error.body)
        except RuntimeError as error:
            yield _event("error", ApiError(500, str(error), "server_error").body)


async def _encoded(picture: Image.Image, options: ImageOptions) -> str:
    """In a thread: it may take as long as a step."""
    return await asyncio.to_thread(encode_base64, picture, options.output_format or "png", options.output_compression)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


def _usage(service: ImageService, count: int) -> dict[str, Any]:
    drawn = count * service.pipe.model.config.num_tokens
    details = {"text_tokens": count, "image_tokens": 0}
    return {
        "input_tokens": count,
        "input_tokens_details": details,
        "output_tokens": drawn,
        "total_tokens": drawn + count,
    }
