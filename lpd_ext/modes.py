"""Thread-wide modes of torch: the library's own, whatever the caller has set."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_CPU = torch.device("cpu")
_forked = False  # since the library last computed in this process


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def leave_lost_threads() -> None:
    """Sets one thread in a process that was forked: OpenMP would wait for threads that do not exist in it."""
    global _forked
    if not _forked:
        return
    _forked = False
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn("a forked process computes with one thread: start it by spawn or forkserver", stacklevel=5)


def own_modes(device: torch.device = _CPU) -> AbstractContextManager[object]:
    """Disables autocast, inference mode and default devices other than the CPU; leaves gradients as they are.

    Affects this thread only. The default dtype, which affects all threads, stays and is used nowhere.
    """
    leave_lost_threads()
    return nullcontext() if _are_own(device) else _own(device)


def decoding_modes(device: torch.device) -> AbstractContextManager[object]:
    """`own_modes` without gradients; tokens are ordinary tensors, not inference tensors.

    Makes a GPU the current device, to which streams and graphs belong.
    """
    leave_lost_threads()
    return torch.no_grad() if device.type == "cpu" and _are_own(device) else _decoding(device)


def _are_own(device: torch.device) -> bool:
    """Whether the modes hold already: entering them takes 10 us, for every request and every step."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(device.type)
        or torch.get_default_device() != _CPU
    )


@contextmanager
def _own(device: torch.device) -> Iterator[None]:
    # A default device is a mode that intercepts every call, so it is set only if there is another one.
    on_cpu = nullcontext() if torch.get_default_device() == _CPU else _CPU
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), on_cpu:
        yield


@contextmanager
def _decoding(device: torch.device) -> Iterator[None]:
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_gpu, _own(device), torch.no_grad():
        yield
