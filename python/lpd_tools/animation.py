"""Animations of images as they form, as WebP or GIF: one panel per order, side by side on one clock."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lpd_ext.pipeline import LPDPipeline
from lpd_ext.sampler import decode, generate
from lpd_tools.checks import check_device, check_output, check_seeds
from lpd_tools.console import say
from lpd_tools.models import load_pipeline, parse_label
from lpd_tools.outputs import check_overwrite
from lpd_tools.progress import track
from lpd_tools.sampling import Sampling

_FRAMES_PER_SECOND = 20
_SIDE = 256  # least side of an image in pixels
_GAP, _CAPTION = 12, 18
_BACKGROUND, _INK, _FRESH = (24, 26, 32), (232, 232, 236), (255, 214, 64)
_SOON, _LATE = (104, 134, 200), (34, 38, 52)  # of cells whose turn has not come


@dataclass(frozen=True)
class Recording:
    """A decode of B images, group by group: the time of each group, the cells' groups, and the pictures."""

    title: str
    seconds: list[float]  # [T], since the beginning
    group_of: NDArray[np.int64]  # [B, h, w], from 0
    pictures: list[list[Image.Image]]  # [T][B]

    def drawn_at(self, now: float) -> int:
        """Returns the number of groups drawn after so many seconds."""
        return bisect_right(self.seconds, now)


def record(pipe: LPDPipeline, labels: Sequence[Any], title: str, **options: Any) -> Recording:
    """Draws images as `pipe(labels, **options)` does and keeps each step; only drawing is timed, not the pictures."""
    request = pipe.prepare(labels, **options)
    # The first decode of a process also sets things up.
    generate(pipe.model, pipe.prepare(labels, num_inference_steps=1, seeds=0))
    grids, seconds = [], []
    for now, grid in track(_timed(decode(pipe.model, request)), f"drawing: {title}", request.num_groups):
        seconds.append(now)
        grids.append(grid.cpu().clone())
    stacked = torch.stack(grids).unflatten(2, pipe.model.config.grid)
    # A cell's group is the number of groups that leave it at -1.
    group_of = (stacked < 0).sum(dim=0).numpy()
    drawing, device = pipe.drawing(request), pipe.model.pos_embed.device
    shown = track(stacked, f"pictures: {title}", len(stacked))
    pictures = [drawing.images(grid.to(device)) for grid in shown]
    return Recording(title, seconds, group_of, pictures)


def animate_sample(
    labels: Sequence[str] | None,
    of_model: Mapping[str, str | None],
    sampling: Sampling,
    path: Path,
    compare: Sequence[str],
    images_per_label: int | None,
    seed: int,
    device: str,
    force: bool,
) -> None:
    """Draws images of the labels in each order to compare and writes the animation, for `lpd sample --animate`."""
    check_output(path, ".webp", ".gif", name="animate")
    check_overwrite(path, force, name="animate")
    pipe = load_pipeline(of_model["model"], of_model["tokenizer"], of_model["dtype"] or "", check_device(device))
    wanted = [parse_label(pipe, text) for text in labels] if labels else [0]
    per_image = [label for label in wanted for _ in range(images_per_label or 1)]
    entries = [entry for text in compare for entry in text.replace(",", " ").split()]
    options = sampling.resolved(pipe).options() | {"seeds": check_seeds(seed, len(per_image))}
    write_animation(record_orders(pipe, per_image, entries, **options), path)
    say(str(path.resolve()))


def record_orders(
    pipe: LPDPipeline,
    labels: Sequence[Any],
    entries: Sequence[str],
    *,
    num_inference_steps: int,
    order: Any,
    **options: Any,
) -> list[Recording]:
    """Records a decode for each entry, an order's name with or without ":steps"; without entries, one of `order`.

    All have the same labels, seeds and other options. Raises ValueError, before anything is drawn, for an order or a
    number of steps that the pipeline refuses.
    """
    panels = []
    for entry in entries or [order]:
        name, _, count = entry.partition(":") if isinstance(entry, str) else (entry, "", "")
        if count and not count.isdecimal():
            raise ValueError(f"compare must be orders, each with or without ':steps', got {entry!r}")
        panel: dict[str, Any] = {"order": name, "num_inference_steps": int(count) if count else num_inference_steps}
        pipe.prepare(labels, **panel, **options)
        panels.append(panel)
    recordings = []
    for panel in panels:
        name = panel["order"] if isinstance(panel["order"], str) else "priority map"
        recordings.append(record(pipe, labels, f"{name}, {panel['num_inference_steps']} steps", **panel, **options))
    return recordings


