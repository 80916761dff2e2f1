"""The models that come with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("icons", "fashion_mnist")
DEFAULT_MODEL = BUNDLED[0]


def bundled_model(name: str = DEFAULT_MODEL) -> Path:
    """Returns the folder of a bundled model: icons in 34 classes, 64 by 64 pixels, or clothes in ten, 32 by 32."""
    return Path(__file__).parent / "assets" / name
