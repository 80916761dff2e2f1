"""Plans the decoding of a batch: the rows of every step, which follow from the schedules before any token is known.

Each sequence (an image with its label, or its unconditional twin) owns a row, its slot, of a `contents` table int64
[S, N + 2]: column 0 the condition, column 1 + n the n-th cell of the image's order, column N + 1 the mask token. A
`positions` table has the same layout. A sequence enters the KV cache column by column, so column c lies at cache
position c. Row r of a step reads contents[content_index[r]] and positions[position_index[r]] (both flattened): orders,
labels and tokens stay data on the device, and the plan is the same for every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """The context rows and query rows of one image in each of its steps.

    prefill: sizes of the blocks of known cells that enter the KV cache after the condition, which enters alone.
    group_sizes: sizes of the groups drawn then; the first is drawn in the step of the last block.
    """

    group_sizes: tuple[int, ...]
    prefill: tuple[int, ...] = ()
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)  # columns fed before step t, for each t

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", tuple(accumulate((1, *self.prefill, *self.group_sizes), initial=0)))

    @property
    def num_steps(self) -> int:
        """Steps until the last group is drawn; 0 if nothing is to be drawn."""
        return len(self.prefill) + len(self.group_sizes) if self.group_sizes else 0

    def rows(self, t: int) -> tuple[int, int, int]:
        """Returns, for step t, the positions cached before it, its context rows, and its query rows after them."""
        cached, fed = self._ends[t], self._ends[t + 1]
        return cached, fed - cached, self._ends[t + 2] - fed if t >= len(self.prefill) else 0

    @property
    def cache_positions(self) -> int:
        """Positions that the KV cache needs; the last group is never fed back."""
        return self._ends[-2] if self.group_sizes else 0


@dataclass(frozen=True)
class Place:
    """An image's row in the tables by image, its cache slot, and the slot of its unconditional twin."""

    image: int
    slot: int
    twin: int | None = None


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
    token_index: Tensor  # int64 [M], its n: place in the image's order
    conditional_row: Tensor  # int32 [M], row of the logits
    unconditional_row: Tensor  # int32 [M], -1 without guidance
    twin_index: Tensor  # int64 [M], place of the token in `contents` for the unconditional twin, -1 without guidance

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_context_rows + self.num_query_rows

    @property
    def write_index(self) -> Tensor:
        """Places of drawn tokens in `contents`, int64 [M]."""
        return self.position_index[self.num_context_rows : self.num_context_rows + len(self.image)]


@dataclass(frozen=True)
class Places:
    """Places of a batch as tensors, for writing a request's data."""

    images: Tensor  # int64 [B], rows of the tables by image
    slots: Tensor  # int64 [S], first those of the images, then those of the twins
    sources: Tensor  # int64 [S], which of the B images each slot belongs to

    @classmethod
    def of(cls, places: Sequence[Place], device: torch.device) -> Places:
        """Returns these places, in their order, as tensors."""
        twins = [(b, place.twin) for b, place in enumerate(places) if place.twin is not None]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            images=tensor([place.image for place in places]),
            slots=tensor([place.slot for place in places] + [slot for _, slot in twins]),
            sources=tensor([*range(len(places)), *(b for b, _ in twins)]),
        )


@dataclass(frozen=True)
class Capacity:
    """Sizes of a decode's buffers: images, sequences (S slots), P cache positions, rows of a step."""

    images: int
    sequences: int
    cache_positions: int
    most_rows: int


@dataclass(frozen=True)
class Plan:
    """All steps of a batch: image b has slot b, and the twins of guided images have the slots from B on."""

    steps: tuple[Step, ...]
    places: Places
    capacity: Capacity

    def record_stream(self) -> None:
        """On CUDA, keeps the plan's memory, which other streams share, from reuse until this stream is done."""
        for part in (self.places, *self.steps):
            for value in vars(part).values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(torch.cuda.current_stream())


