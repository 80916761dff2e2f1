"""`lpd train-preview`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.training.settings import PreviewTraining


def train_preview(config: PreviewTraining) -> None:
    """Train a small decoder that draws the previews of a model's images.

    Example: lpd train-preview --model model --out model/preview.safetensors
    """
    from lpd_tools.training import preview

    say(f"{config.out}: previews are at {preview.train_preview(config):.1f} dB PSNR to the exact images")
