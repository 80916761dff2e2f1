"""Settings and sockets of the servers."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from lpd_tools.settings import AT_LEAST_ONE, Range, Settings, setting


@dataclass(frozen=True)
class Listening(Settings):
    """The model that a server draws by, its address, and how many images it draws and holds."""

    model: str = setting(
        "", "bundled or published model, hub id, folder or weight file (the default bundled one if empty)"
    )
    tokenizer: str = setting("", "tokenizer for a model without one: weight file, folder or hub id")
    dtype: str = setting("", "of the transformer: float32, bfloat16, float16 or int8")
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all interfaces")
    port: int = setting(8000, "port to listen on; 0 takes a free one", range=Range(0, 65535))
    max_images: int = setting(8, "images drawn at once; their KV cache is taken at the start", range=AT_LEAST_ONE)
    max_waiting: int = setting(64, "images that may wait; beyond, requests are refused", range=AT_LEAST_ONE)


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket; ValueError if the address cannot be used, with the reason."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise ValueError(f"cannot listen on host {host!r}, port {port}: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen on host {host!r}, port {port}: {error.strerror or error}") from None
    return bound
