"""Settings of drawing, as commands take them, as the pipeline takes them, and as pictures carry them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lpd_ext.priority import priority_of

if TYPE_CHECKING:
    from lpd_ext import LPDPipeline

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def is_image_file(text: str) -> bool:
    """Whether the text names an image file, by its suffix; no policy has one."""
    return Path(text).suffix.lower() in _IMAGES


# Names of the options of `LPDPipeline.prepare` in commands and pictures, in the order of Sampling's fields.
_OPTIONS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "order": "order",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "guidance_schedule": "guidance_schedule",
    "proximity": "proximity_threshold",
    "repulsion": "repulsion_threshold",
}


@dataclass(frozen=True)
class Sampling:
    """One value each; None: the pipeline's default. order: a policy, the file of a priority map, or the map's rows."""

    steps: int | None = None
    guidance: float | None = None
    order: Any = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_schedule: str | None = None
    proximity: float | None = None
    repulsion: int | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Sampling:
        """Returns the settings that a picture carries."""
        return cls(**{name: settings.get(name) for name in _OPTIONS})

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Sampling:
        """Returns the settings of a pipeline's call, its defaults included."""
        return cls(**{name: options.get(option) for name, option in _OPTIONS.items()})

    def over(self, other: Sampling) -> Sampling:
        """Returns these settings, with the other's where they are None."""
        return Sampling(**{name: asdict(other)[name] if v is None else v for name, v in asdict(self).items()})

    def resolved(self, pipe: LPDPipeline) -> Sampling:
        """Fills in the pipeline's defaults, and the priorities of the cells for a map in a file."""
        order = self.order
        if isinstance(order, str) and is_image_file(order):
            grid = pipe.model.config.grid
            order = priority_of(Path(order), grid, "order").view(grid).tolist()
        return replace(self, order=order).over(Sampling.of_options(asdict(pipe.defaults)))

    def options(self) -> dict[str, Any]:
        """Returns the options of `LPDPipeline.prepare`."""
        options = {option: getattr(self, name) for name, option in _OPTIONS.items()}
        if isinstance(self.order, list):
            options["order"] = torch.tensor(self.order, dtype=torch.float64)
        return options

    def settings(self) -> dict[str, Any]:
        """Returns the settings as pictures carry them."""
        return asdict(self)
