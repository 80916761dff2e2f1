"""`lpd bench-check`."""

from __future__ import annotations

from lpd_tools.bench.settings import BenchCheck


def bench_check(config: BenchCheck) -> None:
    """Compare a few benchmark ratios with the committed ones.

    Example: lpd bench-check --write
    """
    from lpd_tools.bench.check import check

    check(config)
