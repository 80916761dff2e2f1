"""Results of the tokenizer's benchmark, at a size that takes no time."""

from __future__ import annotations

import pytest
from lpd_tools.bench import tokenizer as bench_tokenizer

from lpd_ext.tokenizer import TokenizerConfig


def test_decode_results() -> None:
    results = bench_tokenizer.decode_results(2, 3, TokenizerConfig(32, (1, 1, 1), 32, 16, 4, 1, 1))
    assert [row.operator for row in results] == [
        "decode, plain in channels_last",
        "decode, PixelDecoder",
        "decode, PixelDecoder bfloat16",
    ]
    for row in results:
        assert row.batch == 2
        assert len(row.seconds) == len(row.plain_seconds) == 3
        assert row.ratio > 0
        assert row.decibels > (40 if "bfloat16" in row.operator else 90)


def test_convolution_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tokenizer, "CONVOLUTIONS", ((32, 48, 8, False), (32, 32, 8, True)))
    results = bench_tokenizer.convolution_results(1, 3)
    assert [row.operator for row in results] == [
        "conv3x3 32 to 48, 8 px",
        "conv3x3 32 to 48, 8 px, bfloat16",
        "conv3x3 32 to 32, 8 px, x2",
        "conv3x3 32 to 32, 8 px, x2, bfloat16",
    ]
    assert all(row.gigaflops_per_second > 0 and len(row.seconds) == 3 for row in results)
