"""`lpd export`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import Export


def export(config: Export) -> None:
    """Write the averaged weights of a checkpoint as a model.

    Example: lpd export --checkpoint runs/l/checkpoints/best.pt --out model
    """
    from lpd_tools.training import export as exporting

    say(f"wrote {exporting.export(config)}")
