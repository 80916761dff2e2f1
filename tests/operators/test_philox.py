"""The random numbers: Philox4x32-10 against the known answers of Random123, and the kernels' use of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lpd_ext import ops, reference


def words(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# kat_vectors of Random123: counter, key, result.
KNOWN_ANSWERS = [
    (words(0, 0, 0, 0), words(0, 0), words(0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        words(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        words(0xFFFFFFFF, 0xFFFFFFFF),
        words(0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        words(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        words(0xA4093822, 0x299F31D0),
        words(0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Seed 0 gives word 0 of its smallest and largest 24 bits at these cells (found by search).
SMALLEST, LARGEST = 14883995, 38471471


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: Tensor, key: Tensor, result: Tensor) -> None:
    assert reference.philox4x32_10(counter, key).tolist() == result.tolist()


def test_known_answers_as_a_batch() -> None:
    counters, keys, results = (torch.stack(column) for column in zip(*KNOWN_ANSWERS, strict=True))
    assert reference.philox4x32_10(counters, keys).equal(results)


def test_layout_of_key_and_counter() -> None:
    """Key = (low, high half of the seed), counter = (cell, draw index, 0, domain); 24 bits of word 0."""
    seed = 0x299F31D0A4093822
    expected = reference.philox4x32_10(words(7, 3, 0, 1), words(0xA4093822, 0x299F31D0))[0].item() >> 8
    drawn = reference.uniform(torch.tensor([seed]), torch.tensor([7]), draw=3, domain=1)
    assert drawn.dtype == torch.float32
    assert drawn.item() * 2**24 == expected


def test_every_part_of_the_key_matters() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (1 << 32, 0, 0, 0), (-1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    drawn = [reference.uniform(words(seed), words(cell), draw, domain).item() for seed, cell, draw, domain in keys]
    assert len(set(drawn)) == len(keys)
    assert all(0 <= u < 1 for u in drawn)
    assert reference.uniform(words(0, 0), words(SMALLEST, LARGEST)).tolist() == [0.0, 1 - 2.0**-24]


def draw(logits: Tensor, seed: Tensor, cell: Tensor, device: torch.device) -> Tensor:
    """Tokens drawn from one row of logits [1, V]."""
    rows = torch.zeros(len(seed), dtype=torch.int32)
    ones = torch.ones(len(seed))
    args = (rows, rows - 1, ones, ones, None, None, seed, cell)
    return ops.sample_tokens(logits.to(device), *(a if a is None else a.to(device) for a in args)).cpu()


def test_kernel_draws_the_same_uniforms(backend: torch.device) -> None:
    """From equal logits, each bit of the token is the top bit of its level's word."""
    generator = torch.Generator().manual_seed(1)
    seed = torch.randint(-(2**63), 2**63 - 1, (4096,), generator=generator)
    seed[:8] = torch.tensor([0, 1, -1, 2**32, 2**32 - 1, -(2**63), 2**63 - 1, 2**31])
    cell = torch.randint(0, 65536, (4096,), generator=generator)
    cell[-2:] = torch.tensor([0, 2**32 - 1])
    expected = torch.zeros(4096, dtype=torch.int64)
    for level in range(12):
        top_bit = reference.philox_words(seed, cell, level // 4, domain=0)[:, level % 4] >> 31
        expected = 2 * expected + top_bit
    assert draw(torch.zeros(1, 4096), seed, cell, backend).equal(expected)


def test_kernel_uses_all_24_bits(backend: torch.device) -> None:
    """2^23 tokens of equal weight on the left and one on the right: of all u, only 1 - 2^-24 goes right."""
    logits = torch.full((1, 2**24), float("-inf"), dtype=torch.float16)
    logits[0, : 2**23 + 1] = 0
    assert draw(logits, torch.tensor([0]), torch.tensor([LARGEST]), backend).tolist() == [2**23]
    assert draw(logits, torch.tensor([0]), torch.tensor([SMALLEST]), backend).item() < 2**23
