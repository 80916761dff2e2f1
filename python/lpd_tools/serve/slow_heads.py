"""Gives up connections whose request line and headers do not arrive in time, for which uvicorn waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from lpd_tools.serve.errors import ApiError


def impatient(seconds: float) -> type[asyncio.Protocol]:
    """Returns uvicorn's HTTP protocol with that limit for the line and headers of a request."""

    class ImpatientProtocol(H11Protocol):
        def __init__(self, *args: Any, **options: Any) -> None:  # for each connection
            super().__init__(*args, **options)
            self._has_begun = False
            self._deadline: asyncio.TimerHandle | None = self.loop.call_later(seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            self._has_begun, before = True, self.cycle
            super().data_received(data)
            between = self.cycle is None or self.cycle.response_complete  # no request is being answered
            if self.cycle is not before or not between:
                self._forget()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            is_body = self.cycle is not None and self.cycle.more_body  # of a request that was answered before it came
            # A connection without a byte was made ahead, as browsers do.
            if self._has_begun and not is_body and not self.transport.is_closing():
                error = ApiError(408, f"the request's head did not arrive within {seconds:g} seconds").response()
                headers = b"".join(b"%b: %b\r\n" % header for header in error.raw_headers)
                status = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n"
                self.transport.write(status + headers + b"\r\n" + bytes(error.body))
            self.transport.close()

    return ImpatientProtocol
