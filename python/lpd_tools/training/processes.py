"""The processes of one training: none but this one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lpd_tools.checks import check_device

Value = TypeVar("Value")
# The others wait while the first one tests, draws and saves. When one has died, torchrun ends them all at once.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process's rank among `size`, and its device."""

    rank: int
    size: int
    device: torch.device

    def share(self, batch_size: int) -> slice:
        """This process's rows of a batch; ValueError if they cannot be shared out evenly."""
        if batch_size % self.size:
            raise ValueError(f"batch_size must be a multiple of the {self.size} processes, got {batch_size}")
        rows = batch_size // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64; the same everywhere."""
        if self.size == 1:
            return list(values)
        # NCCL adds on the GPU only.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in order of rank; of types that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, which have equally many, in order of rank: [size * n, ...]."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


@contextmanager
def processes(device: str = "") -> Iterator[Processes]:
    """Joins the processes that torchrun started (gloo on CPUs, NCCL on GPUs), if it did, and leaves them at the end.

    Where the caller has made a process group, that one is used, and left as it is.
    """
    chosen = check_device(device)
    if "LOCAL_RANK" not in os.environ:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        if ours:
            dist.destroy_process_group()


def parallelise(network: nn.Module, blocks: Sequence[nn.Module], group: Processes, parallel: str) -> nn.Module:
    """What to call instead of `network` so that gradients are means over the processes.

    "ddp": each process holds all weights. "fsdp" (FSDP2): each holds its part of every parameter, put together block
    by block while they are used; the parameters become DTensors, in place.
    """
    if group.size == 1:
        return network
    if parallel == "fsdp":
        mesh = init_device_mesh(group.device.type, (group.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        return network
    return DistributedDataParallel(network, device_ids=[group.device] if group.device.type == "cuda" else None)


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients of the backward passes inside stay in the process, to be added to those of the next one outside."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if isinstance(model, FSDPModule):
        return _unsharded_gradients(model)
    return nullcontext()


@contextmanager
def _unsharded_gradients(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts; with FSDP2 every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor as `like` is: on its device, and with FSDP2 this process's part of it."""
    value = value.to(like.device, copy=True)
    if isinstance(like, DTensor):
        # Every process has the whole tensor; nothing is sent.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value
