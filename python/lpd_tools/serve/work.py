"""Messages between the routes and a backend, here or in another process: work, and pictures."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from lpd_tools.serve.schemas import Edit, Generation


@dataclass(frozen=True)
class Work:
    """A generation, or an edit with its files."""

    options: Generation | Edit
    image: bytes | None = None
    mask: bytes | None = None


@dataclass(frozen=True)
class Accepted:
    """Work that will be drawn, with the format of its pictures."""

    size: str  # 256x256
    num_tokens: int


@dataclass(frozen=True)
class Shown:
    """A picture file of an image that is not finished."""

    picture: bytes
    step: int
    num_steps: int


@dataclass(frozen=True)
class Finished:
    """The picture files, and the seeds that draw them again."""

    pictures: list[bytes]
    seeds: list[int]


Progress = AsyncGenerator[Accepted | Shown | Finished, None]


class Backend(Protocol):
    """Draws: `draw` yields one `Accepted`, the previews, one `Finished`, or raises ApiError; leaving it cancels."""

    def draw(self, work: Work) -> Progress:
        """Draws the work."""

    async def describe(self) -> dict[str, Any]:
        """Returns an entry of `GET /v1/models`."""

    async def ready(self) -> bool:
        """Whether the backend takes work."""

    async def metrics(self) -> bytes:
        """Returns metrics for Prometheus."""
