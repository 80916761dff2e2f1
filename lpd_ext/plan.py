"""What each decoding step feeds, for a whole batch: everything that follows from the schedules alone, before any token.

Each sequence s (a conditional image, or its unconditional twin) owns a row of a `contents` table int64 [S, N + 2]:
column 0 the condition, column 1 + n the n-th token in decoding order, column N + 1 the mask token. A `positions` table
has the same layout. Row r of a step then reads contents[content_index[r]] and positions[position_index[r]] (both
flattened), so orders, labels and tokens stay data on the device and the plan is the same for every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One decoding step of a batch: R rows, first all context rows, then all query rows; M tokens are drawn."""

    segments: Tensor  # int32 [Q, 6], see ops.group_attention
    content_index: Tensor  # int64 [R]
    position_index: Tensor  # int64 [R]
    num_context_rows: int
    num_query_rows: int
    max_rows: int
    max_keys: int
    image: Tensor  # int64 [M], image of each token drawn
    token_index: Tensor  # int64 [M], its n: place in the image's decoding order
    conditional_row: Tensor  # int32 [M], row of the logits
    unconditional_row: Tensor  # int32 [M], -1 without guidance
    write_index: Tensor  # int64 [W], where drawn tokens go in `contents`, unconditional twins included
    write_source: Tensor  # int64 [W], which of the M tokens


@dataclass(frozen=True)
class Plan:
    """All steps of a batch: B images, S sequences of which the first B are conditional, P cache positions."""

    steps: tuple[Step, ...]
    num_sequences: int
    cache_positions: int
    sequence_image: Tensor  # int64 [S]

    @property
    def most_rows(self) -> int:
        """The largest R of all steps."""
        return max((step.num_context_rows + step.num_query_rows for step in self.steps), default=0)

    def record_stream(self) -> None:
        """On CUDA, keep the memory of the plan, which other streams share, from reuse until this stream is done."""
        for part in (self, *self.steps):
            for value in vars(part).values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(torch.cuda.current_stream())


def plan_decoding(
    schedules: Sequence[Sequence[int]], guided: Sequence[bool], num_tokens: int, device: torch.device
) -> Plan:
    """Plan the decoding of B images with group sizes schedules[b], each summing to num_tokens.

    guided[b] gives image b an unconditional twin. Plans are cached: serving repeats few layouts.
    """
    return _plan_decoding(tuple(map(tuple, schedules)), tuple(guided), num_tokens, device)


@lru_cache(maxsize=8)
def _plan_decoding(
    schedules: tuple[tuple[int, ...], ...], guided: tuple[bool, ...], num_tokens: int, device: torch.device
) -> Plan:
    batch = len(schedules)
    sequence_image = list(range(batch)) + [b for b in range(batch) if guided[b]]
    ends = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in schedules]
    steps = []
    for t in range(max(map(len, schedules), default=0)):
        sequences = [s for s, b in enumerate(sequence_image) if t < len(schedules[b])]
        steps.append(_plan_step(t, sequences, sequence_image, ends, num_tokens, device))
    return Plan(
        steps=tuple(steps),
        num_sequences=len(sequence_image),
        cache_positions=max((1 + int(end[-2]) for end in ends), default=0),
        sequence_image=torch.tensor(sequence_image, dtype=torch.int64, device=device),
    )


def _plan_step(
    t: int,
    sequences: list[int],
    sequence_image: list[int],
    ends: list[np.ndarray],
    num_tokens: int,
    device: torch.device,
) -> Step:
    columns = num_tokens + 2
    batch = len(ends)
    context_columns, query_columns, cached = {}, {}, {}
    for s in sequences:
        end = ends[sequence_image[s]]
        # The condition first; from then on the tokens drawn by the step before. Column 1 + n holds token n.
        context_columns[s] = np.arange(1) if t == 0 else 1 + np.arange(end[t - 1], end[t])
        query_columns[s] = 1 + np.arange(end[t], end[t + 1])
        cached[s] = 0 if t == 0 else 1 + int(end[t - 1])

    num_context = sum(map(len, context_columns.values()))
    segments, context_start, query_start = [], 0, num_context
    first_logit = {}
    for s in sequences:
        a, m = len(context_columns[s]), len(query_columns[s])
        segments.append([context_start, a, query_start, m, cached[s], s])
        first_logit[s] = query_start - num_context
        context_start, query_start = context_start + a, query_start + m

    context_index = [s * columns + context_columns[s] for s in sequences]
    query_index = [s * columns + query_columns[s] for s in sequences]
    mask_index = [np.full(len(query_columns[s]), s * columns + num_tokens + 1) for s in sequences]

    # Tokens are drawn once per image, by its conditional sequence; the twins stand after the first B sequences.
    conditional = [s for s in sequences if s < batch]
    twin = {sequence_image[s]: s for s in sequences if s >= batch}
    first_token, count = {}, 0
    for b in conditional:
        first_token[b] = count
        count += len(query_columns[b])
    rows = [first_logit[b] + np.arange(len(query_columns[b])) for b in conditional]
    twin_rows = [
        first_logit[twin[b]] + np.arange(len(query_columns[b])) if b in twin else np.full(len(query_columns[b]), -1)
        for b in conditional
    ]
    writers = conditional + [twin[b] for b in conditional if b in twin]

    def tensor(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate(parts), dtype=dtype).to(device)

    return Step(
        segments=torch.tensor(segments, dtype=torch.int32, device=device),
        content_index=tensor(context_index + mask_index, torch.int64),
        position_index=tensor(context_index + query_index, torch.int64),
        num_context_rows=num_context,
        num_query_rows=query_start - num_context,
        max_rows=max(len(context_columns[s]) + len(query_columns[s]) for s in sequences),
        max_keys=max(cached[s] + len(context_columns[s]) + len(query_columns[s]) for s in sequences),
        image=tensor([np.full(len(query_columns[b]), b) for b in conditional], torch.int64),
        token_index=tensor([query_columns[b] - 1 for b in conditional], torch.int64),
        conditional_row=tensor(rows, torch.int32),
        unconditional_row=tensor(twin_rows, torch.int32),
        write_index=tensor([s * columns + query_columns[s] for s in writers], torch.int64),
        write_source=tensor(
            [first_token[sequence_image[s]] + np.arange(len(query_columns[s])) for s in writers], torch.int64
        ),
    )
