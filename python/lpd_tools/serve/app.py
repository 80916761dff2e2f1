"""The routes: OpenAI's image API, health and metrics, over a drawing backend."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from lpd_tools.serve import errors
from lpd_tools.serve.errors import ApiError, unavailable
from lpd_tools.serve.forms import read_edit
from lpd_tools.serve.limits import Limits, read_keys
from lpd_tools.serve.schemas import Generation, ImageOptions
from lpd_tools.serve.settings import Serving
from lpd_tools.serve.work import Accepted, Backend, Finished, Progress, Shown, Work


class Door:
    """Counts running requests, and closes before the server does."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    def check_open(self) -> None:
        """Raises ApiError while the server is shutting down."""
        if self.closed:
            raise unavailable("the server is shutting down")

    def __enter__(self) -> None:
        """Counts a request."""
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        """Counts a request as done."""
        self.inside -= 1


def create_app(backend: Backend, config: Serving, door: Door) -> FastAPI:
    """Creates the application. Raises OSError or ValueError for its file of keys."""
    app = FastAPI(title="lpd_ext", docs_url=None, redoc_url=None)
    app.add_middleware(
        Limits, max_bytes=config.max_body_bytes, seconds=config.body_seconds, keys=read_keys(config.api_keys)
    )
    app.add_exception_handler(ApiError, errors.answer_api_error)
    app.add_exception_handler(RequestValidationError, errors.answer_invalid)
    app.add_exception_handler(HTTPException, errors.answer_http)
    app.add_exception_handler(Exception, errors.answer_unforeseen)

    @app.post("/v1/images/generations", response_model=None)
    async def generations(body: Generation, request: Request) -> Response:
        return await answer(backend, Work(body), request, door, "image_generation")

    @app.post("/v1/images/edits", response_model=None)
    async def edits(request: Request) -> Response:
        return await answer(backend, await read_edit(request), request, door, "image_edit")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await backend.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        described = await backend.describe()
        if name != described["id"]:
            raise ApiError(404, f"The model {name!r} does not exist", param="model", code="model_not_found")
        return described

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        is_ready = not door.closed and await backend.ready()
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await backend.metrics(), media_type="text/plain; version=0.0.4")

    return app


async def answer(backend: Backend, work: Work, request: Request, door: Door, event: str) -> Response:
    """Draws, and answers with the images or with a stream of events whose names begin with `event`."""
    options = work.options
    if options.partial_images and not options.stream:
        raise ApiError(400, "partial_images needs stream to be true", param="partial_images")
    if options.stream and (options.n or 1) > 1:
        raise ApiError(400, f"n must be 1 with stream, got {options.n}", param="n")
    door.check_open()
    progress = backend.draw(work)
    accepted = await anext(progress)  # errors are raised here, before the response starts
    assert isinstance(accepted, Accepted)
    if options.stream:
        events = _events(progress, accepted, options, door, event)
        return StreamingResponse(events, media_type="text/event-stream")
    with door:
        finished = await _result_unless_gone(progress, request)
        if finished is None:
            return Response(status_code=499)  # nobody reads it
        pairs = zip(finished.pictures, finished.seeds, strict=True)
        data = [{"b64_json": _text(picture), "seed": seed} for picture, seed in pairs]
        answered = {
            "created": int(time.time()),
            "data": data,
            "output_format": options.output_format or "png",
            "size": accepted.size,
            "background": "opaque",
            "usage": _usage(len(data), accepted),
        }
        return JSONResponse(answered)


async def _result_unless_gone(progress: Progress, request: Request) -> Finished | None:
    """Returns the pictures, or None if the client left, whose work is then cancelled."""

    async def finish() -> Finished:
        async with aclosing(progress):
            async for item in progress:
                if isinstance(item, Finished):
                    return item
        raise unavailable("the drawing ended without pictures")

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawn, gone = asyncio.ensure_future(finish()), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((drawn, gone), return_when=asyncio.FIRST_COMPLETED)
        return await drawn if drawn.done() else None
    finally:
        for task in (drawn, gone):
            task.cancel()


async def _events(
    progress: Progress, accepted: Accepted, options: ImageOptions, door: Door, event: str
) -> AsyncIterator[bytes]:
    common: dict[str, Any] = {
        "created_at": int(time.time()),
        "output_format": options.output_format or "png",
        "size": accepted.size,
        "background": "opaque",
        "quality": "auto",
    }
    index = 0
    with door:
        try:
            async with aclosing(progress):
                async for item in progress:
                    if isinstance(item, Shown):
                        more: dict[str, Any] = {
                            "partial_image_index": index,
                            "step": item.step,
                            "steps": item.num_steps,
                        }
                        yield _event(f"{event}.partial_image", {"b64_json": _text(item.picture)} | common | more)
                        index += 1
                    elif isinstance(item, Finished):
                        more = {"usage": _usage(1, accepted), "seed": item.seeds[0]}
                        yield _event(f"{event}.completed", {"b64_json": _text(item.pictures[0])} | common | more)
        except ApiError as error:
            yield _event("error", error.body)
        except RuntimeError as error:
            yield _event("error", ApiError(500, str(error), "server_error").body)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")


def _usage(count: int, accepted: Accepted) -> dict[str, Any]:
    drawn = count * accepted.num_tokens
    return {
        "input_tokens": count,
        "input_tokens_details": {"text_tokens": count, "image_tokens": 0},
        "output_tokens": drawn,
        "total_tokens": drawn + count,
    }
