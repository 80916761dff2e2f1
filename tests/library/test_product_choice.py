"""Own products or the library's: what is faster is chosen, by one measurement that later decodes and processes read.

Times come from a stand-in here; what is timed is run, by the CPU's kernels or those of CUDA.
"""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_few_rows import few_rows_of, logits_of, products, request_for, small_model

from lpd_ext import ops, product_choice, product_table
from lpd_ext import products as timed_products
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.product_choice import known_own_rows, own_rows, row_class
from lpd_ext.products import ROW_CLASSES, Product, Times, product_calls, random_weights, step_products
from lpd_ext.sampler import generate

CARD = ("NVIDIA H200", "9.0", "570.124.06", "2.11.0+cu130", "0.1.0")
CPU = torch.device("cpu")
HEADER = Path(__file__).parents[2] / "csrc/kernels/few_row_product/few_row_product.h"
RESIDUAL, NORMED = (Product(kind, 64, 64, torch.bfloat16) for kind in ("residual", "normed"))
__all__ = ["products"]  # a fixture


class Timer:
    """A stand-in for the card: gives the times of own product and library, in turn, that it is told to."""

    def __init__(self, times: Callable[[int], tuple[float, float]]) -> None:
        self.times, self.calls = times, 0

    def __call__(self, runs: Sequence[Callable[[], None]]) -> list[float]:
        for run in runs:
            run()
        seconds = self.times(self.calls)
        self.calls += 1
        return list(seconds)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose place the CPU takes."""
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(product_table, "card_of", lambda _: CARD)
    product_choice.forget()
    yield
    product_choice.forget()


def by_rows(*own_is_faster: int) -> Callable[[int], tuple[float, float]]:
    return lambda call: (1.0, 2.0) if ROW_CLASSES[call % len(ROW_CLASSES)] in own_is_faster else (2.0, 1.0)


def test_classes_are_the_numbers_of_rows_that_kernels_have_tiles_for() -> None:
    """product_plan takes as few tiles as can be, and those as small as can be."""
    found = re.search(r"kProductRows\[\] = \{([\d, ]+)\}", HEADER.read_text(encoding="utf-8"))
    assert found is not None
    tiles = [int(rows) for rows in found[1].split(",")]
    for rows in range(1, ROW_CLASSES[-1] + 1):
        count = min(-(-rows // tile) for tile in tiles)
        assert row_class(rows) == count * min(tile for tile in tiles if -(-rows // tile) == count)
    assert row_class(ROW_CLASSES[-1] + 1) is None


@pytest.mark.parametrize("kind", ["residual", "normed", "normed_gelu"])
@pytest.mark.parametrize("rows", [1, 20])
def test_both_ways_compute_the_same(kind: str, rows: int) -> None:
    before = torch.get_rng_state()
    product = Product(kind, 96, 64, torch.bfloat16)
    calls = product_calls(product, rows, random_weights(product, CPU, least=2))
    assert torch.get_rng_state().equal(before)
    first, second = calls.weights
    assert not first.equal(second)
    if kind == "residual":  # which adds to the stream that the next call finds
        scaled, statistics = calls.own(first)
        assert scaled.shape == calls.library(first).shape == (rows, 96)
        assert statistics.shape == (rows, 3, 2)
    elif kind == "normed":  # a shift alone, which the slope has no part in: the mean is 0
        torch.testing.assert_close(calls.own(first), calls.library(first), rtol=0.02, atol=0.02)
    else:
        torch.testing.assert_close(calls.own(second), calls.library(second), rtol=0.02, atol=0.02)
        assert calls.own(first).min() > -0.2


def test_runs_are_timed_in_turn_by_their_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card whose clock the runs turn: each takes longest in its first replay, which is left out."""
    now, in_turn = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            """Nothing is under way."""

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def taking(*milliseconds: float) -> Callable[[], None]:
        replays = iter(milliseconds)

        def run() -> None:
            in_turn.append(milliseconds[0])
            now[0] += next(replays)

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timed_products, "capture_cuda_graphs", lambda runs: runs)
    runs = [taking(90.0, 5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 60.0), taking(80.0, *[7.0] * 7)]
    assert timed_products.time_runs(runs) == pytest.approx([4e-3, 7e-3])
    assert in_turn == [90.0, 80.0] * 8


