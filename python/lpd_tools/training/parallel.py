"""One network in several processes: whole in each (DDP) or in parts (FSDP2), and its tensors put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lpd_tools.processes import Processes


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
