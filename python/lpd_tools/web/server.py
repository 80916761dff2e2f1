"""Serves the page on a socket until told to stop, with everything it needs: it works offline."""

from __future__ import annotations

import os
import socket
import tempfile
from types import FrameType

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lpd_ext.pipeline import LPDPipeline
from lpd_tools.console import say
from lpd_tools.models import carried_names
from lpd_tools.web.page import build_page
from lpd_tools.web.settings import Demo
from lpd_tools.web.studio import Studio

_MAX_UPLOAD = "32mb"
# Gradio shows few pictures of a gallery as large ones, and one line of what they carry.
_STYLE = """
#gallery .grid-wrap { max-height: 400px; padding-top: 36px }
#gallery .grid-wrap img { height: 96px !important; margin-bottom: 60px; object-fit: contain }
#gallery .grid-container { grid-template: none / repeat(auto-fill, 160px) !important; grid-auto-rows: 160px !important }
#gallery .caption-label { max-width: 100%; white-space: normal; font-size: 10px }
"""
# Gradio's scripts are partly inline; pixels of the editor travel as blob: and data:. No other host is named.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:"
)


class SameHostOnly:
    """Adds a header that forbids browsers to contact other hosts, whatever a page contains."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and adds the header to the response."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = _POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


class StoppingServer(uvicorn.Server):
    """Returns after SIGTERM or SIGINT instead of dying of it, even while pages are open."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.force_exit = self.should_exit
        self.should_exit = True


def create_app(studio: Studio) -> FastAPI:
    """Creates the application of a studio."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(SameHostOnly)
    gr.mount_gradio_app(
        app,
        build_page(studio),
        path="/",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=_MAX_UPLOAD,
    )
    return app


def run(pipe: LPDPipeline, name: str, config: Demo, bound: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then deletes the pictures that Gradio wrote to files."""
    of_model = carried_names(config.model, config.tokenizer, config.dtype)
    with (
        tempfile.TemporaryDirectory(prefix="lpd_demo_") as folder,
        Studio(pipe, name, config.max_images, config.max_waiting, of_model) as studio,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder
        settings = uvicorn.Config(
            create_app(studio), log_level="critical", access_log=False, timeout_graceful_shutdown=1
        )
        height, width = studio.size
        say(f"{name}: {width}x{height} pixels, {config.max_images} images at once")
        say(f"KV cache: {studio.engine.cache_bytes / 1e6:.1f} MB")
        bound.listen()  # whoever opens the page at once waits until it is served, and is not refused
        say("open http://{}:{}/ in a browser".format(*bound.getsockname()[:2]))
        StoppingServer(settings).run(sockets=[bound])