def plan_decoding(
    group_sizes: Sequence[Sequence[int]],
    guided: Sequence[bool],
    num_tokens: int,
    device: torch.device,
    prefill: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Plans the decoding of B images from their group sizes and, if cells are known, their blocks of prefill.

    Both together sum to num_tokens, per image. guided[b] gives image b an unconditional twin. Plans are cached, since a
    server sees few layouts.
    """
    blocks = tuple(map(tuple, prefill)) if prefill is not None else ((),) * len(group_sizes)
    return _plan_decoding(tuple(map(tuple, group_sizes)), blocks, tuple(guided), num_tokens, device)


@lru_cache(maxsize=8)
def _plan_decoding(
    group_sizes: tuple[tuple[int, ...], ...],
    prefill: tuple[tuple[int, ...], ...],
    guided: tuple[bool, ...],
    num_tokens: int,
    device: torch.device,
) -> Plan:
    schedules = [Schedule(sizes, blocks) for sizes, blocks in zip(group_sizes, prefill, strict=True)]
    slots_of_twins = list(accumulate(guided, initial=len(guided)))
    places = [Place(b, b, slots_of_twins[b] if is_guided else None) for b, is_guided in enumerate(guided)]
    steps = []
    for t in range(max((schedule.num_steps for schedule in schedules), default=0)):
        running = [(p, s.rows(t)) for p, s in zip(places, schedules, strict=True) if t < s.num_steps]
        steps.append(plan_step([p for p, _ in running], [rows for _, rows in running], num_tokens, device))
    capacity = Capacity(
        images=len(places),
        sequences=slots_of_twins[-1],
        cache_positions=max((schedule.cache_positions for schedule in schedules), default=0),
        most_rows=max((step.num_rows for step in steps), default=0),
    )
    return Plan(tuple(steps), Places.of(places, device), capacity)


def plan_step(
    places: Sequence[Place], rows: Sequence[tuple[int, int, int]], num_tokens: int, device: torch.device
) -> Step:
    """Plans one step of the images at these places, each with its `Schedule.rows`; they may be at different steps."""
    columns = num_tokens + 2
    with_twin = [i for i, place in enumerate(places) if place.twin is not None]
    source = np.array([*range(len(places)), *with_twin], dtype=np.int64)  # of each sequence, the images' own first
    slot = np.array([p.slot for p in places] + [places[i].twin for i in with_twin], dtype=np.int64)
    cached, num_context, num_query = np.array(rows, dtype=np.int64).reshape(-1, 3)[source].T
    context_start = np.cumsum(num_context) - num_context
    num_context_rows = int(num_context.sum())
    first_logit = np.cumsum(num_query) - num_query
    first_column = slot * columns + cached

    context_index = _ranges(first_column, num_context)
    query_index = _ranges(first_column + num_context, num_query)
    mask_index = np.repeat(slot * columns + num_tokens + 1, num_query)

    # Tokens are drawn once per image, from the logits of its own sequence and of its twin.
    batch = len(places)
    drawn = num_query[:batch]
    image = np.array([place.image for place in places], dtype=np.int64)
    # Of each image's first token: its twin's row of the logits, and its twin's place.
    twin_logit, twin_column = np.full(batch, -1), np.full(batch, -1)
    twin_logit[with_twin] = first_logit[batch:]
    twin_column[with_twin] = (first_column + num_context)[batch:]
    conditional_row = _ranges(first_logit[:batch], drawn)

    def of_twin(first: Integers) -> Integers:
        return np.where(np.repeat(first, drawn) < 0, -1, _ranges(first, drawn))

    def tensor(values: Integers, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)

    query_start = num_context_rows + first_logit
    return Step(
        segments=tensor(np.stack([context_start, num_context, query_start, num_query, cached, slot], 1), torch.int32),
        content_index=tensor(np.concatenate([context_index, mask_index])),
        position_index=tensor(np.concatenate([context_index, query_index])),
        num_context_rows=num_context_rows,
        num_query_rows=len(query_index),
        max_rows=int((num_context + num_query).max()),
        max_keys=int((cached + num_context + num_query).max()),
        image=tensor(np.repeat(image, drawn)),
        token_index=tensor(_ranges((cached + num_context)[:batch] - 1, drawn)),
        conditional_row=tensor(conditional_row, torch.int32),
        unconditional_row=tensor(of_twin(twin_logit), torch.int32),
        twin_index=tensor(of_twin(twin_column)),
    )


def _ranges(starts: Integers, lengths: Integers) -> Integers:
    """Returns arange(start, start + length) for each pair, concatenated."""
    ends = np.cumsum(lengths)
    ranges: Integers = np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
    return ranges
