"""Times attention of the teacher-forced pass, forward and backward, against plain torch, and a whole block of it.

FLOPs are counted as 4 D per pair of a row and a key that it sees, and 10 D for the gradient: what an implementation
that keeps no probabilities needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.model import Block
from lpd_ext.training_attention import Visibility, attend
from lpd_ext.visibility import training_mask
from lpd_tools.bench.cases import Shape
from lpd_tools.bench.result import Result
from lpd_tools.bench.timing import Times, interleaved
from lpd_tools.bench.training_slices import SlicedAttention, slices

CPU = torch.device("cpu")
OURS, DENSE, SLICED, PRODUCTS = "training_attention", "SDPA mask", "SDPA slices", "products"
_PEAK_SIDE = 2048  # of the matrices whose product shows the processor's pace
Attention = Callable[[Tensor], Tensor]


def attentions(group_sizes: list[int]) -> dict[str, Attention]:
    """Returns every way to compute the attention: qkv [B, rows, 3, H, D] -> [B, rows, H * D]."""
    mask = training_mask(group_sizes)
    like = torch.empty(0)
    parts = slices(group_sizes)

    def sliced(qkv: Tensor) -> Tensor:
        attended: Tensor = SlicedAttention.apply(qkv, parts)
        return attended

    def products(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        attended: Tensor = scores.masked_fill_(~mask, float("-inf")).softmax(-1) @ v
        return attended.transpose(1, 2).flatten(2)

    return {
        OURS: partial(attend, visibility=Visibility.of(group_sizes, True, like)),
        DENSE: partial(attend, visibility=Visibility(mask=mask)),
        SLICED: sliced,
        PRODUCTS: products,
    }


def time_training(shape: Shape, batch: int, repeats: int) -> list[Result]:
    """Times every attention, and a block with each."""
    config, sizes = shape.config, shape.group_sizes
    mask = training_mask(sizes)
    torch.manual_seed(0)
    x = torch.randn(batch, len(mask), config.dim)
    qkv = torch.randn(batch, len(mask), 3, config.heads, config.head_dim)
    block = Block(config)
    ways = attentions(sizes)
    # The forward pass alone, then with the gradient; a square product before and after, for the processor's pace.
    a, b = torch.randn(2, _PEAK_SIDE, _PEAK_SIDE)
    runs: list[Callable[[], object]] = [lambda: a @ b]
    for way in ways.values():
        runs += [partial(way, qkv), partial(_forward_backward, way, qkv)]
    runs += [partial(_forward_backward, partial(call_block, block, attention=way), x) for way in ways.values()]
    product, *times = interleaved(runs, repeats, CPU, warm_up=1)
    peak = 2 * _PEAK_SIDE**3 / product.median
    results = []
    flops = 14 * batch * config.dim * int(mask.sum())
    whole = dict(zip(ways, times[1 : 2 * len(ways) : 2], strict=True))
    for i, name in enumerate(ways):
        forward, both = times[2 * i].median, whole[name].median
        memory = peak_bytes(partial(_forward_backward, ways[name], qkv))
        note = (
            f"forward {1e3 * forward:.1f} ms; {1e-9 * flops / both:.0f} GFLOP/s of what is needed, "
            f"{flops / both / peak:.0%} of a square product's {1e-9 * peak:.0f}; memory at its peak "
            f"{1e-6 * memory:.0f} MB"
        )
        results.append(Result.against(name, whole[name], _baselines(whole), note=note, peak_bytes=memory))
    blocks = dict(zip(ways, times[2 * len(ways) :], strict=True))
    for name in ways:
        memory = peak_bytes(partial(_forward_backward, partial(call_block, block, attention=ways[name]), x))
        note = f"memory at its peak {1e-6 * memory:.0f} MB"
        results.append(Result.against(f"block, {name}", blocks[name], _baselines(blocks), note=note, peak_bytes=memory))
    return results


def call_block(block: Block, x: Tensor, attention: Attention) -> Tensor:
    """Runs Block.forward in training with another attention."""
    attended = attention(block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)))
    x = x + block.attn.proj(attended)
    hidden: Tensor = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return hidden


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the peak of tensor bytes that a run allocates, including the operators' workspaces."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # With acc_events, as torch 2.10 warns without it that events of an earlier cycle would be lost.
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _forward_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    output = function(leaf)
    output.backward(x.flatten(2)[..., : output.shape[-1]].contiguous())
    assert leaf.grad is not None
    return leaf.grad


def _baselines(times: dict[str, Times]) -> dict[str, Times]:
    return {name: times[name] for name in (DENSE, SLICED, PRODUCTS)}
