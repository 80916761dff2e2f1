"""Cancellation: an event or a callable, polled between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """An object with `is_set`, such as `threading.Event`."""

    def is_set(self) -> bool:
        """Returns True to stop."""


Cancel = Event | Callable[[], object]


def as_check(cancel: Cancel | None) -> Callable[[], bool]:
    """Returns a function that returns True to stop; TypeError unless given None, an event or a callable."""
    if cancel is None:
        return lambda: False
    is_set = getattr(cancel, "is_set", cancel)
    if not callable(is_set):
        raise TypeError(f"cancel must be an event such as threading.Event, or a callable, got {cancel!r}")
    return lambda: bool(is_set())
