"""`lpd growth`."""

from __future__ import annotations

from lpd_tools.bench.settings import Growth
from lpd_tools.console import say


def growth(config: Growth) -> None:
    """Measure how time and memory grow with batch, steps, tokens and model.

    Example: lpd growth --out docs/results/growth --minutes 60
    """
    from lpd_tools.bench.growth import measure_growth

    say(f"wrote {measure_growth(config)}")
