"""append_kv: a copy, bit for bit, that touches nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from steps import (
    BAD_ARGUMENTS,
    BAD_SEGMENTS,
    RAGGED,
    Layout,
    Row,
    assert_same_caches,
    check_append_kv,
    check_refused,
    make_step,
    random_layouts,
)
from torch import Tensor

from lpd_ext import ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 256])
@pytest.mark.parametrize("strided", [False, True])
def test_ragged_batch(
    backend: torch.device, on_cuda_kernels: bool, head_dim: int, dtype: torch.dtype, strided: bool
) -> None:
    step = make_step(RAGGED, head_dim=head_dim, dtype=dtype, strided=strided, cuda=on_cuda_kernels)
    check_append_kv(step, ops.append_kv, backend)


@pytest.mark.parametrize("seed", range(10))
def test_random_ragged_batches(backend: torch.device, on_cuda_kernels: bool, seed: int) -> None:
    generator = random.Random(seed)
    heads, strided = generator.choice([1, 3]), generator.random() < 0.5
    step = make_step(random_layouts(seed), heads=heads, seed=seed, strided=strided, cuda=on_cuda_kernels)
    check_append_kv(step, ops.append_kv, backend)


@pytest.mark.parametrize(
    "layout", [Layout(1, 0, 0), Layout(0, 2, 5), Layout(0, 0, 0), Layout(70, 0, 0), Layout(1, 1, 99)]
)
def test_one_sequence(backend: torch.device, layout: Layout) -> None:
    check_append_kv(make_step([layout]), ops.append_kv, backend)


def test_no_sequence(backend: torch.device) -> None:
    check_append_kv(make_step([]), ops.append_kv, backend)


def test_every_bit_pattern_survives(backend: torch.device) -> None:
    for dtype, integer in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        step = make_step([Layout(64, 3, 2)], head_dim=64, dtype=dtype)
        info = torch.iinfo(integer)
        random_bits = torch.randint(info.min, info.max, step.qkv.shape, dtype=torch.int64).to(integer)
        check_append_kv(replace(step, qkv=random_bits.view(dtype)), ops.append_kv, backend)


def test_agrees_with_group_attention(backend: torch.device, on_cuda_kernels: bool) -> None:
    step = make_step(RAGGED, head_dim=64, strided=True, cuda=on_cuda_kernels)
    appended, attended = step.copy(backend), step.copy(backend)
    ops.append_kv(*appended.append_arguments())
    ops.group_attention(*attended.arguments())
    assert_same_caches(appended, attended)


# ---- the comparison can fail ----


def mistaken(shift: int = 0, parts: tuple[int, int] = (1, 2), extra: int = 0, slot: int = 0) -> Callable[..., None]:
    """The twin with a mistake in where or what it writes."""

    def append_kv(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, segments: Tensor, max_rows: int) -> None:
        for row in (Row(*values) for values in segments.tolist()):
            count = max(0, row.num_context + extra)
            start = row.cache_length + shift
            for part, cache in zip(parts, (k_cache, v_cache), strict=True):
                rows = qkv[row.context_start : row.context_start + count, part].transpose(0, 1)
                cache[(row.cache_slot + slot) % len(cache), :, start : start + count] = rows

    return append_kv


@pytest.mark.parametrize(
    "mistake",
    [{"shift": 1}, {"shift": -1}, {"parts": (2, 1)}, {"parts": (0, 2)}, {"extra": 1}, {"extra": -1}, {"slot": 1}],
    ids=str,
)
def test_planted_mistakes_are_rejected(mistake: dict[str, Any]) -> None:
    step = make_step([Layout(3, 4, 5), Layout(2, 3, 4)])
    with pytest.raises(AssertionError):
        check_append_kv(step, mistaken(**mistake), torch.device("cpu"))


def test_planting_alone_changes_nothing() -> None:
    step = make_step([Layout(3, 4, 5), Layout(2, 3, 4)])
    check_append_kv(step, mistaken(), torch.device("cpu"))
    check_append_kv(step, reference.append_kv, torch.device("cpu"))


# ---- wrong arguments ----

ATTENTION_ONLY = {"first_output_row < 0", "first_output_row > R", "scale", "max_keys", "rows left out"}


@pytest.mark.parametrize("name", sorted(BAD_ARGUMENTS.keys() - ATTENTION_ONLY))
def test_wrong_arguments_raise_and_write_nothing(backend: torch.device, name: str) -> None:
    check_refused(lambda step: ops.append_kv(*step.append_arguments()), *BAD_ARGUMENTS[name], backend)


@pytest.mark.parametrize("name", sorted(BAD_SEGMENTS.keys() - ATTENTION_ONLY))
def test_wrong_segments_raise_and_write_nothing(host_backend: torch.device, name: str) -> None:
    check_refused(lambda step: ops.append_kv(*step.append_arguments()), *BAD_SEGMENTS[name], host_backend)


def test_opcheck(backend: torch.device) -> None:
    step = make_step(RAGGED).copy(backend)
    step.k_cache.nan_to_num_()  # opcheck compares caches with themselves
    step.v_cache.nan_to_num_()
    torch.library.opcheck(ops._ops.append_kv.default, step.append_arguments())


def test_one_cache_for_both_is_refused(backend: torch.device) -> None:
    cache = torch.zeros(1, 2, 4, 32, device=backend)
    segments = torch.tensor([[0, 1, 1, 0, 0, 0]], dtype=torch.int32, device=backend)
    with pytest.raises(RuntimeError, match="v_cache is written, so it must not share memory with k_cache"):
        ops.append_kv(torch.ones(1, 3, 2, 32, device=backend), cache, cache, segments, 1)
    assert not cache.any()
