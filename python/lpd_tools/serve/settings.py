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
    body_seconds: float = setting(30.0, "a head or a body that takes longer to arrive is refused", range=_SECONDS)
    request_seconds: float = setting(300.0, "a request that takes longer is given up with 503", range=_SECONDS)
    shutdown_seconds: float = setting(60.0, "after SIGTERM, time for the requests that are under way", range=_SECONDS)
    api_keys: str = setting("", "file with one key a line, one of which every request must bear; empty: no keys")


@dataclass(frozen=True)
class RayServing(Serving):
    """The settings of each replica, and the number of replicas; Ray has the address."""

    replicas: int = setting(1, "processes that draw, each with its model and cache", range=AT_LEAST_ONE)
    max_replicas: int = setting(1, "up to which more are started while images wait", range=AT_LEAST_ONE)
    cpus_per_replica: float = setting(1.0, "CPUs that a replica is counted for", range=Range(0))
    gpus_per_replica: float = setting(0.0, "GPUs that a replica is counted for", range=Range(0))
