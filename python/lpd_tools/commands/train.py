"""`lpd train`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.launch import place
from lpd_tools.training.settings import LPDTraining


def train(config: LPDTraining) -> None:
    """Train the LPD transformer on cached tokens.

    Example: lpd train --config recipes/lpd_l_256.toml --out-dir runs/l
    """
    from lpd_tools.training import transformer
    from lpd_tools.training.best import best_sentence

    out = transformer.train(config)
    say(f"wrote {out}")
    if place().rank == 0 and (sentence := best_sentence(out, config.steps)):
        say(sentence)
