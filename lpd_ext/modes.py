"""What a caller may have set for its whole thread, and what the library computes with all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def own_modes(device: torch.device = _CPU) -> Iterator[None]:
    """No autocast, no inference mode and no default device but the CPU; gradients are as the caller has them.

    All of it holds for this thread alone. The default dtype does not: it is not looked at anywhere.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {_CPU.type, device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        yield


@contextmanager
def decoding_modes(device: torch.device) -> Iterator[None]:
    """`own_modes`, and no gradients: the tokens are ordinary tensors all the same.

    A GPU is made the current one: streams and graphs belong to that.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(own_modes(device))
        stack.enter_context(torch.no_grad())
        yield
