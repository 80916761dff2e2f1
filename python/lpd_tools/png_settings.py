"""Writes and reads PNG files that carry the settings they were drawn with, one text chunk each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lpd_ext.picture import open_image
from lpd_tools.pictures import write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX = "lpd:"  # of the chunks' keywords
_LONG = 200  # characters from which a chunk is compressed


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """Returns the text chunks of settings that JSON can represent."""
    info = PngInfo()
    info.add_text("Software", f"lpd-ext {version('lpd-ext')}")
    for name, value in settings.items():
        text = json.dumps(value)
        info.add_text(PREFIX + name, text, zip=len(text) > _LONG)
    return info


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the image with its settings, whole or not at all; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, partial(image.save, pnginfo=png_info(settings)))


def save_figure(figure: Figure, path: Path, settings: Mapping[str, Any], dpi: int = 110) -> None:
    """Writes a matplotlib figure as `save_png` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, partial(figure.savefig, dpi=dpi, pil_kwargs={"pnginfo": png_info(settings)}))


def read_settings(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """Returns the image and its settings; FileNotFoundError, or ValueError for a file without settings."""
    if not path.exists():
        raise FileNotFoundError(f"like is {str(path)!r}, where there is no file")
    image = open_image(path)
    texts = {name: text for name, text in getattr(image, "text", {}).items() if name.startswith(PREFIX)}
    try:
        settings = {name.removeprefix(PREFIX): json.loads(text) for name, text in texts.items()}
    except json.JSONDecodeError as error:
        raise ValueError(f"like: the settings in {str(path)!r} are no JSON: {error}") from None
    if "command" not in settings:
        raise ValueError(f"like: {str(path)!r} carries no settings; pictures that lpd draws do, if nothing strips them")
    return image, settings
