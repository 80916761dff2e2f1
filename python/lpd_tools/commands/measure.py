"""`lpd measure`."""

from __future__ import annotations

from lpd_tools.evaluation.settings import Measurement


def measure(config: Measurement) -> None:
    """Compare generated images with real ones.

    Example: lpd measure --images drawn --reference folder:images --out measures.json
    """
    from lpd_tools.evaluation import measure as measuring
    from lpd_tools.evaluation.report import show_results

    show_results(measuring.measure(config), config.out)
