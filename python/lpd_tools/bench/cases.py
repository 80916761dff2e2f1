"""The operators at the shapes of a named model and step, each with its baseline in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpd_ext import ops, reference
from lpd_ext.model import LPDConfig
from lpd_ext.plan import Step, plan_decoding
from lpd_ext.schedule import group_sizes
from lpd_tools.bench.timing import CALLS_PER_GRAPH


@dataclass(frozen=True)
class Shape:
    """A published model and schedule, and the step whose operators are timed."""

    grid: tuple[int, int]
    steps: int
    step: int
    guidance_scale: float
    repulsion_threshold: int

    @property
    def config(self) -> LPDConfig:
        return LPDConfig.preset("lpd_l", self.grid)

    @property
    def group_sizes(self) -> list[int]:
        return group_sizes(self.grid[0] * self.grid[1], self.steps)


SHAPES = {"L-256-20": Shape((16, 16), 20, 15, 4.8, 2), "L-512-48": Shape((32, 32), 48, 30, 7.3, 4)}


@dataclass(frozen=True)
class Case:
    """One operator at one shape: our kernel, its baseline, and the bytes and operations that a call needs."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any]
    gigabytes: float = 0.0
    gigaflops: float = 0.0
    plain_in_graph: bool = True  # False: the twin waits for the device
    calls: int = CALLS_PER_GRAPH


def cases(shape: Shape, step_index: int, batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Returns every operator on random data for B images with guidance."""
    torch.manual_seed(0)
    config = shape.config
    width, heads, head_dim, vocab, num_tokens = (
        config.dim,
        config.heads,
        config.head_dim,
        config.vocab_size,
        config.num_tokens,
    )
    plan = plan_decoding([shape.group_sizes] * batch, [True] * batch, num_tokens, device)
    step: Step = plan.steps[step_index]
    rows, sequences = step.num_context_rows + step.num_query_rows, plan.capacity.sequences
    element = torch.finfo(dtype).bits // 8

    def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    x, delta = random(rows, width, dtype=torch.float32), random(rows, width) * 1e-3
    weight, bias = random(width), random(width)
    content, positions = random(vocab + 1002, width), random(1 + num_tokens, width)
    content_ids = torch.randint(vocab, (rows,), device=device)
    position_ids = torch.randint(1 + num_tokens, (rows,), device=device)
    qkv = random(rows, 3, heads, head_dim)
    k_cache = random(sequences, heads, plan.capacity.cache_positions, head_dim)
    v_cache = random(*k_cache.shape)
    workspace = ops.group_attention_workspace(head_dim, device)
    sizes = (step.max_rows, step.max_keys, 0, head_dim**-0.5, workspace)
    logits = random(step.num_query_rows, vocab) * 3
    drawn = len(step.image)
    full, ids = torch.ones(drawn, device=device), torch.arange(drawn, device=device)
    sampling = (logits, step.conditional_row, step.unconditional_row, full * shape.guidance_scale, full)
    filters = ((full * 900).int(), full * 0.95)
    columns = num_tokens + 2
    table = torch.arange(columns, device=device).clamp(max=num_tokens).repeat(sequences, 1)
    contents, grid = table.clone(), table[:batch, :num_tokens].clone()
    places = (step.image, step.token_index, step.write_index, step.twin_index)
    guidance = torch.full((batch, num_tokens), shape.guidance_scale, device=device)
    by_image = (guidance, torch.ones(batch, device=device), None, None, torch.arange(batch, device=device))
    drawing = (*sampling[:3], *places, *by_image, table, contents, grid)
    sizes_on_device = torch.tensor(shape.group_sizes, dtype=torch.int32, device=device)
    seeds = torch.arange(batch, device=device)
    orders = (sizes_on_device, *shape.grid, 1.0, shape.repulsion_threshold, seeds)

    _, num_context, _, num_query, cached, _ = step.segments[0].tolist()
    end = cached + num_context
    per_sequence = num_context * end + num_query * (end + num_query)
    at = torch.arange(cached, end + num_query, device=device)
    seen = torch.zeros(num_context + num_query, end + num_query, dtype=dtype, device=device)
    seen[:num_context, end:] = float("-inf")
    plain_shape = (sequences, heads, 1 + num_tokens, head_dim)
    k_plain, v_plain = random(*plain_shape), random(*plain_shape)
    moved = 4 * (num_context + num_query) + 2 * num_context + 2 * cached  # rows of D: q, out, new and appended K, V
    return [
        Case(
            "group_attention",
            lambda: ops.group_attention(qkv, k_cache, v_cache, step.segments, *sizes),
            lambda: two_calls(qkv, k_cache, v_cache, num_context, num_query, cached),
            gigabytes=1e-9 * element * sequences * width * moved,
            gigaflops=4e-9 * sequences * width * per_sequence,
        ),
        Case(
            "attention, dense mask",
            lambda: ops.group_attention(qkv, k_cache, v_cache, step.segments, *sizes),
            lambda: masked_call(qkv, k_plain, v_plain, at, seen),
            gigaflops=4e-9 * sequences * width * per_sequence,
        ),
        Case(
            "append_kv",
            lambda: ops.append_kv(qkv, k_cache, v_cache, step.segments, step.max_rows),
            lambda: append_by_index(qkv, k_cache, v_cache, num_context, cached),
            gigabytes=4e-9 * element * step.num_context_rows * width,
        ),
        Case(
            "residual_layer_norm",
            lambda: ops.residual_layer_norm(x, delta, weight, bias),
            lambda: reference.residual_layer_norm(x, delta, weight, bias),
            gigabytes=1e-9 * rows * width * (8 + 2 * element),
        ),
        Case(
            "embed_rows",
            lambda: ops.embed_rows(content_ids, position_ids, content, positions, weight, bias),
            lambda: reference.embed_rows(content_ids, position_ids, content, positions, weight, bias),
            gigabytes=1e-9 * rows * width * (4 + 2 * element),
        ),
        Case(
            "sample_tokens",
            lambda: ops.sample_tokens(*sampling, None, None, ids, ids),
            lambda: sort_based(*sampling, None, None),
            gigabytes=1e-9 * element * logits.numel(),
        ),
        Case(
            "  k 900, p 0.95",
            lambda: ops.sample_tokens(*sampling, *filters, ids, ids),
            lambda: sort_based(*sampling, 900, 0.95),
            gigabytes=1e-9 * element * logits.numel(),
        ),
        Case(
            "sample_step",
            lambda: ops.sample_step(*drawing),
            lambda: sort_and_write(*drawing),
            gigabytes=1e-9 * element * logits.numel(),
        ),
        Case(
            "locality_order",
            lambda: ops.locality_order(*orders),
            lambda: reference.locality_order(*orders),
            plain_in_graph=False,
        ),
    ]


def append_by_index(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, num_context: int, cached: int) -> None:
    """Writes the context rows' K and V of equal segments to the cache."""
    sequences = len(k_cache)
    context = qkv[: sequences * num_context].unflatten(0, (sequences, num_context))
    _, k, v = context.permute(2, 0, 3, 1, 4)
    k_cache[:, :, cached : cached + num_context], v_cache[:, :, cached : cached + num_context] = k, v


def two_calls(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, num_context: int, num_query: int, cached: int) -> Tensor:
    """Baseline of a careful user: for equal segments, writes the cache, then one SDPA call per kind of row."""
    sequences = len(k_cache)
    context, query = qkv.split([sequences * num_context, sequences * num_query])
    q1, k1, v1 = context.unflatten(0, (sequences, num_context)).permute(2, 0, 3, 1, 4)
    q2, k2, v2 = query.unflatten(0, (sequences, num_query)).permute(2, 0, 3, 1, 4)
    end = cached + num_context
    k_cache[:, :, cached:end], v_cache[:, :, cached:end] = k1, v1
    attend = torch.nn.functional.scaled_dot_product_attention
    first = attend(q1, k_cache[:, :, :end], v_cache[:, :, :end])
    second = attend(q2, torch.cat([k_cache[:, :, :end], k2], 2), torch.cat([v_cache[:, :, :end], v2], 2))
    return torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in (first, second)])


