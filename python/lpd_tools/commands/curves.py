"""`lpd curves`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import Curves


def curves(config: Curves) -> None:
    """Draw the logs of the training programs.

    Example: lpd curves --tokenizer-log vq/log.csv --train-log runs/l/log.csv --out curves.png
    """
    from lpd_tools.training.curves import draw_curves

    say(f"wrote {draw_curves(config)}")
