"""One network in several processes, replicated (DDP) or sharded (FSDP2), and gathering its tensors."""

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
    """Returns the module to call instead of `network`, so that gradients are means over the processes.

    "ddp": each process holds all weights. "fsdp" (FSDP2): each holds a shard of every parameter, gathered block by
    block while in use; the parameters become DTensors, in place.
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
    """Keeps the gradients of the backward passes inside local, to be reduced with those of the next one outside."""
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
    """Gathers a tensor; with FSDP2 every process must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """Copies a whole tensor to the form of `like`: on its device, and with FSDP2 only this process's shard."""
    value = value.to(like.device, copy=True)
    if isinstance(like, DTensor):
        # Every process has the whole tensor, so nothing is sent.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value
