"""How far the host runs ahead of a GPU."""

from __future__ import annotations

from collections import deque

import torch

_AHEAD = 2  # pieces of work that may wait on a GPU: whoever cancels, or looks on, is no further behind than that


class Pace:
    """Holds the host back after each piece of work it gave a GPU, until no more than a few are under way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """A piece of work was launched."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append(event)
        if len(self._under_way) > _AHEAD:
            self._under_way.popleft().synchronize()
