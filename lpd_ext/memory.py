"""Memory of a decode: caches and results, taken once and written throughout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lpd_ext import _C


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; large memory on a CPU is asked to lie on huge pages: a fault brings 2 MB then, instead of 4 KB."""
    memory = torch.empty(tuple(shape), dtype=dtype, device=device)
    if memory.device.type == "cpu":
        _C.prefer_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def available(root: Path = Path("/")) -> int | None:
    """Bytes that may still be taken without swapping, within the limit of the container; None where none can tell."""
    found = []
    with suppress(OSError, KeyError, ValueError):
        found.append(1024 * _numbers(root / "proc/meminfo")["MemAvailable"])
    group = root / "sys/fs/cgroup"
    with suppress(OSError, KeyError, ValueError):  # memory.max says "max" where there is no limit
        limit, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - taken + _numbers(group / "memory.stat")["inactive_file"]))
    return min(found, default=None)


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line by the word before it."""
    words = (line.replace(":", " ").split() for line in file.read_text(encoding="utf-8").splitlines())
    return {name: int(number) for name, number, *_ in words}