def _timed(steps: Iterator[Tensor]) -> Iterator[tuple[float, Tensor]]:
    """Yields each step's grid and the seconds of all steps so far, without the caller's time in between."""
    seconds = 0.0
    while True:
        begun = time.perf_counter()
        grid = next(steps, None)
        if grid is None:
            return
        if grid.is_cuda:
            torch.cuda.synchronize(grid.device)
        seconds += time.perf_counter() - begun
        yield seconds, grid


def write_animation(
    recordings: Sequence[Recording], path: Path, play_seconds: float = 4.0, hold_seconds: float = 1.5
) -> None:
    """Writes the recordings side by side to a .webp or .gif file; the slowest one takes `play_seconds`.

    All run on one clock: one that is twice as fast has ended half way.
    """
    slowest = max(recording.seconds[-1] for recording in recordings)
    count = max(2, round(play_seconds * _FRAMES_PER_SECOND))
    # The groups drawn at a tick, and for how many ticks that stays so.
    shown: dict[tuple[int, ...], int] = {}
    for i in range(count):
        drawn = tuple(recording.drawn_at(slowest * i / (count - 1)) for recording in recordings)
        shown[drawn] = shown.get(drawn, 0) + 1
    durations = [ticks * 1000 // _FRAMES_PER_SECOND for ticks in shown.values()]
    durations[-1] += round(1000 * hold_seconds)
    frames = [_frame(recordings, drawn) for drawn in track(list(shown), "frames")]
    options: dict[str, Any] = {"quality": 82, "method": 4} if path.suffix.lower() == ".webp" else {"optimize": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


def _frame(recordings: Sequence[Recording], drawn: Sequence[int]) -> Image.Image:
    panels = [_panel(recording, count) for recording, count in zip(recordings, drawn, strict=True)]
    width = sum(panel.width + _GAP for panel in panels) + _GAP
    height = max(panel.height for panel in panels) + 2 * _GAP
    frame = Image.new("RGB", (width, height), _BACKGROUND)
    left = _GAP
    for panel in panels:
        frame.paste(panel, (left, _GAP))
        left += panel.width + _GAP
    return frame


def _panel(recording: Recording, drawn: int) -> Image.Image:
    """Draws the images of a recording after so many groups, with its name, step and time below."""
    total = len(recording.seconds)
    batch = len(recording.group_of)
    columns = math.ceil(math.sqrt(batch))
    shown = recording.pictures[max(0, drawn - 1)]
    tiles = [overlay(shown[b], recording.group_of[b], drawn, total) for b in range(batch)]
    width, height = tiles[0].size
    rows = -(-batch // columns)
    panel_width, images_height = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    panel = Image.new("RGB", (panel_width, images_height + 2 * _CAPTION + _GAP), _BACKGROUND)
    for b, tile in enumerate(tiles):
        panel.paste(tile, (b % columns * (width + _GAP), b // columns * (height + _GAP)))
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(_CAPTION - 3)
    top = images_height + _GAP // 2
    milliseconds = 1000 * recording.seconds[drawn - 1] if drawn else 0
    draw.text((0, top), recording.title, fill=_INK, font=font)
    draw.text((0, top + _CAPTION), f"step {drawn} of {total}   {milliseconds:.0f} ms", fill=_INK, font=font)
    draw.rectangle((0, top - 4, round((panel.width - 1) * drawn / total), top - 2), fill=_FRESH)
    return panel


def overlay(picture: Image.Image, groups: NDArray[np.int64], drawn: int, total: int) -> Image.Image:
    """Enlarges a picture to at least 256 pixels and overlays its cells, after `drawn` of `total` groups.

    groups [h, w] holds the group of each cell.

    Cells of later groups are coloured by their turn, those of the last group are framed. Groups count from 0; cells
    that were known from the beginning have -1.
    """
    height, width = groups.shape
    factor = max(1, math.ceil(_SIDE / max(picture.size)))
    stride = picture.width * factor // width
    size = (width * stride, height * stride)
    turn = (groups.clip(min=0) / max(1, total - 1))[..., None]
    colours = np.array(_SOON) * (1 - turn) + np.array(_LATE) * turn
    canvas = Image.fromarray(colours.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    mask = Image.fromarray(np.where(groups < drawn, 255, 0).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    canvas.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), (0, 0), mask)
    if drawn < total:
        draw = ImageDraw.Draw(canvas)
        for y, x in np.argwhere((groups == drawn - 1) & (groups >= 0)):
            corner = (int(x) * stride, int(y) * stride)
            draw.rectangle((*corner, corner[0] + stride - 1, corner[1] + stride - 1), outline=_FRESH)
    return canvas
