"""Cancelling what runs: an event, or a callable, that is asked between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """What `threading.Event` and its kin have."""

    def is_set(self) -> bool:
        """Whether to stop."""


Cancel = Event | Callable[[], object]


def as_check(cancel: Cancel | None) -> Callable[[], bool]:
    """A function that says whether to stop; TypeError for anything but None, an event or a callable."""
    if cancel is None:
        return lambda: False
    is_set = getattr(cancel, "is_set", cancel)
    if not callable(is_set):
        raise TypeError(f"cancel must be an event such as threading.Event, or a callable, got {cancel!r}")
    return lambda: bool(is_set())