def test_what_is_faster_is_chosen(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(by_rows(16, 48))
    monkeypatch.setattr(timed_products, "time_runs", timer)
    pairs = [(RESIDUAL, NORMED)]
    assert known_own_rows(pairs, CPU) == [None]
    assert own_rows(pairs, CPU) == [{16, 48}] == known_own_rows(pairs, CPU)
    assert timer.calls == 2 * len(ROW_CLASSES)
    own_rows(pairs, CPU)
    product_choice.forget()  # as another process
    assert own_rows(pairs, CPU) == [{16, 48}]
    assert timer.calls == 2 * len(ROW_CLASSES)


@pytest.mark.parametrize(("own", "chosen"), [(1.0, False), (0.97, False), (0.94, True), (1.2, False)])
def test_ties_within_noise_go_to_the_library(
    own: float, chosen: bool, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_products, "time_runs", Timer(lambda _: (own, 1.0)))
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set(ROW_CLASSES) if chosen else set()]


def test_the_sum_of_a_pair_decides(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual layer is faster, by less than the other is slower."""

    def times(call: int) -> tuple[float, float]:
        return (1.0, 2.0) if call < len(ROW_CLASSES) else (3.5, 2.0)

    monkeypatch.setattr(timed_products, "time_runs", Timer(times))
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set()]
    product_choice.remember(NORMED, {rows: Times(2.5, 2.0) for rows in ROW_CLASSES}, CPU)
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set(ROW_CLASSES)]


def test_another_versions_times_are_not_used(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_products, "time_runs", Timer(by_rows(*ROW_CLASSES)))
    own_rows([(RESIDUAL, NORMED)], CPU)
    monkeypatch.setattr(product_table, "card_of", lambda _: (*CARD[:4], "0.2.0"))
    timer = Timer(by_rows())
    monkeypatch.setattr(timed_products, "time_runs", timer)
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set()]
    assert timer.calls


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path))
    timer = Timer(by_rows(*ROW_CLASSES))
    monkeypatch.setattr(timed_products, "time_runs", timer)
    monkeypatch.setenv("LPD_PRODUCTS", "auto")
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set()]
    assert known_own_rows([(RESIDUAL, NORMED)], CPU) == [None]
    product_choice.remember(NORMED, {rows: Times(1.0, 2.0) for rows in ROW_CLASSES}, CPU)
    assert few_rows_of(small_model()) is None
    assert timer.calls == 0
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_that_fails_leaves_the_library(
    card: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> list[float]:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    calls: list[int] = []
    monkeypatch.setattr(timed_products, "time_runs", fail)
    for _ in range(2):
        assert own_rows([(RESIDUAL, NORMED)], CPU) == [set()]
    assert len(calls) == 1
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.getMessage() == "our own products are not used, they could not be timed: CUDA out of memory"


def _half(*arguments: object) -> torch.Tensor:
    return torch.ops.lpd_ext.normed_linear(*arguments) * 0.5


def _adds_nothing(x: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.lpd_ext.residual_linear(x.clone(), *rest)


def _not_a_number(*arguments: object) -> torch.Tensor:
    return torch.ops.lpd_ext.normed_linear(*arguments) * float("nan")


def _leaves_nothing(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    scaled, statistics = torch.ops.lpd_ext.residual_linear(*arguments)
    return torch.zeros_like(scaled), torch.full_like(statistics, float("nan"))


def _without_means(scaled: torch.Tensor, statistics: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.ops.lpd_ext.normed_linear(scaled, statistics * torch.tensor([0.0, 1.0]), *rest)


def _with_slope_7(
    scaled: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor, slope: torch.Tensor, *rest: object
) -> torch.Tensor:
    return torch.ops.lpd_ext.normed_linear(scaled, statistics, weight, torch.full_like(slope, 7.0), *rest)


def _no_shift(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    slope, shift = torch.ops.lpd_ext.fold_layer_norm(*arguments)
    return slope, shift * 0.5


def _unscaled(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, _, statistics = torch.ops.lpd_ext.embed_scaled_rows(*arguments, None, None)
    return x, x.to(torch.bfloat16), statistics


@pytest.mark.parametrize(
    ("operator", "wrong"),
    [
        ("normed_linear", _half),
        ("normed_linear", _not_a_number),
        ("normed_linear", _without_means),
        ("normed_linear", _with_slope_7),
        ("residual_linear", _adds_nothing),
        ("residual_linear", _leaves_nothing),
        ("fold_layer_norm", _no_shift),
        ("embed_scaled_rows", _unscaled),
    ],
)
def test_products_that_are_wrong_on_a_card_are_not_used(
    operator: str, wrong: object, card: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timer = Timer(by_rows(*ROW_CLASSES))
    monkeypatch.setattr(timed_products, "time_runs", timer)
    monkeypatch.setattr(ops, operator, wrong)
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set()]
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    wanted = "residual 64x64 bfloat16 and normed 64x64 bfloat16 of 16 rows are not what the library computes"
    assert record.getMessage() == f"our own products are not used, they could not be timed: {wanted}"
    assert timer.calls == 0


def test_what_another_process_has_measured_meanwhile_is_taken(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(RESIDUAL, NORMED)]
    assert known_own_rows(pairs, CPU) == [None]  # the file is read, and empty
    times = dict.fromkeys(ROW_CLASSES, (1.0, 2.0))
    product_table.add(CARD, {product.name: times for product in pairs[0]})
    timer = Timer(by_rows())
    monkeypatch.setattr(timed_products, "time_runs", timer)
    assert own_rows(pairs, CPU) == [set(ROW_CLASSES)]
    assert timer.calls == 0


def test_nobody_else_measures_at_the_same_time(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another descriptor of the lock's file is as another process."""

    def times(_: int) -> tuple[float, float]:
        place = product_table.path()
        assert place is not None
        with place.with_suffix(".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return 1.0, 2.0

    monkeypatch.setattr(timed_products, "time_runs", Timer(times))
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set(ROW_CLASSES)]


def test_the_log_says_what_is_chosen_once(
    card: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lpd_ext")
    monkeypatch.setattr(timed_products, "time_runs", Timer(by_rows(16, 48)))
    for _ in range(2):
        own_rows([(RESIDUAL, NORMED)], CPU)
    timed, chosen = (record.getMessage() for record in caplog.records)
    assert timed.startswith("timed 2 products on NVIDIA H200 in ")
    names = "residual 64x64 bfloat16 and normed 64x64 bfloat16"
    assert chosen == f"products on NVIDIA H200 for {names}: our own at 16, 48 rows"
    product_choice.forget()  # as another process, which finds them slower
    product_choice.remember(NORMED, {rows: Times(9.0, 1.0) for rows in ROW_CLASSES}, CPU)
    known_own_rows([(RESIDUAL, NORMED)], CPU)
    assert caplog.messages[2:] == [f"products on NVIDIA H200 for {names}: the library's"]


def test_a_measurement_that_takes_too_long_is_given_up(
    card: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(product_choice, "_LONGEST", -1.0)
    monkeypatch.setattr(timed_products, "time_runs", Timer(by_rows(*ROW_CLASSES)))
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [set()]
    assert "our own products are not used, they could not be timed: it takes too long" in caplog.text


def test_weights_are_many_but_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card whose L2 cache holds half of 3, or of 100,000 weights."""
    properties = {"L2_cache_size": 3 * 64 * 64}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    monkeypatch.setattr(timed_products, "_normal", lambda *_: torch.empty)
    cuda = torch.device("cuda")
    assert len(random_weights(NORMED, cuda)) == 3
    assert len(random_weights(NORMED, cuda, least=24)) == 24
    properties["L2_cache_size"] *= 33_333
    assert len(random_weights(NORMED, cuda)) == 256


def test_a_table_that_lacks_a_number_of_rows_is_measured_again(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    product_table.add(CARD, {product.name: {16: (1.0, 2.0)} for product in (RESIDUAL, NORMED)})
    assert known_own_rows([(RESIDUAL, NORMED)], CPU) == [None]
    monkeypatch.setattr(timed_products, "time_runs", Timer(by_rows(192)))
    assert own_rows([(RESIDUAL, NORMED)], CPU) == [{192}]


MIXES: dict[str, tuple[int, ...]] = {"all": ROW_CLASSES, "none": (), "few rows": (16,)}


@pytest.mark.parametrize("mix", MIXES)
def test_auto_computes_what_it_has_chosen(
    mix: str, products: None, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    request = request_for(model, [2, 4])  # steps of 4 to 20 rows; images whose tokens no rounding decides
    wanted = {}
    for choice in ("own", "cublaslt"):
        monkeypatch.setenv("LPD_PRODUCTS", choice)
        wanted[choice] = logits_of(model, request), generate(model, request)
    assert not wanted["own"][0].equal(wanted["cublaslt"][0])
    monkeypatch.setenv("LPD_PRODUCTS", "auto")
    monkeypatch.setattr(timed_products, "time_runs", Timer(by_rows(*MIXES[mix])))
    logits, tokens = logits_of(model, request), generate(model, request)
    if mix == "few rows":
        assert not any(logits.equal(others) for others, _ in wanted.values())
    else:
        assert logits.equal(wanted["own" if mix == "all" else "cublaslt"][0])
    assert all(tokens.equal(others) for _, others in wanted.values())


@pytest.mark.parametrize("faster", ["qkv", "fc1", "head"])
def test_pairs_are_chosen_one_by_one(faster: str, card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    for name, product in step_products(64, 256, 56, torch.bfloat16).items():
        own = {"proj": 1.0, "fc2": 1.0, faster: 1.0}.get(name, 3.0)
        product_choice.remember(product, {rows: Times(own, 2.0) for rows in ROW_CLASSES}, CPU)
    monkeypatch.setenv("LPD_PRODUCTS", "auto")
    chosen = few_rows_of(model)
    assert chosen is not None
    first, last = chosen.blocks
    found = {"fc1": [first.proj_fc1, last.proj_fc1], "qkv": [first.fc2_next], "head": [last.fc2_next]}
    for name, pairs in found.items():
        assert all(pair.own_rows == (set(ROW_CLASSES) if name == faster else set()) for pair in pairs)
    assert chosen.takes_first(20) == (faster == "qkv")  # as the next blocks' qkv
    assert not chosen.takes_first(ROW_CLASSES[-1] + 1)
    assert generate(model, request_for(model)).shape == (2, 16)


def test_layers_are_not_built_for_pairs_that_are_known_to_be_slower(
    card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for product in step_products(64, 256, 56, torch.bfloat16).values():
        product_choice.remember(product, {rows: Times(2.0, 1.0) for rows in ROW_CLASSES}, CPU)
    monkeypatch.setenv("LPD_PRODUCTS", "auto")
    for name in ("are_plain", "NormedLayer", "ResidualLayer", "FewRows"):
        monkeypatch.setattr(f"lpd_ext.model.{name}", None)
    assert few_rows_of(small_model()) is None


def test_a_recorded_decode_is_that_of_the_choice(products: None, card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    request = request_for(model)
    monkeypatch.setenv("LPD_PRODUCTS", "auto")
    timer = Timer(by_rows(16, 32))
    monkeypatch.setattr(timed_products, "time_runs", timer)
    graphs = DecodeGraphs(capture=lambda runs: list(runs), device_type="cpu")
    recorded = generate(model, request, graphs)
    measured = timer.calls
    assert measured == 5 * len(ROW_CLASSES)
    assert recorded.equal(generate(model, request))
    assert recorded.equal(generate(model, request, graphs))
    assert timer.calls == measured
