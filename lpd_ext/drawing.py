"""Draws a request to images, at once or group by group, with cancellation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpd_ext.cancel import Cancel, as_check
from lpd_ext.checks import as_int
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.model import LPDModel
from lpd_ext.modes import decoding_modes
from lpd_ext.parts import Part, parts_of
from lpd_ext.pixel_decoder import PixelDecoder
from lpd_ext.preview_decoder import PreviewDecoder
from lpd_ext.request import DecodeRequest
from lpd_ext.sampler import decode, generate, undrawn
from lpd_ext.tokenizer import VQTokenizer

OutputType = Literal["pil", "np", "pt", "tokens"]
StepCallback = Callable[[int, int], None]
# Images go through the tokenizer's decoder in slices, so its activations do not grow with the batch.
_IMAGES_AT_A_TIME = 16
_CONVERTED_AT_A_TIME = 64


@dataclass(frozen=True)
class LPDPipelineOutput:
    """Finished images of the chosen type, their tokens int64 [B, h, w], and the seeds that draw them again.

    cancelled: the drawing was stopped before its end; tokens are -1, and images grey, where nothing is drawn yet.
    """

    images: Any
    tokens: Tensor
    seeds: list[int]
    cancelled: bool = False


@dataclass(frozen=True)
class StepPreview:
    """State after group `step` of `num_steps` (from 1): tokens int64 [B, h, w], -1 where not drawn, and previews."""

    step: int
    num_steps: int
    tokens: Tensor
    images: list[Image.Image]


def check_output_type(output_type: object) -> None:
    """Raises ValueError unless output_type is one of OutputType, or None for the drawing's own."""
    if output_type not in (None, "pil", "np", "pt", "tokens"):
        raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'tokens', got {output_type!r}")


