"""`lpd bundle`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import Bundling


def bundle(config: Bundling) -> None:
    """Put a trained model, its tokenizer and defaults in a folder.

    Example: lpd bundle --model runs/l --tokenizer vq/tokenizer.safetensors --out model
    """
    from lpd_tools.training import bundle as bundling

    say(f"wrote {bundling.bundle(config)}")
