"""The README's tables say what the files of benchmark results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lpd_tools.bench.tables import tables_of


def test_tables_of_python_results(tmp_path: Path) -> None:
    operator = {"operator": "embed_rows", "shape": "S", "step": 3, "batch": 2, "seconds": [1e-3, 3e-3, 2e-3]}
    operator |= {"plain_seconds": [8e-3] * 3, "ratio": 4.0, "GB/s": 5.25}
    decode = {"operator": "int8", "shape": "S", "batch": 1, "seconds": [2.0, 2.0], "ratios": {"published": 3.5}}
    file = tmp_path / "python.json"
    file.write_text(json.dumps({"machine": {"processor": "P", "threads": 2}, "results": [operator, decode]}))
    lines = tables_of(file)
    assert lines[0] == "processor P, threads 2"
    assert "| embed_rows | S step 3, B = 2 | 2.00 ms | 5.2 |  | 8.00 ms | 4.0x |" in lines
    assert "| int8 | S, B = 1 | 2.00 s | 3.50x |" in lines


def test_table_of_cpp_results(tmp_path: Path) -> None:
    runs = [
        {"name": f"embed_rows/avx2/L-256-20 step {step}/B:1/manual_time", "median_us": 5.0, "share": 0.5, "GB/s": 7.0}
        for step in (8, 15)
    ]
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"benchmarks": runs}))
    rows = [line for line in tables_of(file) if "embed_rows" in line]
    assert rows == ["| embed_rows, avx2, L-256-20 step 15, B:1 | 5.00 µs | 50% | 7.0 GB/s |"]


@pytest.mark.parametrize("text", ["{", "{}", '{"machine": {}, "results": [{"ratios": {}}]}'])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json' is no file of benchmark results"):
        tables_of(file)
