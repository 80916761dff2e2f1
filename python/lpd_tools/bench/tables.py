"""`lpd bench-tables`: the JSON files of `lpd bench` and of the C++ microbenchmarks as the README's tables."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from lpd_tools.bench.timing import time_text
from lpd_tools.markdown import markdown_table

_FIRST_SHAPE = "L-256-20 step 15"


def bench_tables(
    files: Annotated[list[Path], typer.Argument(help="Files written by lpd bench --output or --benchmark_out.")],
) -> None:
    """Print Markdown tables of benchmark results."""
    for file in files:
        for line in tables_of(file):
            typer.echo(line)


def tables_of(file: Path) -> list[str]:
    """Lines of the tables of one file; FileNotFoundError, or ValueError if it is no file of benchmark results."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "benchmarks" in content:
            return _cpp_table(content)
        described = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        rows = content["results"]
        operators = [row for row in rows if "plain_seconds" in row]
        lines = [described, "", *_operator_table(operators)]
        # Rows of the same baselines side by side.
        by_baselines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if "ratios" in row:
                by_baselines.setdefault(tuple(row["ratios"]), []).append(row)
        return lines + [line for same in by_baselines.values() for line in _ratio_table(same)]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(file)!r} is no file of benchmark results: {error!r}") from error


def _operator_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = ["operator", "shape", "time", "GB/s", "GFLOP/s", "plain torch", "ratio"]
    return _table(
        head,
        [
            [
                row["operator"].strip(),
                f"{row['shape']} step {row['step']}, B = {row['batch']}",
                _median(row["seconds"]),
                f"{row['GB/s']:.1f}" if "GB/s" in row else "",
                f"{row['GFLOP/s']:.0f}" if "GFLOP/s" in row else "",
                _median(row["plain_seconds"]),
                f"{row['ratio']:.1f}x",
            ]
            for row in rows
        ],
    )


def _ratio_table(rows: list[dict[str, Any]]) -> list[str]:
    baselines = list(rows[0]["ratios"])
    lines = []
    for row in rows:
        ratios = (f"{row['ratios'][name]:.2f}x" for name in baselines)
        lines.append([row["operator"], f"{row['shape']}, B = {row['batch']}", _median(row["seconds"]), *ratios])
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
