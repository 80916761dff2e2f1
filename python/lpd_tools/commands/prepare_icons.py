"""`lpd prepare-icons`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.data.settings import IconFolder


def prepare_icons(config: IconFolder) -> None:
    """Make an image folder of npm packages of icons.

    Example: lpd prepare-icons --package node_modules/emoji-datasource-google --out icons
    """
    from lpd_tools.data import icons

    counts = {split: classes.total() for split, classes in icons.prepare_icons(config).items()}
    say(f"wrote {config.out}: {counts['train']} train and {counts['val']} val icons")
