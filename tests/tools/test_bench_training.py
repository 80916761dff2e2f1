"""Results of the training attention's benchmark: the same work done in every way, and less memory in ours."""

from __future__ import annotations

import itertools

import pytest
import torch
from lpd_tools.bench.training import DENSE, OURS, PRODUCTS, SLICED, attentions, peak_bytes, time_training
from lpd_tools.bench.training_slices import slices
from test_plain_decode import SMALL

from lpd_ext.schedule import group_sizes


def differentiate(name: str, sizes: list[int], qkv: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    leaf = qkv.detach().requires_grad_()
    output = attentions(sizes)[name](leaf)
    output.backward(grad)
    assert leaf.grad is not None
    return [output.detach(), leaf.grad]


@pytest.mark.parametrize("name", [OURS, SLICED, PRODUCTS])
def test_every_way_computes_the_same(name: str) -> None:
    sizes = group_sizes(256, 12)
    torch.manual_seed(0)
    qkv = torch.randn(2, 513 - sizes[-1], 3, 2, 16)
    grad = torch.randn(2, qkv.shape[1], 32)
    for found, wanted in zip(
        differentiate(name, sizes, qkv, grad), differentiate(DENSE, sizes, qkv, grad), strict=True
    ):
        assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_slices_are_all_rows_once() -> None:
    sizes = group_sizes(256, 20)
    parts = slices(sizes, 64)
    assert len(parts) > 5
    assert [parts[0].context.start, parts[-1].context.stop] == [0, parts[0].query.start]
    assert parts[-1].query.stop == 513 - sizes[-1]
    for before, after in itertools.pairwise(parts):
        assert (before.context.stop, before.query.stop) == (after.context.start, after.query.start)


@pytest.mark.parametrize("name", [DENSE, SLICED, PRODUCTS])
def test_memory_at_its_peak_is_less_than_in_any_other_way(name: str) -> None:
    sizes = group_sizes(256, 20)
    qkv, grad = torch.randn(4, 513 - sizes[-1], 3, 4, 64), torch.randn(4, 513 - sizes[-1], 256)
    ours, other = (peak_bytes(lambda way=way: differentiate(way, sizes, qkv, grad)) for way in (OURS, name))
    assert grad.nbytes + qkv.nbytes < ours < other


def test_training_results() -> None:
    results = {result.operator: result for result in time_training(SMALL, 2, 3)}
    assert list(results) == [prefix + way for prefix in ("", "block, ") for way in (OURS, DENSE, SLICED, PRODUCTS)]
    for result in results.values():
        assert len(result.seconds) == 3
        assert set(result.ratios) == {DENSE, SLICED, PRODUCTS}
        assert "MB" in result.note
    assert results[DENSE].ratios[DENSE] == 1
