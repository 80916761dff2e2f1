"""`lpd bench --part products`: both sides compute the same, and a device without such kernels is refused."""

from __future__ import annotations

import pytest
import torch
from lpd_tools.bench.products import product_cases
from lpd_tools.bench.run import run_bench
from lpd_tools.bench.settings import Bench, Part

from lpd_ext.model import LPDConfig


class SmallShape:
    """As the bench's shapes are, of a model with little to multiply."""

    config = LPDConfig(64, 1, 2, vocab_size=96, num_classes=5, grid=(4, 4))


@pytest.mark.parametrize("rows", [1, 20])
def test_both_sides_compute_the_same(rows: int) -> None:
    torch.manual_seed(0)
    found = list(product_cases(SmallShape, torch.device("cpu"), torch.bfloat16, rows))
    assert [case.name for case in found] == [f"{name}, {rows} rows" for name in ("qkv", "proj", "fc1", "fc2", "head")]
    for case in found:
        ours, library = case.ours(), case.plain()
        if isinstance(ours, tuple):  # what is left to the layer that follows, against the whole LayerNorm
            scaled, statistics = ours
            assert scaled.shape == library.shape == (rows, 64)
            assert statistics.shape == (rows, 2, 2)
            assert scaled.isfinite().all()
        else:
            torch.testing.assert_close(ours, library, rtol=0.02, atol=0.02)
    weights = {"qkv": 192 * 64, "proj": 64 * 64, "fc1": 256 * 64, "fc2": 64 * 256, "head": 96 * 64}
    for case, size in zip(found, weights.values(), strict=True):
        assert case.gigaflops == pytest.approx(2e-9 * rows * size)
        assert 1e9 * case.gigabytes > 2 * size


def test_a_device_without_these_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"part products needs device cuda of compute capability 9.0 or newer"):
        run_bench(Bench(parts=[Part.products]))
