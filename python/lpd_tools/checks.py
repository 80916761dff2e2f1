"""Checks of command-line arguments before any work, and of numbers before they are used."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def check_output(path: Path, *suffixes: str, name: str = "output") -> None:
    """Raises ValueError unless a file of one of the suffixes can be written at `path`; creates its folder."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file, but {str(path)!r} is a directory")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{name} must end in {' or '.join(suffixes)}, got {str(path)!r}")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{name} is {str(path)!r}, but {str(parent)!r} is no directory that can be written to")


def check_seeds(seed: int, count: int) -> list[int]:
    """Returns the seeds seed, seed + 1, ... of `count` images; ValueError unless all are signed 64-bit integers."""
    if not -(2**63) <= seed <= 2**63 - count:
        raise ValueError(f"seed must be in [{-(2**63)}, {2**63 - count}] for {count} images, got {seed}")
    return list(range(seed, seed + count))


def check_device(name: str) -> torch.device:
    """Returns the device of that name (empty: cuda if there is one, else cpu); ValueError if torch cannot use it."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    allowed = ["cuda", *devices] if len(devices) > 1 else devices
    if name and name not in allowed:
        raise ValueError(f"device must be one of {', '.join(allowed)} here, got {name!r}")
    return torch.device(name or allowed[0])


def check_finite(values: Tensor, name: str) -> None:
    """Raises ValueError with the first bad row unless every number of values [n, ...] is finite."""
    strange = (~values.isfinite()).flatten(1).any(1).nonzero()
    if len(strange):
        raise ValueError(f"{name} must be finite, but row {int(strange[0])} of {len(values)} has NaN or inf")
