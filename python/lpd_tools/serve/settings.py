"""What `lpd serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.settings import AT_LEAST_ONE, Range, Settings, setting

_SECONDS = Range(0, open_low=True)


@dataclass(frozen=True)
class Serving(Settings):
    """The model, where it listens, and the limits of one request and of all together."""

    model: str = setting("", "published model, hub id, folder or weight file (the bundled model if empty)")
    tokenizer: str = setting("", "tokenizer of a model that brings none: weight file, folder or hub id")
    dtype: str = setting("", "of the transformer: float32, bfloat16, float16 or int8")
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is all of the machine's")
    port: int = setting(8000, "port to listen on; 0 takes a free one", range=Range(0, 65535))
    max_images: int = setting(8, "images drawn at once; their KV cache is taken at the start", range=AT_LEAST_ONE)
    max_waiting: int = setting(64, "images that may wait; beyond, requests are answered with 429", range=AT_LEAST_ONE)
    max_images_per_request: int = setting(10, "largest n of a request", range=AT_LEAST_ONE)
    max_body_bytes: int = setting(16 << 20, "largest body of a request", range=AT_LEAST_ONE)
    body_seconds: float = setting(30.0, "a body that takes longer to arrive is refused", range=_SECONDS)
    request_seconds: float = setting(300.0, "a request that takes longer is given up with 503", range=_SECONDS)
    shutdown_seconds: float = setting(60.0, "after SIGTERM, time for the requests that are under way", range=_SECONDS)
    api_keys: str = setting("", "file with one key a line, one of which every request must bear; empty: no keys")


@dataclass(frozen=True)
class RayServing(Serving):
    """The same of each replica, and how many there are; Ray has the address."""

    replicas: int = setting(1, "processes that draw, each with its model and cache", range=AT_LEAST_ONE)
    max_replicas: int = setting(1, "up to which more are started while images wait", range=AT_LEAST_ONE)
    cpus_per_replica: float = setting(1.0, "CPUs that a replica is counted for", range=Range(0))
    gpus_per_replica: float = setting(0.0, "GPUs that a replica is counted for", range=Range(0))
