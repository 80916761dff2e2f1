"""`lpd generate`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.evaluation.settings import Generation


def generate(config: Generation) -> None:
    """Draw images of every class, to measure them.

    Example: lpd generate --out drawn --images-per-class 50 --guidance-scale 4.8
    """
    from lpd_tools.evaluation import generate as generation

    say(f"wrote {generation.generate(config)}")
