"""Settings of `lpd serve`."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.listening import Listening
from lpd_tools.settings import AT_LEAST_ONE, Range, setting

_SECONDS = Range(0, open_low=True)


@dataclass(frozen=True)
class Serving(Listening):
    """Settings of the server and the limits of one request."""

    max_images_per_request: int = setting(10, "largest n of a request", range=AT_LEAST_ONE)
    max_body_bytes: int = setting(16 << 20, "largest body of a request", range=AT_LEAST_ONE)
    body_seconds: float = setting(30.0, "timeout for receiving a request's head or body", range=_SECONDS)
    request_seconds: float = setting(300.0, "timeout of a request, answered with 503", range=_SECONDS)
    shutdown_seconds: float = setting(60.0, "grace period for running requests after SIGTERM", range=_SECONDS)
    api_keys: str = setting("", "file with one API key a line; empty: no authentication")


@dataclass(frozen=True)
class RayServing(Serving):
    """The settings of each replica, and the number of replicas; Ray has the address."""

    replicas: int = setting(1, "processes that draw, each with its model and cache", range=AT_LEAST_ONE)
    max_replicas: int = setting(1, "most replicas to scale to while images wait", range=AT_LEAST_ONE)
    cpus_per_replica: float = setting(1.0, "CPUs that a replica is counted for", range=Range(0))
    gpus_per_replica: float = setting(0.0, "GPUs that a replica is counted for", range=Range(0))
