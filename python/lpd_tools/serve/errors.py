"""Error responses in the form that OpenAI's clients read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

INVALID = "invalid_request_error"


@dataclass
class ApiError(Exception):
    """An error response."""

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """Returns {"error": {...}}."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the exception, which would be copied by its `args`, which a dataclass does not set."""
        return type(self), (self.status, self.message, self.kind, self.param, self.code, self.headers)

    def response(self) -> JSONResponse:
        """Returns the error as a response."""
        return JSONResponse(self.body, self.status, self.headers)


def overloaded(message: str, seconds: float) -> ApiError:
    """Returns a 429 error: retry after so many seconds."""
    headers = {"Retry-After": str(max(1, round(seconds)))}
    return ApiError(429, message, "rate_limit_error", code="server_overloaded", headers=headers)


def unavailable(message: str) -> ApiError:
    """Returns a 503 error, without a time to retry."""
    return ApiError(503, message, "server_error", code="unavailable")


async def answer_api_error(_: Request, error: Exception) -> JSONResponse:
    """Handles `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_invalid(_: Request, error: Exception) -> JSONResponse:
    """Handles requests that do not fit the schema: 400, with the name of the first wrong field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "extra_forbidden":
        message = f"Unknown parameter: {where[-1]!r}"
    else:
        message = f"{'.'.join(where) or 'body'}: {first['msg']}"
    return ApiError(400, message, param=where[0] if where else None).response()


async def answer_http(_: Request, error: Exception) -> JSONResponse:
    """Handles unknown paths and methods."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()


async def answer_unforeseen(_: Request, error: Exception) -> JSONResponse:
    """Handles unexpected errors of the server, which its log describes."""
    return ApiError(500, "the server made a mistake; its log says which", "server_error").response()
