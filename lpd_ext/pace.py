"""Limits how far the host runs ahead of a GPU."""

from __future__ import annotations

from collections import deque

import torch

_AHEAD = 2  # launched steps that may wait on a GPU: cancelling and previews lag behind by at most that many


class Pace:
    """Makes the host wait after each launched step until no more than a few are running."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """Records that a step was launched, and waits if too many are running."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append(event)
        if len(self._under_way) > _AHEAD:
            self._under_way.popleft().synchronize()
