"""`lpd bench --part products`: both sides compute the same, times are kept for decodes, other devices are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lpd_tools.bench import run as bench_run
from lpd_tools.bench.products import ROWS, product_cases, products_of
from lpd_tools.bench.run import run_bench
from lpd_tools.bench.settings import Bench, Part
from lpd_tools.bench.timing import Times

from lpd_ext import ops, product_choice, product_table
from lpd_ext.model import LPDConfig
from lpd_ext.products import ROW_CLASSES

CPU = torch.device("cpu")
WEIGHTS = {"qkv": 192 * 64, "proj": 64 * 64, "fc1": 256 * 64, "fc2": 64 * 256, "head": 96 * 64}


class SmallShape:
    """Returns a shape like the bench's, of a model with little to multiply."""

    config = LPDConfig(64, 1, 2, vocab_size=96, num_classes=5, grid=(4, 4))


@pytest.mark.parametrize("layer", WEIGHTS)
def test_both_sides_compute_the_same(layer: str) -> None:
    product = products_of(SmallShape, torch.bfloat16)[layer]
    found = list(product_cases(layer, product, CPU))
    assert [case.name for case in found] == [f"{layer}, {rows} rows" for rows in ROWS]
    for rows, case in zip(ROWS, found, strict=True):
        assert case.gigaflops == pytest.approx(2e-9 * rows * WEIGHTS[layer])
        assert 1e9 * case.gigabytes > 2 * WEIGHTS[layer]
        if rows > 40:
            continue
        ours, library = case.ours(), case.plain()
        if isinstance(ours, tuple):  # what is left to the layer that follows, against the whole LayerNorm
            scaled, statistics = ours
            assert scaled.shape == library.shape == (rows, 64)
            assert statistics.shape == (rows, 2, 2)
            assert scaled.isfinite().all()
        else:
            torch.testing.assert_close(ours, library, rtol=0.02, atol=0.02)


def test_every_number_of_rows_that_is_chosen_for_is_timed() -> None:
    assert set(ROWS) >= {4, 16, 40, 80, 160, 320, 640, 1280, 2560, *ROW_CLASSES}


def test_times_are_kept_for_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card whose place the CPU takes, where our own are faster up to 80 rows."""
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(product_table, "card_of", lambda _: ("NVIDIA H200", "9.0", "570", "2.11", "0.1.0"))
    monkeypatch.setitem(bench_run.SHAPES, "L-256-20", SmallShape)
    product_choice.forget()
    rows = iter(ROWS * 5)

    def timed(functions: Sequence[Callable[[], object]], *_: object, **__: object) -> list[Times]:
        own = 1.0 if next(rows) <= 80 else 3.0
        return [Times([own] * 3), Times([2.0] * 3)]

    monkeypatch.setattr(bench_run, "interleaved", timed)
    monkeypatch.setattr(bench_run, "copy_bandwidth", lambda *_: 1e9)
    run = bench_run._Run.of(Bench(parts=[Part.operators]))
    results = replace(run, dtype=torch.bfloat16).products("L-256-20")
    assert [result.operator for result in results] == [f"{layer}, {n} rows" for layer in WEIGHTS for n in ROWS]
    products = products_of(SmallShape, torch.bfloat16)
    monkeypatch.setattr(bench_run, "interleaved", None)
    product_choice.forget()  # as another process
    pairs = [(products["proj"], products["fc1"]), (products["fc2"], products["head"])]
    assert product_choice.own_rows(pairs, CPU) == [{16, 32, 48, 64, 80}] * 2
    product_choice.forget()


def test_times_of_products_that_are_wrong_are_shown_but_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(product_table, "card_of", lambda _: ("NVIDIA H200", "9.0", "570", "2.11", "0.1.0"))
    monkeypatch.setitem(bench_run.SHAPES, "L-256-20", SmallShape)
    monkeypatch.setattr(ops, "normed_linear", lambda *rest: 0.5 * torch.ops.lpd_ext.normed_linear(*rest))
    monkeypatch.setattr(bench_run, "interleaved", lambda *_, **__: [Times([1.0] * 3), Times([2.0] * 3)])
    monkeypatch.setattr(bench_run, "copy_bandwidth", lambda *_: 1e9)
    run = replace(bench_run._Run.of(Bench(parts=[Part.operators])), dtype=torch.bfloat16)
    assert len(run.products("L-256-20")) == len(WEIGHTS) * len(ROWS)
    told = " ".join(capsys.readouterr().out.split())
    wrong = "residual 64x64 bfloat16 and normed_gelu 256x64 bfloat16 of 16 rows are not what the library computes"
    assert f"times are not kept: {wrong}" in told
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_these_kernels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"part products needs device cuda of compute capability 9.0 or newer: it "):
        run_bench(Bench(parts=[Part.products]))
    assert list(tmp_path.iterdir()) == []
