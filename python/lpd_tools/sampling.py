"""Settings of drawing as commands are told them, as the pipeline takes them, and as pictures carry them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lpd_ext.priority import priority_of

if TYPE_CHECKING:
    from lpd_ext import LPDPipeline

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def is_image_file(text: str) -> bool:
    """Whether it names an image by its suffix; no policy has one."""
    return Path(text).suffix.lower() in _IMAGES


@dataclass(frozen=True)
class Sampling:
    """One value each; None: the pipeline's default. order: a policy, the file of a priority map, or the map's rows."""

    steps: int | None = None
    guidance: float | None = None
    order: Any = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Sampling:
        """Those that a picture carries."""
        return cls(**{item.name: settings.get(item.name) for item in fields(cls)})

    def over(self, other: Sampling) -> Sampling:
        """These, and where they are None the other's."""
        return Sampling(**{name: asdict(other)[name] if v is None else v for name, v in asdict(self).items()})

    def resolved(self, pipe: LPDPipeline) -> Sampling:
        """With the pipeline's defaults, and with the priorities of cells for a map in a file."""
        defaults, order = pipe.defaults, self.order
        if isinstance(order, str) and is_image_file(order):
            grid = pipe.model.config.grid
            order = priority_of(Path(order), grid, "order").view(grid).tolist()
        of_pipe = Sampling(
            defaults.num_inference_steps, defaults.guidance_scale, defaults.order,
            defaults.temperature, defaults.top_k, defaults.top_p,
        )  # fmt: skip
        return Sampling(self.steps, self.guidance, order, self.temperature, self.top_k, self.top_p).over(of_pipe)

    def options(self) -> dict[str, Any]:
        """As `LPDPipeline.prepare` takes them, of one that is resolved."""
        order = torch.tensor(self.order, dtype=torch.float64) if isinstance(self.order, list) else self.order
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "order": order,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    def settings(self) -> dict[str, Any]:
        """As pictures carry them."""
        return asdict(self)
