"""The processes of one run: none but this one, or those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lpd_tools.checks import check_device
from lpd_tools.launch import place

Value = TypeVar("Value")
# The others wait while the first one tests, draws and saves. When one has died, torchrun ends them all at once.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process's rank among `size`, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which does what is done once."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def share(self, batch_size: int) -> slice:
        """Returns this process's rows of a batch; ValueError if they cannot be shared out evenly."""
        if batch_size % self.size:
            raise ValueError(f"batch_size must be a multiple of the {self.size} processes, got {batch_size}")
        rows = batch_size // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64, with the same result on each."""
        if self.size == 1:
            return list(values)
        # NCCL adds on the GPU only.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, value: Value) -> list[Value]:
        """Returns the values of all processes, in order of rank; they must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Returns the rows [n, ...] of all processes, in order of rank: [size * n, ...]; all must have n."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


@contextmanager
def processes(device: str = "", backend: str = "", patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Joins the processes that torchrun started, if any, and leaves them at the end.

    backend: empty for NCCL on GPUs and gloo on CPUs. Each process takes the GPU of its own number, unless `device`
    names one by its index and the backend is gloo: NCCL needs one GPU per process. A process group that the caller has
    made is used and left as it is.
    """
    chosen = check_device(device)
    here = place()
    if not here.launched:
        yield Processes(0, 1, chosen)
        return
    backend = backend or ("nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cuda":
        if chosen.index is None or backend == "nccl":
            chosen = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(chosen)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group(backend, timeout=patience)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        if ours:
            dist.destroy_process_group()
