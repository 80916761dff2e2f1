"""`lpd bundle`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import Bundling


def bundle(config: Bundling) -> None:
    """Put a model, its tokenizer and sampling defaults in a folder; of a training, its best weights.

    Example: lpd bundle --model runs/l --tokenizer vq/tokenizer.safetensors --out model
    """
    from lpd_ext.checkpoint import read_config
    from lpd_tools.training import bundle as bundling

    path = bundling.bundle(config)
    step = read_config(path).get(bundling.STEP)
    say(f"wrote {path}" if step is None else f"wrote {path}, with the weights after step {step}")
