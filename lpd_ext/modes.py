"""What a caller may have set for its whole thread, and what the library computes with all the same."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_CPU = torch.device("cpu")
_forked = False  # since something was last computed here


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _leave_lost_threads() -> None:
    """One thread in a process that was forked: OpenMP would wait for those that stayed behind."""
    global _forked
    _forked = False
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn("a forked process computes with one thread: start it by spawn or forkserver", stacklevel=5)


def _no_default_device() -> AbstractContextManager[object]:
    return nullcontext() if torch.get_default_device() == _CPU else _CPU


@contextmanager
def own_modes(device: torch.device = _CPU) -> Iterator[None]:
    """No autocast, no inference mode and no default device but the CPU; gradients are as the caller has them.

    All of it holds for this thread alone. The default dtype does not: it is not looked at anywhere.
    """
    if _forked:
        _leave_lost_threads()
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), _no_default_device():
        yield


@contextmanager
def decoding_modes(device: torch.device) -> Iterator[None]:
    """`own_modes`, and no gradients: the tokens are ordinary tensors all the same.

    A GPU is made the current one: streams and graphs belong to that. Not by way of `own_modes`: entered at every step.
    """
    if _forked:
        _leave_lost_threads()
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with (
        on_gpu,
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        _no_default_device(),
    ):
        yield
