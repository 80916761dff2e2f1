"""`lpd int8-quality`."""

from __future__ import annotations

from lpd_tools.console import new_console, say
from lpd_tools.evaluation.settings import Int8Quality


def int8_quality(config: Int8Quality) -> None:
    """Compare int8 with float32: argmaxes, judge, distance.

    Example: lpd int8-quality --judge judge.safetensors --out int8.json
    """
    from lpd_tools.evaluation import int8_quality as quality
    from lpd_tools.evaluation.report import int8_tables

    results = quality.int8_quality(config)
    for table in int8_tables(results):
        new_console().print(table)
    if config.out:
        say(f"wrote {config.out}")
