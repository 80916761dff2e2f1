"""Group sizes: published tables, the cosine formula, user lists."""

from __future__ import annotations

import json
import math
import time
from importlib import resources

import pytest
import torch

from lpd_ext.schedule import (
    check_group_sizes,
    cosine_group_sizes,
    group_sizes,
    parse_group_sizes,
    published_group_sizes,
)

# Tables that differ from the formula: (N, T) -> largest difference in one group.
DEVIATIONS = {
    (256, 24): 1, (256, 8): 3, (1024, 256): 1, (1024, 224): 1, (1024, 160): 1,
    (1024, 128): 1, (1024, 96): 1, (1024, 80): 1, (1024, 64): 1, (1024, 56): 1,
}  # fmt: skip
TRAINED = [(256, steps) for steps in (8, 12, 16, 20, 24, 32, 64, 128, 256)] + [
    (1024, steps) for steps in (32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 224, 256, 512, 1024)
]


def exact_cosine(num_tokens: int, steps: int) -> list[int]:
    """The formula by the letter, one sentence a line."""
    if steps == 1:
        return [num_tokens]
    cumulative = [num_tokens * (1 - math.cos(math.pi * t / 2 / steps)) for t in range(steps + 1)]
    sizes = [1]
    for t in range(1, steps):
        sizes.append(max(1, math.floor(cumulative[t + 1] - cumulative[t] + 0.5)))
    while sum(sizes) > num_tokens:
        largest = max(sizes)
        first = next(t for t, size in enumerate(sizes) if size == largest)
        sizes[first] -= 1
    while sum(sizes) < num_tokens:
        sizes[-1] += 1
    return sizes


def test_known_published_tables() -> None:
    assert group_sizes(256, 20) == [1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20]
    assert group_sizes(256, 8) == [1, 15, 24, 32, 40, 45, 49, 50]
    assert group_sizes(256, 32)[-8:] == [12] * 8
    assert group_sizes(1024, 48)[0] == 1
    assert sum(group_sizes(1024, 48)) == 1024


def test_every_published_table_is_returned_exactly() -> None:
    tables = json.loads(resources.files("lpd_ext").joinpath("data", "group_sizes.json").read_text("utf-8"))
    pairs = {(int(n), int(t)): sizes for n, by_steps in tables.items() for t, sizes in by_steps.items()}
    assert sorted(pairs) == sorted(TRAINED)
    for (num_tokens, steps), sizes in pairs.items():
        assert group_sizes(num_tokens, steps) == sizes
        assert len(sizes) == steps
        assert sum(sizes) == num_tokens
        assert sizes == sorted(sizes)


def test_tables_differ_from_the_formula_only_where_expected() -> None:
    found = {}
    for (num_tokens, steps), table in published_group_sizes().items():
        pairs = zip(table, cosine_group_sizes(num_tokens, steps), strict=True)
        largest = max(abs(a - b) for a, b in pairs)
        if largest:
            found[num_tokens, steps] = largest
    assert found == DEVIATIONS


def test_cosine_formula_against_the_literal_one() -> None:
    for num_tokens in [1, 2, 3, 7, 16, 60, 64, 100, 129, 256]:
        for steps in range(1, num_tokens + 1):
            sizes = cosine_group_sizes(num_tokens, steps)
            assert sizes == exact_cosine(num_tokens, steps), (num_tokens, steps)
            assert len(sizes) == steps
            assert sum(sizes) == num_tokens
            assert sizes == sorted(sizes)
            assert sizes[0] == (1 if steps > 1 else num_tokens)


def test_cosine_examples() -> None:
    assert cosine_group_sizes(64, 1) == [64]
    assert cosine_group_sizes(64, 64) == [1] * 64
    assert cosine_group_sizes(64, 10) == [1, 2, 4, 5, 7, 8, 9, 9, 9, 10]
    assert cosine_group_sizes(7, 3) == [1, 3, 3]
    assert cosine_group_sizes(3, 2) == [1, 2]


def test_a_returned_table_is_the_callers_own() -> None:
    group_sizes(256, 20)[0] = 99
    assert group_sizes(256, 20)[0] == 1


@pytest.mark.parametrize(
    ("num_tokens", "steps", "error", "message"),
    [
        (0, 1, ValueError, "num_tokens must be >= 1, got 0"),
        (16, 0, ValueError, r"steps must be in \[1, 16\] for 16 tokens, got 0"),
        (16, 17, ValueError, r"steps must be in \[1, 16\] for 16 tokens, got 17"),
        (16, 2.0, TypeError, "steps must be an integer, got 2.0"),
        (True, 1, TypeError, "num_tokens must be an integer, got True"),
    ],
)
def test_bad_counts(num_tokens: int, steps: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_sizes(num_tokens, steps)
    with pytest.raises(error, match=message):
        cosine_group_sizes(num_tokens, steps)


def test_check_group_sizes() -> None:
    assert check_group_sizes((1, 3, 5), 9) == [1, 3, 5]
    assert check_group_sizes([5, 3, 1], 9) == [5, 3, 1]
    assert check_group_sizes([], 0) == []
    sizes = check_group_sizes(torch.tensor([1, 3], dtype=torch.int32), 4)
    assert sizes == [1, 3]
    assert all(type(size) is int for size in sizes)
    with pytest.raises(ValueError, match=r"group_sizes\[1\] = 0 must be >= 1"):
        check_group_sizes([1, 0, 3], 4)
    with pytest.raises(ValueError, match=r"group_sizes\[0\] = -1 must be >= 1"):
        check_group_sizes([-1, 5], 4)
    with pytest.raises(ValueError, match="must sum to 5, the number of tokens to draw, got 4"):
        check_group_sizes([1, 3], 5)
    with pytest.raises(TypeError, match=r"group_sizes\[1\] must be an integer, got 1.5"):
        check_group_sizes([1, 1.5], 3)
    with pytest.raises(TypeError, match="group_sizes must be a list of integers, got 64"):
        check_group_sizes(64, 64)


@pytest.mark.parametrize("text", ["[1, 2, 3]", "1,2,3", " [ 1 ,2, 3 ] ", "(1, 2, 3)", "[1, 2, 3,]", "1,\n2,\n3\n"])
def test_parse_group_sizes(text: str) -> None:
    assert parse_group_sizes(text) == [1, 2, 3]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[1, 2", "1, 2]", "[1, 2)", "[1,, 2]", "[1 2]", "[1.0, 2]", "[-1, 2]", "[0x1]", "[1]*3",
     "[[1]]", "__import__('os').getcwd()", "[\u0661, \u0662]", "9" * 5000],
)  # fmt: skip
def test_parse_group_sizes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="group_sizes must be a list of integers such as"):
        parse_group_sizes(text)


def test_parsing_long_text_takes_linear_time() -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="group_sizes must be a list of integers such as"):
        parse_group_sizes("1" + " " * 200_000 + "x")
    assert time.perf_counter() - start < 1  # a quadratic search takes minutes
