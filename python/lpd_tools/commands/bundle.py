"""`lpd bundle`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import Bundling


def bundle(config: Bundling) -> None:
    """Write a model (of a training, its best weights), tokenizer and sampling defaults to a folder.

    Example: lpd bundle --model runs/l --tokenizer vq/tokenizer.safetensors --out model
    """
    from lpd_ext.checkpoint import read_config
    from lpd_tools.training import bundle as bundling

    path = bundling.bundle(config)
    step = read_config(path).get(bundling.STEP)
    say(f"wrote {path}" if step is None else f"wrote {path}, with the weights after step {step}")
