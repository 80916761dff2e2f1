"""LPD decoding as research code writes it in plain torch: the baseline of the end-to-end benchmark.

It does, operation for operation, what published implementations do: one dense float mask over all positions, indexed
anew in each step; a KV cache zeroed per call and written by index; SDPA with that mask; sort-based filters. The linear
layers, GELU and LayerNorm are torch's own. Equal schedules for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.model import Block, LPDModel
from lpd_tools.bench_cases import sort_based


@torch.no_grad()
def decode_plain(
    model: LPDModel,
    labels: Tensor,
    group_sizes: Sequence[int],
    orders: Tensor,
    guidance_scale: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Tokens int64 [B, N] in raster order with linear guidance; labels int64 [B], orders int64 [B, N]."""
    config, device, dtype = model.config, model.pos_embed.device, model.pos_embed.dtype
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
        for block, (k_cache, v_cache) in zip(model.blocks, caches, strict=True):
            assert isinstance(block, Block)
            x = _block(block, x, k_cache, v_cache, at, seen)
        logits = model.head(model.norm(x[:, num_context:]))
        drawn = _draw(logits, batch, done, num_tokens, guidance_scale, top_k, top_p)
        tokens.scatter_(1, cells[:batch], drawn)
        cached += num_context
        done += size
        context_content = F.embedding(drawn.repeat(sequences // batch, 1), model.content)
        context_position = cells + 1
    return tokens


def _block(block: Block, x: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor, seen: Tensor) -> Tensor:
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    k_cache[:, :, at], v_cache[:, :, at] = k, v
    keys = seen.shape[1]
    attended = F.scaled_dot_product_attention(q, k_cache[:, :, :keys], v_cache[:, :, :keys], attn_mask=seen)
    x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
    hidden: Tensor = F.gelu(block.mlp.fc1(block.norm2(x)))
    return torch.add(x, block.mlp.fc2(hidden))


def _draw(
    logits: Tensor, batch: int, done: int, num_tokens: int, scale: float, top_k: int | None, top_p: float | None
) -> Tensor:
    _, size, vocab = logits.shape
    n = torch.arange(done, done + size, device=logits.device).repeat(batch)
    guidance = 1 + (scale - 1) * n / num_tokens
    rows = torch.arange(batch * size, device=logits.device)
    unconditional = rows + batch * size if len(logits) > batch else rows
    drawn = sort_based(
        logits.reshape(-1, vocab), rows, unconditional, guidance, torch.ones_like(guidance), top_k, top_p
    )
    return drawn.view(batch, size)
