"""One visitor of the page: their running drawing and their finished pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from lpd_ext.handle import Handle
from lpd_tools.png_settings import PREFIX

_KEPT = 60  # pictures of a visitor; older ones are forgotten


@dataclass(frozen=True)
class Choice:
    """A visitor's choices; label None: any class; seed None: a new one each time."""

    label: int | None
    steps: int
    guidance: float
    temperature: float
    order: str
    seed: int | None

    def options(self) -> dict[str, Any]:
        """Returns the options of `LPDPipeline.prepare`, without the label and the seed."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "temperature": self.temperature,
            "order": self.order,
        }


@dataclass(frozen=True)
class Entry:
    """A finished picture, which carries its settings as text chunks of its PNG, and those settings in a line."""

    picture: Image.Image
    caption: str
    choice: Choice


def entry(
    picture: Image.Image, kind: str, class_name: str, choice: Choice, settings: Mapping[str, Any] | None = None
) -> Entry:
    """Makes the entry of a picture whose seed is known; kind: 'draw' or 'inpaint'.

    settings: what else `lpd sample --like` needs to draw it again.
    """
    kept = picture.copy()
    said = {**(settings or {}), "command": f"demo {kind}", "class": class_name, **asdict(choice)}
    kept.info |= {f"{PREFIX}{name}": json.dumps(value) for name, value in said.items()}
    steps = f"{choice.steps} step" + "s" * (choice.steps != 1)
    words = [class_name, steps, f"guidance {choice.guidance:g}", f"temperature {choice.temperature:g}", choice.order]
    caption = ", ".join([*words, f"seed {choice.seed}"]) + (", inpainted" if kind == "inpaint" else "")
    return Entry(kept, caption, choice)


@dataclass
class Visit:
    """State of one open page. Nothing of it is shared with others."""

    handle: Handle | None = None  # of the newest drawing
    entries: list[Entry] = field(default_factory=list)  # newest first

    def is_drawing(self) -> bool:
        """Whether a picture is being drawn or waits for its turn."""
        return self.handle is not None and not self.handle.done()

    def cancel(self) -> bool:
        """Cancels the running drawing, which frees its places; False if there is none."""
        return self.handle is not None and self.handle.cancel()

    def keep(self, entries: list[Entry]) -> None:
        """Puts finished pictures before the others."""
        self.entries = [*entries, *self.entries][:_KEPT]
