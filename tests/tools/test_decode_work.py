"""Counted work against sums made by hand, and against the parameters of real models."""

from __future__ import annotations

import pytest
from lpd_tools.bench.decode_work import Peaks, StepWork, bound_by_bytes, count, least_seconds, linear_parameters

from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.quantize import quantize

TINY = LPDConfig(16, 2, 2, vocab_size=32, num_classes=3, grid=(2, 2))  # E = 16, L = 2, D = 8


def test_two_steps_by_hand() -> None:
    first, second = count(TINY, 1, [1, 3]).steps
    weights = 2 * 12 * 16 * 16 + 16 * 32
    launches = 2 * 8 + 4
    # Two sequences. Step 0: one context row and one query row each, nothing cached. The context row passes qkv in both
    # blocks and the rest in the first one only.
    multiplications = 4 * 2 * 3 * 256 + (4 + 2) * 9 * 256 + 2 * 16 * 32
    pairs = 2 * (2 * 2 + 1 * 1)  # the query sees 2 in both blocks, the context row itself in one
    assert first == StepWork(4 * weights, 4 * 2 * 2 * 16 * 2 * 2, 2 * multiplications, 4 * 16 * pairs, launches)
    # Step 1: one context row, three query rows, one position cached.
    multiplications = 8 * 2 * 3 * 256 + (8 + 6) * 9 * 256 + 6 * 16 * 32
    pairs = 2 * (2 * 3 * 5 + 1 * 2)
    assert second == StepWork(4 * weights, 4 * 2 * 2 * 16 * 2 * 5, 2 * multiplications, 4 * 16 * pairs, launches)


def test_memory_by_hand() -> None:
    work = count(TINY, 3, [1, 3])
    assert work.cache_bytes == 4 * 2 * 2 * 6 * 16 * 2  # K and V, two blocks, six sequences, two positions
    assert work.activation_bytes == 4 * 24 * 16 * 7  # step 1: residual stream, norm, hidden rows and their result
    assert count(TINY, 3, [1, 3], "bfloat16").cache_bytes == work.cache_bytes // 2
    assert work.resident_bytes == work.model_bytes + work.cache_bytes + work.activation_bytes


def test_totals_add_the_steps_up() -> None:
    work = count(TINY, 1, [1, 1, 2])
    assert work.total("weight_bytes") == 3 * 4 * linear_parameters(TINY)
    assert work.total("linear_flops") == sum(step.linear_flops for step in work.steps)


@pytest.mark.parametrize("config", [TINY, LPDConfig(24, 1, 3, 7, 5, (2, 3), mlp_ratio=2)])
def test_parameters_are_those_of_the_model(config: LPDConfig) -> None:
    model = LPDModel(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = [1] * config.num_tokens
    assert count(config, 1, sizes).parameters == parameters
    assert count(config, 1, sizes).model_bytes == 4 * parameters
    assert count(config, 1, sizes, "bfloat16").model_bytes == 2 * parameters
    held = 0
    for name, value in (
        quantize(model).state_dict().items()
    ):  # an int8 layer keeps a sum and a zero point beside a scale
        held += value.numel() * value.element_size() * (3 if name.endswith("rotated_scale") else 1)
    assert count(config, 1, sizes, "int8").model_bytes == held


@pytest.mark.parametrize(("name", "millions"), [("lpd_l", 337), ("lpd_xl", 752)])
def test_published_sizes(name: str, millions: int) -> None:
    assert count(LPDConfig.preset(name), 1, [128, 128]).parameters == pytest.approx(1e6 * millions, rel=2e-3)


def test_the_least_time_takes_the_slower_of_bytes_and_operations() -> None:
    work = count(TINY, 1, [1, 3])
    weights, flops = work.total("weight_bytes"), work.total("linear_flops")
    keys, pairs, launches = (work.total(n) for n in ("key_value_bytes", "attention_flops", "launches"))
    by_bytes, by_flops = Peaks("", 1.0, 1e9, 1e9), Peaks("", 1e9, 1.0, 1.0, seconds_per_launch=2.0)
    assert least_seconds(work, by_bytes) == pytest.approx(weights + keys)
    assert least_seconds(work, by_flops) == pytest.approx(flops + pairs + 2 * launches)
    assert (bound_by_bytes(work, by_bytes), bound_by_bytes(work, by_flops)) == (1, 0)
