"""The benchmark's baseline computes what the library computes, so that its time is that of the same work."""

from __future__ import annotations

import pytest
import torch
from lpd_tools.bench_cases import Shape
from lpd_tools.commands_bench import _time_decodes
from lpd_tools.plain_decode import decode_plain
from rich.console import Console
from test_sampler import random_model, request_for

from lpd_ext.model import LPDConfig
from lpd_ext.sampler import generate


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sizes", [[1, 2, 3, 6], [12], [1] * 12])
def test_published_style_draws_the_same_tokens(sizes: list[int], guidance_scale: float) -> None:
    model = random_model(32, (3, 4))
    request = request_for(model, [sizes] * 2, guidance_scale=[guidance_scale] * 2, top_k=[1] * 2)
    plain = decode_plain(model, torch.tensor(request.labels), sizes, request.orders, guidance_scale, top_k=1)
    assert torch.equal(plain, generate(model, request))


def test_published_style_filters() -> None:
    model = random_model(32, (3, 4))
    request = request_for(model, [[12]] * 2)
    drawn = [
        decode_plain(model, torch.tensor(request.labels), [12], request.orders, 1.0, top_k=None, top_p=1e-6),
        decode_plain(model, torch.tensor(request.labels), [12], request.orders, 1.0, top_k=1, top_p=None),
    ]
    assert torch.equal(*drawn)


class SmallShape(Shape):
    """The steps of a named shape, for a model that is quick."""

    @property
    def config(self) -> LPDConfig:
        return LPDConfig(64, depth=1, heads=2, vocab_size=50, num_classes=3, grid=self.grid)


def test_decodes_are_timed_against_the_baseline() -> None:
    shape = SmallShape(grid=(4, 4), steps=4, step=2, guidance_scale=3.0, repulsion_threshold=1)
    (row,) = _time_decodes(shape, 2, torch.device("cpu"), torch.float32, Console(quiet=True))
    assert row["operator"] == "decode"
    assert len(row["seconds"]) == len(row["plain_seconds"]) == 3
    assert min(row["seconds"] + row["plain_seconds"]) > 0
