"""The guard against lost speed, with measurements made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lpd_tools.bench import check as bench_check
from lpd_tools.bench.check import BenchCheck, Ratio, Verdict, check, judge, read_ratios, write_ratios

RATIOS = [Ratio(name, lambda: (lambda: None, lambda: None)) for name in ("attention", "decode")]


class Measured:
    """Returns the values given for each ratio in turn."""

    def __init__(self, **values: list[float]) -> None:
        self._values: dict[str, Iterator[float]] = {name: iter(given) for name, given in values.items()}

    def __call__(self, ratio: Ratio) -> float:
        return next(self._values[ratio.name])


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with ratios of this processor, which is called "here"; all_ratios are the two above."""
    monkeypatch.setattr(bench_check, "processor_name", lambda: "here")
    monkeypatch.setattr(bench_check, "all_ratios", lambda: RATIOS)
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps({"elsewhere": {"decode": 9.0}, "here": {"attention": 2.0, "decode": 4.0}}))
    return path


def check_with(monkeypatch: pytest.MonkeyPatch, path: Path, write: bool = False, **values: list[float]) -> None:
    monkeypatch.setattr(bench_check, "measure", Measured(**values))
    check(BenchCheck(str(path), write))


def test_passes_a_little_below(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_with(monkeypatch, committed, attention=[1.51], decode=[3.01])


def test_one_low_ratio_is_measured_again(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_with(monkeypatch, committed, attention=[1.49, 1.51], decode=[4.0])


def test_fails_when_twice_below(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"25% below .* twice in a row: attention: 1.49 and 1.20, not 2.0$"):
        check_with(monkeypatch, committed, attention=[1.49, 1.2], decode=[2.0, 3.5])


def test_no_number_is_too_low(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="decode: nan and nan"):
        check_with(monkeypatch, committed, attention=[2.0], decode=[float("nan")] * 2)


def test_what_is_not_committed_is_only_shown() -> None:
    assert judge(RATIOS, {"decode": 1.0}, Measured(attention=[0.1], decode=[1.0])) == [
        Verdict("attention", None, (0.1,)),
        Verdict("decode", 1.0, (1.0,)),
    ]


def test_an_unknown_processor_is_told_how_to_write_its_ratios(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_check, "processor_name", lambda: "new, 8 threads, avx2")
    with pytest.raises(ValueError, match=r"no ratios for this processor \(new, 8 .*make bench-check ARGS=--write"):
        check_with(monkeypatch, committed)  # and nothing is measured


def test_writing_keeps_other_processors(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_with(monkeypatch, committed, write=True, attention=[1.2345], decode=[0.5])
    assert read_ratios(committed) == {"elsewhere": {"decode": 9.0}, "here": {"attention": 1.23, "decode": 0.5}}


def test_a_first_file_is_written(tmp_path: Path) -> None:
    assert read_ratios(tmp_path / "docs" / "ratios.json") == {}
    write_ratios(tmp_path / "docs" / "ratios.json", "here", [Verdict("decode", None, (2.0,))])
    assert read_ratios(tmp_path / "docs" / "ratios.json") == {"here": {"decode": 2.0}}


@pytest.mark.parametrize("text", ["{", "[]", '{"here": 3}', '{"here": {"decode": "fast"}}', '{"here": {"decode": []}}'])
def test_a_corrupted_file_is_named(committed: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    committed.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ratios\.json' must hold ratios by name for each processor"):
        check_with(monkeypatch, committed)


@pytest.mark.parametrize("value", ["NaN", "0", "-1", "Infinity"])
def test_a_ratio_that_is_none_is_named(committed: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    committed.write_text(f'{{"here": {{"decode": {value}}}}}', encoding="utf-8")
    with pytest.raises(ValueError, match="ratio 'decode' of 'here' must be above 0"):
        check_with(monkeypatch, committed)


def test_a_ratio_is_plain_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def takes(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert bench_check.measure(Ratio("", lambda: (lambda: takes(0.01), lambda: takes(0.5)))) == pytest.approx(50)


def test_the_ratios_have_names_of_their_own() -> None:
    names = [ratio.name for ratio in bench_check.all_ratios()]
    assert len(names) == len(set(names)) == 21
    assert "sample_tokens, k 900, p 0.95, B = 4" in names