def masked_call(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor, seen: Tensor) -> Tensor:
    """Baseline of the published code: writes all rows' K and V by index, then one SDPA call with a dense mask."""
    sequences, keys = len(k_cache), seen.shape[1]
    q, k, v = qkv.unflatten(0, (sequences, len(at))).permute(2, 0, 3, 1, 4)
    k_cache[:, :, at], v_cache[:, :, at] = k, v
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k_cache[:, :, :keys], v_cache[:, :, :keys], attn_mask=seen).transpose(1, 2).flatten(2)


def sort_and_write(
    logits: Tensor,
    c_row: Tensor,
    u_row: Tensor,
    image: Tensor,
    n: Tensor,
    write: Tensor,
    twin: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    k: None,
    p: None,
    seeds: Tensor,
    positions: Tensor,
    contents: Tensor,
    grid: Tensor,
) -> None:
    """Baseline of a guided step: gathers the settings, draws as `sort_based`, and writes to the tables by index."""
    tokens = sort_based(logits, c_row, u_row, guidance[image, n], temperature[image], k, p).squeeze(-1)
    contents.view(-1)[write], contents.view(-1)[twin] = tokens, tokens
    grid[image, positions.view(-1)[write] - 1] = tokens


def sort_based(
    logits: Tensor, c_row: Tensor, u_row: Tensor, guidance: Tensor, temperature: Tensor, k: int | None, p: float | None
) -> Tensor:
    """Baseline of sampling: mix, temperature, topk threshold, sorted cumulative softmax, draw."""
    c, u = logits[c_row].float(), logits[u_row].float()
    x = (u + guidance[:, None] * (c - u)) / temperature[:, None]
    if k is not None:
        x = x.masked_fill(x < x.topk(k).values[:, -1:], float("-inf"))
    if p is not None:
        ordered, ids = x.sort(descending=True)
        removed = ordered.softmax(-1).cumsum(-1) > p
        removed = torch.cat([torch.zeros_like(removed[:, :1]), removed[:, :-1]], dim=1)
        x = x.masked_fill(removed.scatter(1, ids, removed), float("-inf"))
    probabilities = x.softmax(-1)
    if probabilities.is_cuda:  # torch.multinomial waits for the device; this is the usual way around it
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
    return probabilities.multinomial(1)
