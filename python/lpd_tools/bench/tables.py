"""Turns the JSON files of `lpd bench` and of the C++ microbenchmarks into Markdown tables."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lpd_ext.content import content_of, read_json
from lpd_tools.bench.result import Result, cell
from lpd_tools.bench.timing import time_text
from lpd_tools.markdown import markdown_table

_FIRST_SHAPE = "L-256-20 step 15"


def tables_of(file: Path) -> list[str]:
    """Returns the lines of a file's tables; FileNotFoundError, or ValueError if it holds no benchmark results."""
    with content_of(file, "is no file of benchmark results"):
        content = read_json(file, "is no file of benchmark results")
        if "benchmarks" in content:
            return _cpp_table(content)
        described = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        results = [Result.from_json(row) for row in content["results"]]
        operators = [result for result in results if result.plain_seconds is not None]
        lines = [described, "", *_operator_table(operators)]
        # Rows of the same baselines side by side.
        by_baselines: dict[tuple[str, ...], list[Result]] = {}
        for result in results:
            if result.ratios is not None:
                by_baselines.setdefault(tuple(result.ratios), []).append(result)
        return lines + [line for same in by_baselines.values() for line in _ratio_table(same)]


def _operator_table(results: list[Result]) -> list[str]:
    if not results:
        return []
    head = ["operator", "shape", "time", "GB/s", "GFLOP/s", "plain torch", "ratio"]
    return _table(
        head,
        [
            [
                result.operator.strip(),
                f"{result.shape} step {result.step}, B = {result.batch}",
                _median(result.seconds),
                cell(result.gigabytes_per_second, ".1f"),
                cell(result.gigaflops_per_second, ".0f"),
                _median(result.plain_seconds or []),
                f"{result.ratio:.1f}x",
            ]
            for result in results
        ],
    )


def _ratio_table(results: list[Result]) -> list[str]:
    lines = []
    for result in results:
        ratios = (f"{ratio:.2f}x" for ratio in (result.ratios or {}).values())
        shape = f"{result.shape}, B = {result.batch}"
        lines.append([result.operator, shape, _median(result.seconds), *ratios])
    baselines = results[0].ratios or {}
    return _table(["what", "shape", "time", *(f"{name} / this" for name in baselines)], lines)


def _cpp_table(content: dict[str, Any]) -> list[str]:
    lines = []
    for run in content["benchmarks"]:
        name = run["name"].removesuffix("/manual_time")
        if _FIRST_SHAPE in name or name.startswith("locality_order"):
            rate = next((f"{run[unit]:.1f} {unit}" for unit in ("GF/s", "GB/s") if unit in run), "")
            share = f"{run['share']:.0%}" if "share" in run else ""
            lines.append([name.replace("/", ", "), time_text(1e-6 * run["median_us"]), share, rate])
    return _table(["kernel, instruction set and shape", "time", "share of the peak", ""], lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [*markdown_table(head, rows).splitlines(), ""]


def _median(seconds: list[float]) -> str:
    return time_text(statistics.median(seconds))
