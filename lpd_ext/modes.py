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


def own_modes(device: torch.device = _CPU) -> AbstractContextManager[object]:
    """No autocast, no inference mode and no default device but the CPU; gradients are as the caller has them.

    All of it holds for this thread alone. The default dtype does not: it is not looked at anywhere.
    """
    if _forked:
        _leave_lost_threads()
    return nullcontext() if _are_own(device) else _own(device)


def decoding_modes(device: torch.device) -> AbstractContextManager[object]:
    """`own_modes`, and no gradients: the tokens are ordinary tensors all the same.

    A GPU is made the current one: streams and graphs belong to that.
    """
    if _forked:
        _leave_lost_threads()
    return torch.no_grad() if device.type == "cpu" and _are_own(device) else _decoding(device)


def _are_own(device: torch.device) -> bool:
    """Looked at first, since modes are entered for every request and every step: entering them takes 10 us."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(device.type)
        or torch.get_default_device() != _CPU
    )


@contextmanager
def _own(device: torch.device) -> Iterator[None]:
    # A default device is a mode that sees every call from then on, so it is set only over another.
    on_cpu = nullcontext() if torch.get_default_device() == _CPU else _CPU
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), on_cpu:
        yield


@contextmanager
def _decoding(device: torch.device) -> Iterator[None]:
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_gpu, _own(device), torch.no_grad():
        yield
