"""Memory of a decode: caches and results, allocated once and reused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lpd_ext import _C


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty that asks for huge pages on a CPU: a page fault then maps 2 MB instead of 4 KB."""
    memory = torch.empty(tuple(shape), dtype=dtype, device=device)
    if memory.device.type == "cpu":
        _C.prefer_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def available(root: Path = Path("/")) -> int | None:
    """Returns the bytes that can be allocated without swapping, within the container's limit; None if unknown."""
    found = []
    with suppress(OSError, KeyError, ValueError):
        found.append(1024 * _numbers(root / "proc/meminfo")["MemAvailable"])
    group = root / "sys/fs/cgroup"
    with suppress(OSError, KeyError, ValueError):  # memory.max says "max" where there is no limit
        limit, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - taken + _numbers(group / "memory.stat")["inactive_file"]))
    return min(found, default=None)


def _numbers(file: Path) -> dict[str, int]:
    """Parses lines of the form "name: number" into a dict."""
    words = (line.replace(":", " ").split() for line in file.read_text(encoding="utf-8").splitlines())
    return {name: int(number) for name, number, *_ in words}
