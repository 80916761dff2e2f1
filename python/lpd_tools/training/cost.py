"""Estimates the cost of a training recipe: floating-point operations, and GPU hours at a stated utilisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lpd_ext.linear import count_parameters
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.schedule import group_sizes
from lpd_tools.markdown import markdown_table
from lpd_tools.settings import make_config, read_config
from lpd_tools.training.settings import LPDTraining

_TABLES = ("cache-tokens", "train")


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


def cost_table(recipes: Sequence[Path], vocab_size: int, classes: int, stride: int, flops_per_second: float) -> str:
    """Returns a Markdown table of the costs of recipes; see `cost_row`."""
    head = ["recipe", "parameters", "images", "GFLOP per image", "of it attention", "total FLOP", "GPU hours"]
    return markdown_table(head, [cost_row(path, vocab_size, classes, stride, flops_per_second) for path in recipes])


def cost_row(path: Path, vocab_size: int, classes: int, stride: int, flops_per_second: float) -> list[str]:
    """Returns a recipe's row of the table; FileNotFoundError or ValueError for an incomplete recipe."""
    tables = {name: read_config(path, name, ("cache-tokens", "train", "bundle", "evaluate")) for name in _TABLES}
    recipe = make_config(LPDTraining, tables["train"], {}, str(path), "train")
    size = tables["cache-tokens"].get("image_size")
    if not isinstance(size, int) or size < stride or size % stride:
        raise ValueError(f"recipe {str(path)!r}: image_size must be a multiple of {stride}, got {size!r}")
    grid = (size // stride, size // stride)
    config = LPDConfig(recipe.dim, recipe.depth, recipe.heads, vocab_size, classes, grid)
    cost = image_cost(config, [group_sizes(config.num_tokens, steps) for steps in recipe.decoding_steps])
    with torch.device("meta"):
        parameters = count_parameters(LPDModel(config))
    images = recipe.steps * recipe.batch_size
    total = images * cost.training_flops
    return [
        path.stem,
        f"{parameters / 1e6:,.0f} M",
        f"{images / 1e6:,.0f} M",
        f"{cost.training_flops / 1e9:,.0f}",
        f"{cost.attention_flops / cost.forward_flops:.0%}",
        f"{total:.2g}",
        f"{total / flops_per_second / 3600:,.0f}",
    ]
