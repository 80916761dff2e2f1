"""The Markdown tables say what the files of benchmark results say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lpd_tools.bench import run as bench_run
from lpd_tools.bench.result import Result
from lpd_tools.bench.settings import Bench, Part
from lpd_tools.bench.tables import tables_of
from lpd_tools.bench.timing import Times

from lpd_ext.bundled import BUNDLED


def test_tables_of_python_results(tmp_path: Path) -> None:
    operator = {"operator": "embed_rows", "shape": "S", "step": 3, "batch": 2, "seconds": [1e-3, 3e-3, 2e-3]}
    operator |= {"plain_seconds": [8e-3] * 3, "ratio": 4.0, "GB/s": 5.25}
    decode = {"operator": "int8", "shape": "S", "batch": 1, "seconds": [2.0, 2.0], "ratios": {"published": 3.5}}
    image = {"operator": "tokens in int8", "shape": "256 px", "batch": 1, "seconds": [2.5], "ratios": {"plain": 4.0}}
    cold = {"operator": "cold process", "shape": "256 px", "batch": 1, "seconds": [1.5], "ratios": {}}
    file = tmp_path / "python.json"
    results = [operator, decode, image, cold]
    file.write_text(json.dumps({"machine": {"processor": "P", "threads": 2}, "results": results}))
    lines = tables_of(file)
    assert lines[0] == "processor P, threads 2"
    assert "| embed_rows | S step 3, B = 2 | 2.00 ms | 5.2 |  | 8.00 ms | 4.0x |" in lines
    decodes = lines.index("| what | shape | time | published / this |")
    assert lines[decodes + 2 : decodes + 4] == ["| int8 | S, B = 1 | 2.00 s | 3.50x |", ""]
    images = lines.index("| what | shape | time | plain / this |")
    assert lines[images + 2] == "| tokens in int8 | 256 px, B = 1 | 2.50 s | 4.00x |"
    assert "| cold process | 256 px, B = 1 | 1.50 s |" in lines


def test_table_of_cpp_results(tmp_path: Path) -> None:
    runs = [
        {"name": f"embed_rows/avx2/L-256-20 step {step}/B:1/manual_time", "median_us": 5.0, "share": 0.5, "GB/s": 7.0}
        for step in (8, 15)
    ]
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"benchmarks": runs}))
    rows = [line for line in tables_of(file) if "embed_rows" in line]
    assert rows == ["| embed_rows, avx2, L-256-20 step 15, B:1 | 5.00 µs | 50% | 7.0 GB/s |"]


def test_a_result_is_the_row_of_the_file() -> None:
    operator = Result.against_plain("embed_rows", Times([1.0, 2.0, 4.0]), Times([8.0, 6.0]), gigaflops_per_second=3.5)
    assert list(operator.at("S", 2, step=0).to_json().items()) == [
        ("shape", "S"),
        ("step", 0),
        ("batch", 2),
        ("operator", "embed_rows"),
        ("seconds", [1.0, 2.0, 4.0]),
        ("plain_seconds", [8.0, 6.0]),
        ("ratio", 3.5),
        ("GFLOP/s", 3.5),
    ]
    several = Result.against("int8", Times([2.0]), {"published": Times([3.0]), "compiled": Times([1.0])}, note="timed")
    row = {"shape": "S", "batch": 1, "operator": "int8", "seconds": [2.0]}
    row |= {"ratios": {"published": 1.5, "compiled": 0.5}, "note": "timed"}
    assert several.at("S", 1).to_json() == row
    assert Result.from_json(row | {"of a later version": 1}) == several.at("S", 1)


@pytest.mark.parametrize("text", ["{", "{}", '{"machine": {}, "results": [{"ratios": {}}]}'])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json' is no file of benchmark results"):
        tables_of(file)


def test_what_lpd_bench_writes_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every part, as the parts give them, measured by nobody."""
    row = Result(operator="ours", seconds=[2.0] * 4, ratios={"theirs": 1.5})
    for name, results in (
        ("time_on_cpu", [replace(row, note="")]),
        ("time_training", [row]),
        ("time_host", [row]),
        ("time_previews", [row]),
        ("time_decoders", [replace(row, note="50 dB")]),
        ("time_images", [row, Result(operator="cold process", seconds=[1.0] * 4, ratios={})]),
    ):
        monkeypatch.setattr(bench_run, name, lambda *_, results=results: results)
    monkeypatch.setattr(bench_run, "published_size", lambda: None)
    monkeypatch.setattr(bench_run, "copy_bandwidth", lambda *_: 1e9)
    file = tmp_path / "python.json"
    parts = [part for part in Part if part not in (Part.operators, Part.products)]  # which only a GPU has
    bench_run.run_bench(Bench(parts, depth=1, output=file))
    decode = {"shape": "L-256-20", "step": 15, "batch": 1, "depth": 1, "operator": "ours", "seconds": [2.0] * 4}
    decode |= {"ratios": {"theirs": 1.5}, "note": ""}
    written = json.loads(file.read_text())["results"]
    assert list(written[0].items()) == list(decode.items())  # in this order
    assert [Result.from_json(row).to_json() for row in written] == written
    lines = tables_of(file)
    assert sum(line.startswith("| ours |") for line in lines) == len(parts) + len(BUNDLED)  # of previews
    assert "| cold process | 256 px, B = 1 | 1.00 s |" in lines
