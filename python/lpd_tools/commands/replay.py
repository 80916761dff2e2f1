"""`lpd replay`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import Replay


def replay(config: Replay) -> None:
    """Recompute the training step whose loss was not finite.

    Example: lpd replay --file runs/l/failed/step_000001200_rank_0.pt --precision fp32
    """
    from lpd_tools.training import replay as replaying

    say(str(replaying.replay(config)))
