"""Checks every request before a route sees it: size and speed of its body, and a key."""

from __future__ import annotations

import asyncio
import hmac
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lpd_tools.serve.errors import ApiError

OPEN_PATHS = ("/health", "/ready")  # for load balancers, which have no keys


def read_keys(path: str) -> list[bytes]:
    """Reads the keys of a file, one per line; ValueError if there is none."""
    if not path:
        return []
    keys = [line.strip().encode() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"api_keys must name a file with one key a line, got {path!r}, which has none")
    return keys


class Limits:
    """Reads the whole body, bounded in bytes and time, and checks the bearer key before that."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, keys: list[bytes]) -> None:
        self.app, self.max_bytes, self.seconds, self.keys = app, max_bytes, seconds, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await asyncio.wait_for(self._read(scope, receive), self.seconds)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except asyncio.TimeoutError:
            too_slow = ApiError(408, f"the request's body did not arrive within {self.seconds:g} seconds")
            too_slow.headers["Connection"] = "close"
            await too_slow.response()(scope, receive, send)
            return
        if body is None:
            return  # the client has left
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        if not self.keys or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # Every key is compared in constant time, so that the time reveals nothing.
        right = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        if scheme.lower() != b"bearer" or not any(right):
            raise ApiError(
                401,
                "Incorrect or missing API key: send it as 'Authorization: Bearer <key>'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", "Connection": "close"},  # the body is not read
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        too_long = ApiError(413, f"the request's body must have at most {self.max_bytes} bytes")
        too_long.headers["Connection"] = "close"
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > self.max_bytes:
            raise too_long
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise too_long
            if not message.get("more_body", False):
                return bytes(body)
