"""Serves the application on a socket until told to stop."""

from __future__ import annotations

import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from lpd_ext.pipeline import LPDPipeline
from lpd_tools.console import say
from lpd_tools.serve.app import Door, create_app
from lpd_tools.serve.metrics import Measured
from lpd_tools.serve.service import ImageService
from lpd_tools.serve.settings import Serving
from lpd_tools.serve.slow_heads import impatient


class DrainingServer(uvicorn.Server):
    """Shuts down gracefully: SIGTERM or SIGINT lets running requests finish and refuses others; a second one ends them.

    Then it returns, instead of dying of the signal.
    """

    def __init__(self, config: uvicorn.Config, door: Door, patience: float) -> None:
        super().__init__(config)
        self.door, self.patience = door, patience
        self.deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.door.closed:
            self.should_exit = self.force_exit = True
            return
        self.deadline = time.monotonic() + self.patience
        self.door.closed = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self.door.closed and (not self.door.inside or time.monotonic() > self.deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def run(pipe: LPDPipeline, name: str, config: Serving, bound: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT. Raises OSError or ValueError for the file of keys."""
    service, door = ImageService(pipe, name, config), Door()
    try:
        app = Measured(create_app(service, config, door), metrics=service.figures)
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 5}
        settings = uvicorn.Config(app, http=impatient(config.body_seconds), **options)
        say(f"{name}: {service.size} pixels, {config.max_images} images at once")
        say(f"KV cache: {service.engine.cache_bytes / 1e6:.1f} MB")
        say("listening on http://{}:{}/v1/images/generations".format(*bound.getsockname()[:2]))
        DrainingServer(settings, door, config.shutdown_seconds).run(sockets=[bound])
    finally:
        service.engine.close(finish=False)
