"""`lpd study`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.study.settings import Study


def study(config: Study) -> None:
    """Measure quality over steps, orders, thresholds and guidance.

    Example: lpd study --judge judge.safetensors --out results/8x8 --minutes 60
    """
    from lpd_tools.study.study import run_study

    say(f"wrote {run_study(config)}")
