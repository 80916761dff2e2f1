"""Metrics for Prometheus at /metrics."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lpd_ext.engine import Engine, StepReport

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters of one service; a registry of its own, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.step_seconds = Histogram(
            "lpd_step_seconds", "Time of a decoding step", buckets=_SECONDS, registry=self.registry
        )
        self.step_images = Histogram(
            "lpd_step_images", "Images of a step", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=self.registry
        )
        self.images = Counter("lpd_images", "Images sent", registry=self.registry)
        self.request_seconds = Histogram(
            "lpd_request_seconds", "From a request to its answer", ("route",), registry=self.registry
        )
        self.answers = Counter("lpd_answers", "Answers", ("route", "status"), registry=self.registry)
        self.mean_step_seconds = 0.0  # of the last steps

    def on_step(self, report: StepReport) -> None:
        """Records a step, as `Engine(on_step=...)` calls it."""
        self.step_seconds.observe(report.seconds)
        self.step_images.observe(report.images)
        self.mean_step_seconds += (report.seconds - self.mean_step_seconds) * (0.1 if self.mean_step_seconds else 1.0)

    def watch(self, engine: Engine) -> None:
        """Adds gauges that query the engine when they are read."""
        for name, text, read in (
            ("lpd_images_running", "Images being drawn", lambda: engine.num_running),
            ("lpd_images_waiting", "Images whose turn has not come", lambda: engine.num_waiting),
            ("lpd_cache_slots", "Images that there is a KV cache for", lambda: engine.max_images),
            ("lpd_cache_bytes", "Size of the KV cache", lambda: engine.cache_bytes),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class Measured:
    """Counts and times an application's responses, by route; unknown paths are 'other'."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answers.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.perf_counter() - begun)
