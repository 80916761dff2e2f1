"""The points of the study of editing: masks, ways to draw the hidden cells, and pictures to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lpd_ext.masks import masked_cells
from lpd_tools.data.fashion_mnist import SIDE
from lpd_tools.study.settings import EditingStudy

EDITED, UNEDITED, RECONSTRUCTION, FILLED = "edited", "unedited", "reconstruction", "filled"
_MIDDLE, _QUARTERS = SIDE // 2, slice(SIDE // 4, SIDE - SIDE // 4)
# The pixels that a mask hides, rows and columns.
MASKS: dict[str, tuple[slice, slice]] = {
    "half": (slice(_MIDDLE, SIDE), slice(None)),  # the lower one
    "quarter": (slice(_MIDDLE, SIDE), slice(_MIDDLE, SIDE)),
    "centre": (_QUARTERS, _QUARTERS),
}


@dataclass(frozen=True)
class EditPoint:
    """One way to draw the cells hidden by a mask, or pictures to compare with, without order, steps or blocks.

    picture: "edited"; "unedited" and its "reconstruction" by the tokenizer, both without a mask; "filled": with what is
    hidden continued smoothly, as the tokenizer of an edit sees it. prefill_block: known cells at once; 0: all.
    """

    picture: str
    mask: str = ""
    order: str = ""
    steps: int = 0
    prefill_block: int = 0


@dataclass(frozen=True)
class Edited:
    """The measurements at a point; NaN where they do not apply.

    `plain_`: of pictures as the tokenizer gives them back, before the known pixels are pasted. `_error`: standard
    errors over images. The excess is image by image that over one token at a time in random orders, or where known
    cells enter in several blocks, over the same edit with one.
    """

    point: EditPoint
    images: int
    recognised: float  # share that the judge reads as the true class
    plain_recognised: float
    frechet: float  # Fréchet distance of the judge's features to those of other real images
    frechet_error: float
    plain_frechet: float
    known_difference: float = math.nan  # the most by which a known pixel of an edit differs, of 255
    plain_known_difference: float = math.nan  # the mean
    nats: float = math.nan  # teacher-forced, of the true tokens of the hole, unguided
    nats_error: float = math.nan
    excess_nats: float = math.nan
    excess_error: float = math.nan


def hidden_pixels(mask: str) -> Tensor:
    """Returns the pixels that a mask hides, bool [H, W]."""
    hidden = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    hidden[MASKS[mask]] = True
    return hidden


def hidden_cells(mask: str, stride: int) -> int:
    """Returns the number of cells to draw, of so many pixels a side."""
    return int(masked_cells(hidden_pixels(mask)[None], stride).sum())


def edit_points(config: EditingStudy) -> list[EditPoint]:
    """Returns the points: comparisons; masks x steps x orders; blocks of prefill, in the first order at most steps."""
    points = [EditPoint(UNEDITED), EditPoint(RECONSTRUCTION), *(EditPoint(FILLED, mask) for mask in config.masks)]
    points += [
        EditPoint(EDITED, mask, order, steps)
        for mask in config.masks
        for steps in config.steps
        for order in config.orders
    ]
    points += [in_blocks(config, mask, block) for mask in config.masks for block in config.prefill_blocks]
    return list(dict.fromkeys(points))


def in_blocks(config: EditingStudy, mask: str, block: int) -> EditPoint:
    """Returns the edit whose known cells enter in blocks of so many; 0: in one."""
    return EditPoint(EDITED, mask, config.orders[0], max(config.steps), block)
