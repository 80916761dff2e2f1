"""`lpd bench-tables`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_tables(
    files: Annotated[list[Path], typer.Argument(help="Files written by lpd bench --output or --benchmark_out.")],
) -> None:
    """Print Markdown tables of benchmark results.

    Example: lpd bench-tables bench.json
    """
    from lpd_tools.bench.tables import tables_of

    for file in files:
        for line in tables_of(file):
            typer.echo(line)
