"""Attention of the teacher-forced pass in slices of torch's SDPA, the fastest way found in plain torch.

A slice is all rows of some consecutive steps, against the context keys they can see and the query keys of their own
groups, with the remaining mask. Calling the operators behind SDPA saves little per slice and adds the gradients of the
shared context keys in place, where autograd would pad each slice's gradient to the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpd_ext.visibility import training_mask

SLICE_ROWS = 192  # the fastest of 24, 48, 72, 96, 128, 192 and 256 at L-256-20; at L-512-48 256 is 5 % faster
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Slice:
    """Rows and keys of consecutive steps."""

    context: slice  # rows, and the end of the context keys
    query: slice  # rows and keys
    mask: Tensor  # float [rows, keys]: 0, or -inf where a row does not see a key


def slices(group_sizes: Sequence[int], slice_rows: int = SLICE_ROWS) -> list[Slice]:
    """Cuts the steps into slices of about slice_rows rows, at least one step each."""
    mask = training_mask(group_sizes)
    unseen = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    context_sizes = [1, *group_sizes[:-1]]
    found: list[Slice] = []
    context = context_end = step = 0
    query = query_end = sum(context_sizes)
    while step < len(group_sizes):
        while step < len(group_sizes):
            taken = context_end - context + query_end - query
            if taken and taken + context_sizes[step] + group_sizes[step] > slice_rows:
                break
            context_end += context_sizes[step]
            query_end += group_sizes[step]
            step += 1
        rows = torch.cat([torch.arange(context, context_end), torch.arange(query, query_end)])
        keys = torch.cat([torch.arange(context_end), torch.arange(query, query_end)])
        found.append(Slice(slice(context, context_end), slice(query, query_end), unseen[rows][:, keys]))
        context, query = context_end, query_end
    return found


class SlicedAttention(torch.autograd.Function):
    """qkv [B, rows, 3, H, D] and slices -> [B, rows, H * D]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, parts: list[Slice]) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = torch.empty_like(qkv[:, :, 0])
        saved = []
        for part in parts:
            split = part.context.stop - part.context.start
            attended, logsumexp = _forward(
                _rows(q, part), _keys(k, part), _keys(v, part), 0.0, False, attn_mask=part.mask
            )
            by_row = attended.transpose(1, 2)
            out[:, part.context], out[:, part.query] = by_row[:, :split], by_row[:, split:]
            saved += [attended, logsumexp]
        ctx.save_for_backward(qkv, *saved)
        ctx.parts = parts
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        qkv, *saved = ctx.saved_tensors
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        grad = grad_output.unflatten(-1, qkv.shape[-2:]).transpose(1, 2)
        grads = qkv.new_zeros(3, *q.shape)
        for i, part in enumerate(ctx.parts):
            split = part.context.stop - part.context.start
            operands = (_rows(grad, part), _rows(q, part), _keys(k, part), _keys(v, part))
            grad_q, *grad_kv = _backward(*operands, *saved[2 * i : 2 * i + 2], 0.0, False, attn_mask=part.mask)
            grads[0, :, :, part.context], grads[0, :, :, part.query] = grad_q[:, :, :split], grad_q[:, :, split:]
            for target, source in zip(grads[1:], grad_kv, strict=True):
                target[:, :, : part.context.stop] += source[:, :, : part.context.stop]
                target[:, :, part.query] = source[:, :, part.context.stop :]
        return grads.permute(1, 3, 0, 2, 4), None


def _rows(x: Tensor, part: Slice) -> Tensor:
    return torch.cat([x[:, :, part.context], x[:, :, part.query]], 2)


def _keys(x: Tensor, part: Slice) -> Tensor:
    return torch.cat([x[:, :, : part.context.stop], x[:, :, part.query]], 2)
