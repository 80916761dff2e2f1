"""Numbers that operators hold in 32 bits or loop over: each is refused by name where it does not fit, or costs nothing.

Tensors without elements may have any size, so what only an element would show must be checked before.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lpd_ext import ops
from lpd_ext.packing import pack_weight

SECONDS = 5  # for what takes none, on a machine that is busy


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Makes zeros of any shape that take no memory: without an element, or one row over and over."""
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros(*(1 for _ in shape[1:]), shape[-1], dtype=dtype).expand(shape)


def segments(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 6)


def empty_caches(slots: int, heads: int, positions: int) -> tuple[Tensor, Tensor]:
    return nothing(slots, heads, positions, 32), nothing(slots, heads, positions, 32)


def attention(rows: int, heads: int, cache: tuple[Tensor, Tensor], *rest: Any) -> tuple[Any, ...]:
    return (nothing(rows, 3, heads, 32), *cache, *rest)


def long(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BIG = 2**31
SMALL = tuple(torch.zeros(2, 1, 4, 32) for _ in range(2))
ONE = segments([0, 1, 1, 0, 0, 0])
# Operator, arguments, and what is said; None: it is accepted, at once.
CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]], str | None]] = {
    "rows of no heads": (
        "append_kv",
        lambda: attention(BIG - 1, 0, empty_caches(1, 0, 1), segments(), 1),
        None,
    ),
    "more rows of no heads": (
        "append_kv",
        lambda: attention(BIG, 0, empty_caches(1, 0, 1), segments(), 1),
        "qkv: R must be in [0, 2^31), got 2147483648",
    ),
    "slots of no heads": (
        "append_kv",
        lambda: attention(1, 0, empty_caches(BIG - 1, 0, 1), segments([0, 1, 1, 0, 0, 5]), 1),
        None,
    ),
    "more slots of no heads": (
        "append_kv",
        lambda: attention(1, 0, empty_caches(2**33, 0, 1), segments(), 1),
        "k_cache: S must be in [0, 2^31), got 8589934592",
    ),
    "positions of no slots": (
        "append_kv",
        lambda: attention(1, 1, empty_caches(0, 1, BIG), segments(), 1),
        "k_cache: P must be in [0, 2^31), got 2147483648",
    ),
    "an expanded qkv": (
        "append_kv",
        lambda: attention(2**33, 1, SMALL, ONE, 1),
        "qkv: R must be in [0, 2^31), got 8589934592",
    ),
    "a smaller expanded qkv": ("append_kv", lambda: attention(BIG - 1, 1, SMALL, ONE, 1), None),
    "heads": (
        "append_kv",
        lambda: attention(1, BIG, empty_caches(0, BIG, 1), segments(), 1),
        "qkv: H must be in [0, 2^31), got 2147483648",
    ),
    "heads of many segments": (
        "append_kv",
        lambda: attention(1, BIG - 1, empty_caches(0, BIG - 1, 1), segments(*[[0] * 6] * 2), 1),
        "segments: Q times H must be in [0, 2^31), got 4294967294",
    ),
    "max_rows": (
        "append_kv",
        lambda: attention(1, 1, SMALL, ONE, BIG),
        "max_rows must be in [0, 2^31), got 2147483648",
    ),
    "rows that one may have": ("append_kv", lambda: attention(1, 1, SMALL, ONE, BIG - 1), None),
    "attention over an expanded qkv": (
        "group_attention",
        lambda: attention(2**33, 1, SMALL, ONE, 1, 1, 2**33),
        "qkv: R must be in [0, 2^31), got 8589934592",
    ),
    "rows and keys that one may have": (
        "group_attention",
        lambda: attention(1, 1, SMALL, ONE, BIG - 1, BIG - 1, 0),
        None,
    ),
    "max_keys": (
        "group_attention",
        lambda: attention(1, 1, SMALL, ONE, 1, 2**32 + 1, 0),
        "max_keys must be in [0, 2^31), got 4294967297",
    ),
    "first_output_row": (
        "group_attention",
        lambda: attention(1, 1, SMALL, ONE, 1, 1, 2**32),
        "first_output_row must be in [0, 1], got 4294967296",
    ),
    "scale beyond float32": (
        "group_attention",
        lambda: attention(1, 1, SMALL, ONE, 1, 1, 0, 1e300),
        "scale must be finite in float32, got 1e+300",
    ),
    "rows without elements": (
        "residual_layer_norm",
        lambda: (nothing(2**40, 0), nothing(2**40, 0), torch.zeros(0), torch.zeros(0)),
        None,
    ),
    "seeds of nothing": (
        "locality_order",
        lambda: (nothing(0, 2**40, dtype=torch.int32), 2, 2, 1.0, 1, long()),
        "group_sizes: T must be in [0, 2^31), got 1099511627776",
    ),
    "a grid": (
        "locality_order",
        lambda: (int32(4), 2**32 + 2, 2, 1.0, 1, long(0)),
        "height and width must be >= 1 with at most 65536 cells, got 4294967298 x 2",
    ),
    "repulsion": ("locality_order", lambda: (int32(4), 2, 2, 1.0, 2**63 - 1, long(0)), None),
}
ON_CPU: dict[str, tuple[str, Callable[[], tuple[Any, ...]], str | None]] = {
    "groups of no channels": (
        "group_norm_scale_shift",
        lambda: (nothing(1, 1, 1, 0), nothing(0), nothing(0), 2**32, 1e-6),
        "num_groups must be in [0, 2^31), got 4294967296",
    ),
    "fewer groups of no channels": (
        "group_norm_scale_shift",
        lambda: (nothing(1, 1, 1, 0), nothing(0), nothing(0), BIG - 1, 1e-6),
        None,
    ),
    "pixels of no channels": (
        "group_norm_scale_shift",
        lambda: (nothing(1, BIG - 1, BIG - 1, 0), nothing(0), nothing(0), 1, 1e-6),
        None,
    ),
    "pixels of no images": (
        "group_norm_scale_shift",
        lambda: (nothing(0, 2**40, 1, 1), torch.zeros(1), torch.zeros(1), 1, 1e-6),
        "x: H must be in [0, 2^31), got 1099511627776",
    ),
    "images without pixels": (
        "conv3x3",
        lambda: (
            nothing(2**40, 0, 1, 16),
            torch.zeros(3, 3, 16, 1),
            torch.zeros(1),
            None,
            nothing(2**40, 0, 1, 1),
        ),
        "x: B must be in [0, 2^31), got 1099511627776",
    ),
    "codes of preview_pixels": (
        "preview_pixels",
        lambda: (
            torch.full((1, 1, 1), -1),
            nothing(0, BIG - 1),
            nothing(3, 3, BIG, 0),
            nothing(0),
            nothing(3, 3, 0, 0),
            nothing(0),
            nothing(0, 1, 1, 3),
            torch.zeros(1, 1, 3),
        ),
        "codebook: d must be at most 1048576, got 2147483647",
    ),
    "rows of quantize_rows": (
        "quantize_rows",
        lambda: (nothing(2**33, 64),),
        "x: R must be in [0, 2^31), got 8589934592",
    ),
    "columns of quantize_rows": (
        "quantize_rows",
        lambda: (nothing(0, 2**40),),
        "x: K must be in [0, 2^31), got 1099511627776",
    ),
    "levels": ("quantize_rows", lambda: (nothing(1, 1), 2**32 + 1), "levels must be in [1, 255], got 4294967297"),
    "planes": (
        "quantize_rows",
        lambda: (nothing(1, 1), 255, False, 2**32 + 1),
        "planes must be 1 or 2, got 4294967297",
    ),
    "planes of packed_linear_int8": (
        "packed_linear_int8",
        lambda: (
            nothing(0, 4, dtype=torch.uint8),
            nothing(0, 2),
            pack_weight(torch.zeros(1, 4, dtype=torch.int8)),
            *3 * (torch.zeros(1),),
            2**32 + 1,
        ),
        "planes must be 1 or 2, got 4294967297",
    ),
    "columns of packed_linear": (
        "packed_linear",
        lambda: (nothing(0, 2**40), nothing(1, 2**40, 32, 1), None, 1),
        "x: K must be in [0, 2^31), got 1099511627776",
    ),
    "channels of packed_linear": (
        "packed_linear",
        lambda: (nothing(0, 1), nothing(2**27, 1, 32, 1), None, 2**32),
        "out_features must be in [0, 2^31), got 4294967296",
    ),
    "rows of training_attention": (
        "training_attention",
        lambda: (nothing(0, 2**32 + 2, 3, 1, 8), int32(1)),
        "qkv: rows must be in [0, 2^31), got 4294967298",
    ),
    "heads of training_attention": (
        "training_attention",
        lambda: (nothing(0, 2, 3, BIG, 8), int32(1)),
        "qkv: H must be in [0, 2^31), got 2147483648",
    ),
    "scale of training_attention": (
        "training_attention",
        lambda: (nothing(1, 2, 3, 1, 8), int32(1), True, -1e39),
        "scale must be finite in float32, got -1e+39",
    ),
}


def _call(name: str, case: tuple[str, Callable[[], tuple[Any, ...]], str | None], answer: Any) -> None:
    operator, arguments, _ = case
    try:
        getattr(ops, operator)(*arguments())
        answer.send(None)
    except RuntimeError as error:
        answer.send(str(error))


def check(name: str, cases: dict[str, Any]) -> None:
    """In a process of its own: some of these were deadly, and others would have run for hours."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_call, args=(name, cases[name], sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(SECONDS), "it takes too long"
        said = receiver.recv()
    except EOFError:
        process.join()
        pytest.fail(f"it died: {process.exitcode}")
    finally:
        process.kill()
        process.join()
    assert said == cases[name][2]


@pytest.mark.parametrize("name", CASES)
def test_numbers_out_of_range_are_named(name: str, host_backend: torch.device) -> None:
    check(name, CASES)


@pytest.mark.parametrize("name", ON_CPU)
def test_numbers_out_of_range_are_named_on_the_cpu(name: str, cpu_backend: torch.device) -> None:
    check(name, ON_CPU)
