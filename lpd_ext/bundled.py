"""The models that come with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("fashion_mnist",)
DEFAULT_MODEL = BUNDLED[0]


def bundled_model(name: str = DEFAULT_MODEL) -> Path:
    """Returns the folder of a bundled model; the default one draws clothes in the ten classes of Fashion-MNIST."""
    return Path(__file__).parent / "assets" / name