@dataclass(frozen=True, eq=False)
class Drawing:
    """A request, the networks that draw it, and a last step for images [n, 3, H, W] in [-1, 1].

    finish: the last step, called with images and their rows int64 [n] of the request.
    max_images: how many images are drawn at once; None: as many as memory allows (see `parts`).
    output_type: the default of `run`. graphs: on a GPU, captured decodes to replay and extend.
    preview_decoder: draws the previews of `stream` and of an engine.
    """

    model: LPDModel
    tokenizer: VQTokenizer
    request: DecodeRequest
    pixel_dtype: torch.dtype = torch.float32
    graphs: DecodeGraphs | None = None
    finish: Callable[[Tensor, Tensor], Tensor] | None = None
    output_type: OutputType = "pil"
    max_images: int | None = None
    preview_decoder: PreviewDecoder | None = None

    def run(
        self,
        output_type: OutputType | None = None,
        callback_on_step_end: StepCallback | None = None,
        cancel: Cancel | None = None,
    ) -> LPDPipelineOutput:
        """Draws to the end, calling callback_on_step_end(step, num_steps) after each group.

        output_type 'pil' gives a list of PIL images, 'np' uint8 [B, H, W, 3], 'pt' float [B, 3, H, W] in [-1, 1],
        'tokens' no images. cancel: an event (such as threading.Event) or a callable, polled before each step; once set,
        the drawing ends, frees its memory, and returns what is drawn so far, with `cancelled` True. On a GPU, drawings
        that can be cancelled or have a callback replay one CUDA graph per step instead of one for all.
        """
        check_output_type(output_type)
        output_type = output_type or self.output_type
        as_check(cancel)
        parts = self._parts()
        num_steps, step = sum(part.request.num_groups for part in parts), 0
        grid = undrawn(self.model, self.request)
        if callback_on_step_end is None and cancel is None:
            for part in parts:
                grid[part.rows] = generate(self.model, part.request, self.graphs)
            step = num_steps
        else:
            for step, drawn_so_far in enumerate(self._grids(parts, cancel), start=1):
                grid = drawn_so_far
                if callback_on_step_end is not None:
                    callback_on_step_end(step, num_steps)
        tokens = grid.unflatten(1, self.model.config.grid)
        images = self.images(tokens, output_type)
        return LPDPipelineOutput(images, tokens, list(self.request.seeds), cancelled=step < num_steps)

    def stream(
        self, cancel: Cancel | None = None, preview_every: int = 1, exact_previews: bool = False
    ) -> Iterator[StepPreview]:
        """Draws, yielding the partial grid and a preview (undrawn cells grey) after each group; cancel as in `run`.

        Previews of changed images are refreshed every `preview_every` groups and after the last; in between, the old
        ones are yielded. Finished images are exact. Others come from the preview decoder, if any, unless exact_previews
        is True; exact ones cost as much as a final image, since every pixel depends on every token.
        """
        as_check(cancel)
        if (every := as_int(preview_every, "preview_every")) < 1:
            raise ValueError(f"preview_every must be >= 1, got {every}")
        return self._previews(cancel, every, not exact_previews)

    def _parts(self) -> list[Part]:
        return parts_of(self.model, self.request, self.graphs, self.max_images)

    def _grids(self, parts: Sequence[Part], cancel: Cancel | None) -> Iterator[Tensor]:
        """Yields the grids int64 [B, N] of all images after each group of each part; the same tensor each time."""
        grid = undrawn(self.model, self.request)
        for part in parts:
            for drawn_so_far in decode(self.model, part.request, cancel, self.graphs):
                grid[part.rows] = drawn_so_far
                yield grid

    def _previews(self, cancel: Cancel | None, every: int, approximate: bool) -> Iterator[StepPreview]:
        parts, before = self._parts(), None
        num_steps = sum(part.request.num_groups for part in parts)
        images: dict[int, Image.Image] = {}  # by row
        for step, grid in enumerate(self._grids(parts, cancel), start=1):
            tokens = grid.unflatten(1, self.model.config.grid).clone()
            if before is None or step % every == 0 or step == num_steps:
                before = torch.full_like(tokens, -2) if before is None else before
                changed = (tokens != before).flatten(1).any(1)
                whole = (tokens >= 0).flatten(1).all(1)
                exact = changed & whole if approximate and self.preview_decoder is not None else changed
                for chosen, is_exact in ((exact, True), (changed & ~exact, False)):
                    rows = chosen.nonzero()[:, 0]
                    new = self.images(tokens, rows=rows, approximate=not is_exact) if len(rows) else ()
                    images |= zip(rows.tolist(), new, strict=True)
                before = tokens
            yield StepPreview(step, num_steps, tokens, [images[row] for row in range(len(tokens))])

    def pixels(self, tokens: Tensor, rows: Tensor | None = None, *, approximate: bool = False) -> Tensor:
        """Decodes grids int64 [B, h, w], or some rows, to images float32 [B, 3, H, W]; cells that are -1 are grey.

        approximate: by the preview decoder, if there is one.
        """
        rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
        images = torch.empty(len(rows), 3, *self._size, dtype=torch.float32, device=tokens.device)
        for part in _slices(len(rows)):
            images[part] = self._finished(tokens[rows[part]], rows[part], approximate)
        return images

    def images(
        self,
        tokens: Tensor,
        output_type: OutputType = "pil",
        rows: Tensor | None = None,
        *,
        approximate: bool = False,
    ) -> Any:
        """Returns the images of `pixels` as one of the types of `run`; RuntimeError for pixels that are not finite.

        approximate: as in `pixels`.
        """
        if output_type == "tokens":
            return None
        if output_type == "pt":
            return self.pixels(tokens, rows, approximate=approximate).clamp(-1, 1)
        if approximate and self.preview_decoder is not None and self.finish is None:
            grids = (tokens if rows is None else tokens[rows]).split(_IMAGES_AT_A_TIME)
            result = torch.cat([self._previewed(part, self.preview_decoder) for part in grids])
        else:
            rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
            # A quarter of the memory: each slice is rounded at once.
            result = torch.empty(len(rows), *self._size, 3, dtype=torch.uint8, device=tokens.device)
            for part in _slices(len(rows)):
                result[part] = VQTokenizer.to_pixels(self._finished(tokens[rows[part]], rows[part], approximate))
        pixels: np.ndarray = result.cpu().numpy()
        return pixels if output_type == "np" else _as_pictures(pixels)

    @property
    def _size(self) -> tuple[int, int]:
        side, (height, width) = self.tokenizer.config.stride, self.model.config.grid
        return height * side, width * side

    def _finished(self, tokens: Tensor, rows: Tensor, approximate: bool = False) -> Tensor:
        """Returns the images [n, 3, H, W] of grids [n, h, w], those of `rows`, as they leave the last step."""
        with decoding_modes(tokens.device):
            return self._checked(self._decoded(tokens, approximate), rows, approximate)

    def _checked(self, images: Tensor, rows: Tensor, approximate: bool) -> Tensor:
        if not approximate and not bool(images.isfinite().all()):
            raise RuntimeError("the tokenizer's decoder gave pixels that are not finite")
        return images if self.finish is None else self.finish(images, rows)

    def _decoded(self, tokens: Tensor, approximate: bool = False) -> Tensor:
        if approximate and self.preview_decoder is not None:
            return VQTokenizer.from_pixels(self._previewed(tokens, self.preview_decoder))
        drawn, side = tokens >= 0, self.tokenizer.config.stride
        vectors = self.tokenizer.vectors(tokens.clamp(min=0))
        features = (vectors * drawn[..., None]).permute(0, 3, 1, 2)
        decoder = (
            PixelDecoder(self.tokenizer, self.pixel_dtype) if PixelDecoder.supports(self.tokenizer) else self.tokenizer
        )
        images = decoder.decode_features(features)
        pixels_drawn = drawn.repeat_interleave(side, 1).repeat_interleave(side, 2)
        return torch.where(pixels_drawn[:, None], images, 0.0)

    def _previewed(self, tokens: Tensor, decoder: PreviewDecoder) -> Tensor:
        return decoder.pixels(tokens, self.tokenizer.quantize.embedding.weight.float())


def pictures(wanted: Sequence[tuple[Drawing, Tensor, int]], *, approximate: bool = False) -> list[Image.Image]:
    """Draws the picture of each grid int64 [h, w], each with its row in its drawing; all by the first one's decoder.

    approximate: as in `Drawing.images`.
    """
    first, tokens, _ = wanted[0]
    grids = torch.stack([tokens for _, tokens, _ in wanted])
    if approximate and all(drawing.finish is None for drawing, _, _ in wanted):
        images: list[Image.Image] = first.images(grids, approximate=True)
        return images
    with decoding_modes(tokens.device):
        decoded = first._decoded(grids, approximate)
        rows = torch.tensor([[row] for _, _, row in wanted], device=tokens.device)
        finished = [
            drawing._checked(decoded[i, None], rows[i], approximate) for i, (drawing, _, _) in enumerate(wanted)
        ]
        pixels = VQTokenizer.to_pixels(torch.cat(finished)).cpu().numpy()
    return _as_pictures(pixels)


def _as_pictures(pixels: np.ndarray) -> list[Image.Image]:
    """Returns a picture of each of pixels uint8 [B, H, W, 3]; a third faster than Image.fromarray."""
    return [Image.frombytes("RGB", (image.shape[1], image.shape[0]), image.tobytes()) for image in pixels]


def _slices(count: int) -> list[slice]:
    return [slice(start, start + _IMAGES_AT_A_TIME) for start in range(0, count, _IMAGES_AT_A_TIME)]
