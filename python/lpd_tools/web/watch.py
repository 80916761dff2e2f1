"""Shows visitors their forming pictures: previews, with the order of the undrawn cells, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from PIL import Image

from lpd_ext.engine import StepReport
from lpd_ext.handle import Preview
from lpd_ext.request import DecodeRequest
from lpd_tools.animation import overlay
from lpd_tools.draw_orders import step_grid


@dataclass(frozen=True)
class Shown:
    """The pictures so far, and a sentence about the progress."""

    pictures: list[Image.Image]
    status: str
    finished: bool = False


class StepClock:
    """Counts the engine's steps and their time."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0

    def on_step(self, report: StepReport) -> None:
        """Counts a step; called in the engine's thread."""
        self.steps, self.seconds = self.steps + 1, self.seconds + report.seconds


class Watch:
    """Shows the pictures of one request, from before its first step on.

    before: the picture shown until the first preview, such as the known part of an edit. steps_to_wait: engine steps
    until its turn.
    """

    def __init__(self, clock: StepClock, request: DecodeRequest, before: Image.Image, steps_to_wait: int) -> None:
        self._clock, self._steps_to_wait = clock, steps_to_wait
        self._clock_at_first = clock.steps, clock.seconds
        self._begun = perf_counter()
        self._groups = [
            step_grid(order[len(order) - sum(sizes) :], sizes, request.config.grid)
            for order, sizes in zip(request.orders.cpu(), request.group_sizes, strict=True)
        ]
        self._totals = [len(sizes) for sizes in request.group_sizes]
        self._pictures = [self._overlay(b, before, 0) for b in range(len(self._totals))]
        self._latest: Preview | None = None

    def after(self, preview: Preview | None) -> Shown:
        """Returns what to show after a preview, or after a while without one."""
        if preview is not None:
            self._latest = preview
            self._pictures[preview.image] = self._overlay(preview.image, preview.picture, preview.step)
        if self._latest is not None:
            return self._shown(f"Step {self._latest.step} of {self._latest.num_steps}, {self._pace()} per step")
        to_wait = self._steps_to_wait - (self._clock.steps - self._clock_at_first[0])
        return self._shown(f"Waiting: its turn comes in {to_wait} steps." if to_wait > 0 else "Beginning.")

    def cancelled(self) -> Shown:
        """Returns what is left of a cancelled request."""
        latest = self._latest
        where = "before its first step" if latest is None else f"after step {latest.step} of {latest.num_steps}"
        return self._shown(f"Cancelled {where}.")

    def finished(self, pictures: Sequence[Image.Image]) -> Shown:
        """Returns the finished pictures."""
        self._pictures = [self._overlay(b, picture, self._totals[b]) for b, picture in enumerate(pictures)]
        for shown, picture in zip(self._pictures, pictures, strict=True):
            shown.info |= picture.info  # whoever saves it has the settings too
        seconds = perf_counter() - self._begun
        return self._shown(f"Drawn in {seconds:.2f} s: {max(self._totals)} steps, {self._pace()} each.", finished=True)

    def _overlay(self, b: int, picture: Image.Image, drawn: int) -> Image.Image:
        return overlay(picture, self._groups[b], drawn, self._totals[b])

    def _shown(self, status: str, finished: bool = False) -> Shown:
        return Shown(list(self._pictures), status, finished)

    def _pace(self) -> str:
        """Returns the mean time of the engine's steps since the beginning."""
        steps, seconds = self._clock_at_first
        return f"{1000 * (self._clock.seconds - seconds) / max(1, self._clock.steps - steps):.1f} ms"
