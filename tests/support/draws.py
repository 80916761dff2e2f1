"""Arguments of sample_tokens for tests, and the comparisons that a set of drawn tokens has to pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import stats
from steps import clone
from torch import Tensor

from lpd_ext import ops, reference

INF = math.inf
Values = float | Sequence[float] | Tensor


class Arguments(NamedTuple):
    """Returns the arguments of sample_tokens, in its order."""

    logits: Tensor
    conditional_row: Tensor
    unconditional_row: Tensor
    guidance: Tensor
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    seed: Tensor
    cell: Tensor

    def on(self, device: torch.device) -> Arguments:
        return Arguments(*(a if a is None else clone(a, device) for a in self))

    def draw(self, device: torch.device) -> Tensor:
        return ops.sample_tokens(*self.on(device)).cpu()

    def probabilities(self) -> Tensor:
        return reference.token_probabilities(*self[:7])

    def take(self, index: Tensor) -> Arguments:
        """The tokens at these indices, with all logits."""
        return Arguments(self.logits, *(a if a is None else a[index] for a in self[1:]))


def arguments(
    logits: Tensor,
    count: int,
    *,
    conditional: Values = 0,
    unconditional: Values = -1,
    guidance: Values = 1.0,
    temperature: Values = 1.0,
    top_k: Values | None = None,
    top_p: Values | None = None,
    seed: Values | None = None,
    cell: Values | None = None,
) -> Arguments:
    """One value for all tokens, or one each; by default the tokens walk over the 256 cells of image after image."""
    ids = torch.arange(count)

    def spread(values: Values, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).expand(count).contiguous()

    return Arguments(
        logits,
        spread(conditional, torch.int32),
        spread(unconditional, torch.int32),
        spread(guidance, torch.float32),
        spread(temperature, torch.float32),
        None if top_k is None else spread(top_k, torch.int32),
        None if top_p is None else spread(top_p, torch.float32),
        spread(ids // 256 if seed is None else seed, torch.int64),
        spread(ids % 256 if cell is None else cell, torch.int64),
    )


def assert_follows_tree(tokens: Tensor, args: Arguments, probabilities: Tensor) -> None:
    """Every bit of each token goes where the reference's uniform and weights [M or 1, V] send it, bar rounding."""
    vocab_size = probabilities.shape[-1]
    levels = (vocab_size - 1).bit_length()
    cumulative = F.pad(probabilities, (1, 2**levels - vocab_size)).cumsum(-1).expand(len(tokens), -1)
    start = torch.zeros_like(tokens)
    for level in range(levels):
        half = 2 ** (levels - 1 - level)
        low, middle, high = (cumulative.gather(-1, (start + i)[:, None])[:, 0] for i in (0, half, 2 * half))
        number = reference.uniform(args.seed, args.cell, draw=level // 4, word=level % 4).double()
        excess = number * (high - low) - (middle - low)  # >= 0 sends a token right
        rounding = 3e-6 * (high - low) + 1e-14
        right = tokens & half > 0
        assert bool((excess >= -rounding)[right].all())
        assert bool((excess < rounding)[~right].all())
        start = start + half * right
    assert start.equal(tokens)
    assert bool((probabilities.expand(len(tokens), -1).gather(-1, tokens[:, None]) > 0).all())


def assert_support(tokens: Tensor, probabilities: Tensor) -> None:
    """Draws of one distribution reach every token that has a probability, and no other."""
    assert sorted(set(tokens.tolist())) == probabilities.nonzero()[:, 0].tolist()


def assert_frequencies(tokens: Tensor, probabilities: Tensor) -> None:
    """Chi-square at p > 1e-4; tokens expected fewer than 5 times share a bin."""
    count = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities * len(tokens)
    rare = expected < 5
    observed = torch.cat([count[~rare], count[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert bool((observed[expected == 0] == 0).all())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert stats.chi2.sf(statistic, max(len(observed) - 1, 1)) > 1e-4
