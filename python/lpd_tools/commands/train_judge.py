"""`lpd train-judge`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import JudgeTraining


def train_judge(config: JudgeTraining) -> None:
    """Train a classifier that judges images.

    Example: lpd train-judge --out judge.safetensors --epochs 12
    """
    from lpd_tools.training import judge

    say(f"{config.out}: {100 * judge.train_judge(config):.2f} % of the real test set recognised")
