"""LPD decoding in plain torch, written like research code: the baselines of the end-to-end benchmark.

`decode_plain` does, operation for operation, what published implementations do: one dense float mask over all
positions, indexed anew in each step; a KV cache zeroed per call and written by index; SDPA with that mask; sort-based
filters. The linear layers, GELU and LayerNorm are torch's own. With `attend_in_two_calls` it needs no mask, as a
careful user would have it. Equal schedules for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.model import Block, LPDModel
from lpd_tools.bench.cases import sort_based

attend = F.scaled_dot_product_attention


@dataclass(frozen=True)
class PlainStep:
    """The input of a step's attention: each sequence has a context rows, then query rows."""

    at: Tensor  # cache positions of the rows
    seen: Tensor  # float [rows, keys]: 0, or -inf where a row does not see a key
    num_context: int
    cached: int
    mutual_visibility: bool  # False: a query row sees the context and itself alone


# (q, k, v [S, H, rows, D], k_cache, v_cache [S, H, 1 + N, D], step) -> [S, H, rows, D]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PlainStep], Tensor]
BlockCall = Callable[[Block, Tensor, Tensor, Tensor, PlainStep, Attention], Tensor]


def attend_with_mask(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, step: PlainStep) -> Tensor:
    """Attends as the published code does: writes K and V of all rows by index, then one call with a mask."""
    k_cache[:, :, step.at], v_cache[:, :, step.at] = k, v
    keys = step.seen.shape[1]
    return attend(q, k_cache[:, :, :keys], v_cache[:, :, :keys], attn_mask=step.seen)


def attend_in_two_calls(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, step: PlainStep) -> Tensor:
    """Attends with one call per kind of row, which needs a mask only for queries blind to each other."""
    context, query = slice(0, step.num_context), slice(step.num_context, None)
    end = step.cached + step.num_context
    k_cache[:, :, step.cached : end], v_cache[:, :, step.cached : end] = k[:, :, context], v[:, :, context]
    k_seen, v_seen = k_cache[:, :, :end], v_cache[:, :, :end]
    first = attend(q[:, :, context], k_seen, v_seen)
    keys, values = (torch.cat(parts, 2) for parts in ((k_seen, k[:, :, query]), (v_seen, v[:, :, query])))
    second = attend(q[:, :, query], keys, values, attn_mask=None if step.mutual_visibility else step.seen[query])
    return torch.cat([first, second], dim=2)


def call_block(
    block: Block, x: Tensor, k_cache: Tensor, v_cache: Tensor, step: PlainStep, attention: Attention
) -> Tensor:
    """Runs one transformer block on x [S, rows, E]."""
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    attended = attention(q, k, v, k_cache, v_cache, step)
    x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
    hidden: Tensor = F.gelu(block.mlp.fc1(block.norm2(x)))
    return torch.add(x, block.mlp.fc2(hidden))


@torch.no_grad()
def decode_plain(
    model: LPDModel,
    labels: Tensor,
    group_sizes: Sequence[int],
    orders: Tensor,
    guidance_scale: float,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    *,
    attention: Attention = attend_with_mask,
    block_call: BlockCall = call_block,
    mutual_visibility: bool | None = None,
    given: Tensor | None = None,
    logits_out: list[Tensor] | None = None,
) -> Tensor:
    """Decodes tokens int64 [B, N] in raster order with linear guidance; labels int64 [B], orders int64 [B, N].

    mutual_visibility: whether the queries of a step see each other; default as the model was trained.
    given: tokens to feed instead of those drawn. logits_out: receives each step's logits [S, m, V].
    """
    config, device, dtype = model.config, model.pos_embed.device, model.pos_embed.dtype
    if mutual_visibility is None:
        mutual_visibility = config.mutual_visibility
    batch, num_tokens = orders.shape
    guided = guidance_scale != 1
    sequences = 2 * batch if guided else batch
    conditions = model.condition_ids(labels)
    if guided:
        conditions = torch.cat([conditions, torch.full_like(conditions, config.unconditional_id)])
        orders = torch.cat([orders, orders])

    block_of = torch.tensor([1, *group_sizes], device=device)
    block_of = torch.arange(len(block_of), device=device).repeat_interleave(block_of)
    mask = torch.zeros(1 + num_tokens, 1 + num_tokens, dtype=dtype, device=device)
    mask.masked_fill_(block_of[:, None] < block_of[None, :], float("-inf"))
    shape = (sequences, config.heads, 1 + num_tokens, config.head_dim)
    caches = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)] for _ in model.blocks]

    tokens = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)
    context_content = F.embedding(conditions[:, None], model.content)
    context_position = torch.zeros(sequences, 1, dtype=torch.int64, device=device)
    done = cached = 0
    for size in group_sizes:
        num_context = context_content.shape[1]
        cells = orders[:, done : done + size]
        query_content = model.content[config.mask_id].expand(sequences, size, -1)
        position_ids = torch.cat([context_position, cells + 1], dim=1)
        x = torch.cat([context_content, query_content], dim=1) + F.embedding(position_ids, model.pos_embed)
        x = model.z_proj_ln(x)
        # Context row i and query row i: at cache position cached + i. Queries see each other, being one block.
        at = torch.arange(cached, cached + num_context + size, device=device)
        seen = mask[at][:, : cached + num_context + size]
        if not mutual_visibility:
            seen[num_context:, cached + num_context :].fill_(float("-inf")).fill_diagonal_(0)
        step = PlainStep(at, seen, num_context, cached, mutual_visibility)
        for block, (k_cache, v_cache) in zip(model.blocks, caches, strict=True):
            assert isinstance(block, Block)
            x = block_call(block, x, k_cache, v_cache, step, attention)
        logits = model.head(model.norm(x[:, num_context:]))
        if logits_out is not None:
            logits_out.append(logits)
        if given is None:
            guidance = guidance_of(done, size, num_tokens, guidance_scale, device)
            drawn = _draw(logits, batch, guidance, temperature, top_k, top_p)
        else:
            drawn = given.gather(1, cells[:batch])
        tokens.scatter_(1, cells[:batch], drawn)
        cached += num_context
        done += size
        context_content = F.embedding(drawn.repeat(sequences // batch, 1), model.content)
        context_position = cells + 1
    return tokens


def guidance_of(done: int, size: int, num_tokens: int, scale: float, device: torch.device) -> Tensor:
    """Returns the linear schedule's scale [size] of the tokens after the first `done`."""
    return 1 + (scale - 1) * torch.arange(done, done + size, device=device) / num_tokens


def _draw(
    logits: Tensor, batch: int, guidance: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    _, size, vocab = logits.shape
    rows = torch.arange(batch * size, device=logits.device)
    unconditional = rows + batch * size if len(logits) > batch else rows
    guidance = guidance.repeat(batch)
    drawn = sort_based(
        logits.reshape(-1, vocab),
        rows,
        unconditional,
        guidance,
        torch.full_like(guidance, temperature, dtype=torch.float32),
        top_k,
        top_p,
    )
    return drawn.view(batch, size)
