"""The CUDA kernels on the CPU: loads torch.ops.lpd_emulated, chooses how threads run, and counts what kernels move.

`make emulated` builds the library; LPD_EMULATED_LIBRARY names another one. See docs/design/emulator.md.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpd_ext import ops

ORDERS = ("ascending", "descending", "random")
_DEFAULT = Path(__file__).parents[2] / "build/emulated/tests/cuda_emulation/liblpd_emulated.so"


def library_path() -> Path:
    """Returns the path of the emulated kernels, built or not."""
    return Path(os.environ.get("LPD_EMULATED_LIBRARY", _DEFAULT))


@cache
def load() -> ctypes.CDLL:
    """Load the library, which registers its operators; FileNotFoundError if it is not built."""
    path = library_path()
    if not path.exists():
        raise FileNotFoundError(f"{path} is not built: run `make emulated`")
    torch.ops.load_library(path)
    for name in ops.OPERATORS:  # torch.compile and opcheck ask for it
        fake = torch._library.simple_registry.singleton.find(f"lpd_ext::{name}").fake_impl.kernel.func
        torch.library.register_fake(f"lpd_emulated::{name}", fake)
    library = ctypes.CDLL(str(path))
    integers = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.lpd_emulator_configure.argtypes = integers
    library.lpd_emulator_start_counting.argtypes = [ctypes.c_int] + 3 * [ctypes.c_void_p]
    library.lpd_emulator_stop_counting.restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class Device:
    """The GPU that the emulator pretends to be, an A100 by default. compute_capability: 80 for 8.0."""

    compute_capability: int = 80
    multiprocessors: int = 108
    shared_limit: int = 227 * 1024


SM_80, SM_90 = Device(), Device(90, 132)
# Operators whose kernels are for devices with clusters of blocks alone.
NEED_CLUSTERS = ("residual_linear", "normed_linear")


@contextmanager
def running(order: str = "ascending", seed: int = 0, device: Device = SM_80) -> Iterator[None]:
    """Run threads and blocks in one of ORDERS on a pretended device; back to the defaults on leaving."""

    def configure(order: str, seed: int, device: Device) -> None:
        limits = device.multiprocessors, device.compute_capability, device.shared_limit
        load().lpd_emulator_configure(ORDERS.index(order), seed, *limits)

    configure(order, seed, device)
    try:
        yield
    finally:
        configure(ORDERS[0], 0, SM_80)


@contextmanager
def launches_follow() -> Iterator[None]:
    """Launches within are of one stream: one that may begin before the one before has ended is held to wait for it.

    Nothing within may write to memory that a launch before has written, but launches. To be entered within `running`.
    """
    load().lpd_emulator_follow_launches(1)
    try:
        yield
    finally:
        load().lpd_emulator_follow_launches(0)


@contextmanager
def counting(**tensors: Tensor) -> Iterator[list[dict[str, Any]]]:
    """Counts the traffic of the launches within, from and to each tensor's buffer by name, and from and to "other".

    The list is filled on leaving, one entry per launch; python_interface.cpp says what an entry holds.
    """
    library, count = load(), len(tensors)
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    names = (ctypes.c_char_p * count)(*(name.encode() for name in tensors))
    addresses = (ctypes.c_void_p * count)(*(storage.data_ptr() for storage in storages))
    sizes = (ctypes.c_int64 * count)(*(storage.nbytes() for storage in storages))
    launches: list[dict[str, Any]] = []
    library.lpd_emulator_start_counting(count, names, addresses, sizes)
    try:
        yield launches
    finally:
        launches += json.loads(library.lpd_emulator_stop_counting())
