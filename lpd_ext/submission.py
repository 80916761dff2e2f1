"""A request submitted to an engine, image by image: the previews it wants, and its finished images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from lpd_ext.continuous_batch import RunningImage
from lpd_ext.drawing import Drawing, LPDPipelineOutput
from lpd_ext.handle import Handle, Preview
from lpd_ext.pixel_thread import PixelJob
from lpd_ext.request import DecodeRequest


@dataclass(eq=False)
class Submission:
    """A request and its finished images.

    previews: how many of each image, evenly over its steps; None: after every group.
    """

    drawing: Drawing
    previews: int | None
    handle: Handle = field(init=False)
    tokens: Tensor = field(init=False)  # int64 [B, h, w], -1 where not drawn; for the thread of pixels
    pictures: dict[int, Image.Image] = field(default_factory=dict)  # of finished images

    def __post_init__(self) -> None:
        request = self.drawing.request
        self.handle = Handle(request)
        shape = (len(request.labels), *request.config.grid)
        self.tokens = torch.full(shape, -1, device=self.drawing.model.pos_embed.device)

    def parts(self) -> list[Part]:
        """Returns the request's images."""
        request = self.drawing.request
        return [Part(self, b, request.images(slice(b, b + 1))) for b in range(len(request.labels))]

    def finish(self) -> None:
        """Delivers the images."""
        request = self.handle.request
        images = [self.pictures[b] for b in range(len(request.labels))]
        self.handle.finish(LPDPipelineOutput(images, self.tokens, list(request.seeds)))


@dataclass(eq=False)
class Part:
    """One image of a submission; running: its place in the batch, once it has started."""

    owner: Submission
    index: int
    request: DecodeRequest
    running: RunningImage | None = None
    previews: int = 0  # that were begun
    pending: bool = False  # whether one is being made

    @property
    def steps_left(self) -> int:
        """Steps until the image is drawn."""
        done = 0 if self.running is None else self.running.steps_done
        return self.request.schedules[0].num_steps - done

    def wants_preview(self, group: int, num_groups: int) -> bool:
        """Whether a preview is wanted after this group, counted from 1; never after the last: that is the result."""
        if self.pending:
            return False
        count = self.owner.previews
        if count is None:
            return group >= 1  # not of known cells
        return group in {round(num_groups * i / (count + 1)) for i in range(1, count + 1)}

    def to_show(self, tokens: Tensor, step: int, num_steps: int) -> PixelJob:
        """Returns the job that decodes a preview of tokens int64 [N]."""
        self.previews += 1
        self.pending = True

        def show(picture: Image.Image) -> None:
            self.pending = False
            self.owner.handle.publish(Preview(self.index, step, num_steps, job.tokens.cpu(), picture))

        job = self._job(tokens, show, is_preview=True)
        return job

    def to_finish(self, tokens: Tensor) -> PixelJob:
        """Returns the job that decodes the picture of tokens int64 [N], and delivers the request with its last one."""
        owner = self.owner

        def finish(picture: Image.Image) -> None:
            if bool((job.tokens < 0).any()):
                raise RuntimeError("logits contain NaN or are -inf throughout: nothing can be drawn")
            owner.tokens[self.index] = job.tokens
            owner.pictures[self.index] = picture
            if len(owner.pictures) == len(owner.tokens):
                owner.finish()

        job = self._job(tokens, finish)
        return job

    def _job(self, tokens: Tensor, deliver: Callable[[Image.Image], None], *, is_preview: bool = False) -> PixelJob:
        drawing, handle = self.owner.drawing, self.owner.handle
        grid = tokens.unflatten(0, drawing.request.config.grid)
        return PixelJob(drawing, grid, self.index, deliver, handle.finish, lambda: not handle.done(), is_preview)
