"""What a training recipe costs: floating-point operations, and GPU hours at a stated utilisation (an estimate)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lpd_ext.model import LPDConfig


@dataclass(frozen=True)
class Cost:
    """Operations of one teacher-forced image, forward only; a multiplication and an addition are two."""

    linear_flops: int
    attention_flops: int

    @property
    def forward_flops(self) -> int:
        """All operations of the forward pass."""
        return self.linear_flops + self.attention_flops

    @property
    def training_flops(self) -> int:
        """Forward and backward, which computes the gradients of inputs and of weights: three times the forward."""
        return 3 * self.forward_flops


def rows_of(group_sizes: Sequence[int]) -> tuple[int, int]:
    """Context and query rows of a training sequence: the condition and all groups but the last; all groups."""
    tokens = sum(group_sizes)
    return 1 + tokens - group_sizes[-1], tokens


def allowed_pairs(group_sizes: Sequence[int]) -> int:
    """(row, key) pairs that the training mask allows in a sequence (paper, section 3.2)."""
    pairs = seen = 1  # the condition sees itself
    for t, size in enumerate(group_sizes):
        pairs += size * (seen + size)  # its queries: the context before, and each other
        if t + 1 < len(group_sizes):
            seen += size
            pairs += size * seen  # its tokens as context
    return pairs


def image_cost(config: LPDConfig, tables: Sequence[Sequence[int]]) -> Cost:
    """Mean cost of an image over the group-size tables, of which each step draws one."""
    width, ratio = config.dim, config.mlp_ratio
    per_row = 2 * (4 + 2 * ratio) * width * width  # qkv, proj, fc1, fc2
    linear = attention = 0
    for sizes in tables:
        context, query = rows_of(sizes)
        # Context rows of the last block go on to its end too: their outputs are not used, but they are computed.
        linear += config.depth * (context + query) * per_row + query * 2 * width * config.vocab_size
        attention += config.depth * allowed_pairs(sizes) * 4 * width
    return Cost(linear // len(tables), attention // len(tables))
