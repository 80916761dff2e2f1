"""Group sizes: the number of tokens m_t that each of the T decoding steps draws in parallel; they sum to N."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from lpd_ext.checks import as_int

_MAX_DIGITS = 9


def group_sizes(num_tokens: int, steps: int) -> list[int]:
    """Returns the group sizes [T] of the published table for (N, T) if there is one, else of the cosine formula.

    Published checkpoints were trained with the tables, which differ a little from the formula.
    Raises ValueError unless 1 <= steps <= num_tokens.
    """
    num_tokens, steps = _check_counts(num_tokens, steps)
    table = published_group_sizes().get((num_tokens, steps))
    return list(table) if table is not None else cosine_group_sizes(num_tokens, steps)


def cosine_group_sizes(num_tokens: int, steps: int) -> list[int]:
    """Returns group sizes [T] such that about N * (1 - cos(pi * t / 2T)) tokens are drawn after t steps (paper).

    The first group is one token, drawn without context; the others are the rounded increments, never decreasing and at
    least 1. Raises ValueError unless 1 <= steps <= num_tokens.
    """
    num_tokens, steps = _check_counts(num_tokens, steps)
    if steps == 1:
        return [num_tokens]
    drawn = [num_tokens * (1 - math.cos(math.pi * t / (2 * steps))) for t in range(steps + 1)]
    sizes = [1] + [max(1, round(drawn[t + 1] - drawn[t])) for t in range(1, steps)]
    # A surplus is taken from the first of the largest groups, a deficit added to the last: sizes stay sorted.
    for _ in range(sum(sizes) - num_tokens):
        sizes[bisect_left(sizes, sizes[-1])] -= 1
    sizes[-1] += num_tokens - sum(sizes)
    return sizes


def check_group_sizes(
    sizes: Sequence[int], num_tokens: int, name: str = "group_sizes", of: str = "the number of tokens to draw"
) -> list[int]:
    """Returns the given group sizes as a list of ints; ValueError unless they are positive and sum to num_tokens.

    `name` and `of` name them and their sum in error messages. Raises TypeError for anything but integers.
    """
    if not isinstance(sizes, Iterable):
        raise TypeError(f"{name} must be a list of integers, got {sizes!r}")
    checked = list(sizes)
    if not all(type(size) is int for size in checked):
        checked = [as_int(size, f"{name}[{t}]") for t, size in enumerate(checked)]
    if checked and min(checked) < 1:
        t = next(t for t, size in enumerate(checked) if size < 1)
        raise ValueError(f"{name}[{t}] = {checked[t]} must be >= 1")
    if sum(checked) != num_tokens:
        raise ValueError(f"{name} must sum to {num_tokens}, {of}, got {sum(checked)}")
    return checked


def parse_group_sizes(text: str) -> list[int]:
    """Parses group sizes from text such as "[1, 2, 3]" or "1,2,3"; ValueError for any other text."""
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1]
    items = [item.strip() for item in inner.split(",")]
    if len(items) > 1 and not items[-1]:  # a comma may end the list
        items.pop()
    if not all(item.isascii() and item.isdecimal() and len(item) <= _MAX_DIGITS for item in items):
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise ValueError(f"group_sizes must be a list of integers such as '[1, 2, 3]', got {shown!r}")
    return [int(item) for item in items]


def sizes_per_image(group_sizes: Any, batch: int) -> list[Any]:
    """Returns the group sizes of each image, unchecked: those given, or the one list repeated."""
    if hasattr(group_sizes, "tolist"):
        group_sizes = group_sizes.tolist()
    if isinstance(group_sizes, str) or not isinstance(group_sizes, Iterable):
        raise TypeError(f"group_sizes must be a list of integers, or one such list per image, got {group_sizes!r}")
    rows = list(group_sizes)
    return rows if any(isinstance(row, Iterable) for row in rows) else [rows] * batch


@cache
def published_group_sizes() -> dict[tuple[int, int], tuple[int, ...]]:
    """Returns the tables that the published checkpoints were trained with: (N, T) -> group sizes."""
    tables = json.loads((resources.files("lpd_ext") / "data" / "group_sizes.json").read_text("utf-8"))
    return {
        (int(num_tokens), int(steps)): tuple(sizes)
        for num_tokens, by_steps in tables.items()
        for steps, sizes in by_steps.items()
    }


def _check_counts(num_tokens: int, steps: int) -> tuple[int, int]:
    num_tokens, steps = as_int(num_tokens, "num_tokens"), as_int(steps, "steps")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be >= 1, got {num_tokens}")
    if not 1 <= steps <= num_tokens:
        raise ValueError(f"steps must be in [1, {num_tokens}] for {num_tokens} tokens, got {steps}")
    return num_tokens, steps
