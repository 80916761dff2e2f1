"""The processes of a run that `torchrun` started; one process where it was not used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lpd_tools.checks import check_device

# The quickest process waits for the slowest one, for as long as that draws.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()


def own_device(name: str, group: Processes) -> torch.device:
    """The device of that name; for an empty one this process's own GPU, or the CPU where there is none."""
    return check_device(name or (f"cuda:{group.local_rank}" if torch.cuda.is_available() else ""))


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun's environment variables tell of, joined over gloo while the block runs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if own:
            dist.destroy_process_group()
