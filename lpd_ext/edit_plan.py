"""Plans edits: checks pictures, masks and margins, encodes pictures to tokens, and makes requests with known cells.

Arguments that the plans share: images and masks as in image_input.py; class_labels, seeds and the other options as in
`LPDPipeline.prepare`, each one for all edits or a list with one entry per edit. One picture with several masks, labels
or seeds is edited several times. Edits do not depend on the others of their batch.

num_inference_steps: at most one per cell to draw; more are reduced, with a warning. dilate: how many cells around the
masked ones are drawn too. paste: puts unmasked pixels back unchanged. feather: over how many pixels around the mask the
new picture fades into the old one. resize: 'stretch' or 'crop' (to the middle) fits pictures and masks of any size to
the model's; None refuses other sizes. prefill_block: how many known cells enter the KV cache at once; None: all.

Wrong arguments raise ValueError, TypeError or FileNotFoundError, naming the argument and the edit, before any work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.checks import as_int, as_real, as_scalar, per_image
from lpd_ext.drawing import Drawing
from lpd_ext.image_input import Kind, Pictures, Resize, check_resize, fit_mask, fit_picture, read_masks, read_pictures
from lpd_ext.masks import filled, masked_cells, painted_share
from lpd_ext.model import LPDModel
from lpd_ext.orders import random_order
from lpd_ext.request import DecodeRequest, seeds_for
from lpd_ext.tokenizer import VQTokenizer

Margins = int | tuple[int, int, int, int]


class Pipeline(Protocol):
    """The part of a pipeline that editing uses."""

    model: LPDModel
    tokenizer: VQTokenizer
    defaults: Any  # with num_inference_steps

    def prepare(self, class_labels: Any, *args: Any, **options: Any) -> DecodeRequest:
        """Returns the checked request of a call."""

    def drawing(self, request: DecodeRequest, **finish: Any) -> Drawing:
        """Returns a drawing of the request."""


@dataclass(frozen=True, eq=False)
class Paste:
    """Puts back the pixels of pictures float32 [B, 3, H, W], except for the painted share [B, 1, H, W] of each."""

    pictures: Tensor
    share: Tensor

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        pictures, share = (kept.to(images.device)[rows] for kept in (self.pictures, self.share))
        return torch.lerp(pictures, images.clamp(-1, 1), share)  # exact where the share is 0 or 1


def plan_inpaint(
    pipe: Pipeline,
    images: Pictures,
    masks: Pictures,
    class_labels: Any,
    *,
    dilate: int = 0,
    paste: bool = True,
    feather: int = 0,
    resize: Resize | None = None,
    **options: Any,
) -> Drawing:
    """Plans `editing.inpaint`: a cell is drawn if any of its pixels is masked.

    Refuses a mask of another size than its picture, an empty one, and one that leaves no cell known.
    """
    size = picture_size(pipe)
    check_resize(resize)
    pictures, kind, one_picture = read_pictures(images, "images")
    holes, one_mask = read_masks(masks, "masks")
    counts = {"images": None if one_picture else len(pictures), "masks": None if one_mask else len(holes)}
    batch = _batch_size(**counts, class_labels=_count(class_labels), seeds=_count(options.get("seeds")))
    pictures, holes = _for_each(pictures, batch), _for_each(holes, batch)
    for b, (picture, hole) in enumerate(zip(pictures, holes, strict=True)):
        if picture.shape[1:] != hole.shape:
            of_mask, of_picture = (" x ".join(map(str, reversed(shape))) for shape in (hole.shape, picture.shape[1:]))
            raise ValueError(f"masks[{b}] has {of_mask} pixels, but its picture has {of_picture}")
        if not bool(hole.any()):
            raise ValueError(f"masks[{b}] is empty: nothing is to be painted (white is)")
    whole = _stack([fit_picture(p, size, resize, f"images[{b}]") for b, p in enumerate(pictures)], (3, *size))
    mask = _stack([fit_mask(hole, size, resize, f"masks[{b}]") for b, hole in enumerate(holes)], size, torch.bool)
    edit = _Edit(kind, whole, mask, _at_least_0(dilate, "dilate"), paste, _at_least_0(feather, "feather"), "masks")
    return edit.plan(pipe, class_labels, **options)


def plan_outpaint(
    pipe: Pipeline,
    images: Pictures,
    margins: Margins | Sequence[Margins],
    class_labels: Any = None,
    *,
    dilate: int = 0,
    paste: bool = True,
    feather: int = 0,
    resize: Resize | None = None,
    **options: Any,
) -> Drawing:
    """Plans `editing.outpaint`: margins are pixels (left, top, right, bottom) around the picture, or one number.

    The picture must have the model's size less the margins, or is resized to it.
    """
    height, width = size = picture_size(pipe)
    check_resize(resize)
    pictures, kind, one_picture = read_pictures(images, "images")
    sides, one_margin = _read_margins(margins, height, width)
    counts = {"images": None if one_picture else len(pictures), "margins": None if one_margin else len(sides)}
    batch = _batch_size(**counts, class_labels=_count(class_labels), seeds=_count(options.get("seeds")))
    canvas, mask = [], torch.ones(batch, *size, dtype=torch.bool)
    frames = zip(_for_each(pictures, batch), _for_each(sides, batch), strict=True)
    for b, (picture, (left, top, right, bottom)) in enumerate(frames):
        inner = (height - top - bottom, width - left - right)
        fitted = fit_picture(picture, inner, resize, f"images[{b}] within its margins")
        canvas.append(F.pad(fitted, (left, right, top, bottom)))
        mask[b, top : height - bottom, left : width - right] = False
    whole = _stack(canvas, (3, *size))
    edit = _Edit(kind, whole, mask, _at_least_0(dilate, "dilate"), paste, _at_least_0(feather, "feather"), "margins")
    return edit.plan(pipe, class_labels, **options)


def plan_variations(
    pipe: Pipeline,
    images: Pictures,
    keep: float | Sequence[float],
    class_labels: Any = None,
    *,
    resize: Resize | None = None,
    **options: Any,
) -> Drawing:
    """Plans `editing.variations`: keep, in (0, 1), is the share of the cells that stay, chosen by the seed.

    At least one cell stays and one is drawn. Nothing is pasted: the cells that stay are decoded from their tokens.
    """
    size, num_tokens = picture_size(pipe), pipe.model.config.num_tokens
    check_resize(resize)
    pictures, kind, one_picture = read_pictures(images, "images")
    seeds, labels = options.pop("seeds", None), _count(class_labels)
    counts = {"images": None if one_picture else len(pictures), "keep": _count(keep)}
    batch = _batch_size(**counts, class_labels=labels, seeds=_count(seeds))
    shares = [as_real(share, "keep") for share in per_image(keep, "keep", batch)]
    if wrong := [share for share in shares if not 0 < share < 1]:
        raise ValueError(f"keep must be in (0, 1), the share of the cells that stay, got {wrong[0]}")
    whole = [fit_picture(p, size, resize, f"images[{b}]") for b, p in enumerate(_for_each(pictures, batch))]
    seeds = [as_int(seed, "seeds") for seed in seeds_for(seeds, batch)]
    # Uses other random numbers than the order, whose first cells would be those that stay.
    by_chance = random_order(pipe.model.config.grid, torch.tensor([~seed for seed in seeds], dtype=torch.int64))
    stay = torch.tensor([min(max(round(share * num_tokens), 1), num_tokens - 1) for share in shares])
    free = torch.zeros(batch, num_tokens, dtype=torch.bool)
    free.scatter_(1, by_chance, torch.arange(num_tokens) >= stay[:, None])
    return _plan(pipe, _stack(whole, (3, *size)), free, class_labels, {"output_type": kind}, seeds=seeds, **options)


@dataclass(frozen=True, eq=False)
class _Edit:
    """Pictures [B, 3, H, W] of the model's size, masks bool [B, H, W] of the pixels to paint, and how to paint them."""

    kind: Kind
    pictures: Tensor
    masks: Tensor
    dilate: int
    paste: bool
    feather: int
    cause: str  # the argument that the masks come from

    def plan(self, pipe: Pipeline, class_labels: Any, **options: Any) -> Drawing:
        free = masked_cells(self.masks, pipe.tokenizer.config.stride, self.dilate).flatten(1)
        if bool((full := free.all(1)).any()):
            first = int(full.nonzero()[0])
            raise ValueError(f"{self.cause}[{first}] leaves no cell of its picture: without one, call the pipeline")
        finish: dict[str, Any] = {"output_type": self.kind}
        if self.paste:
            finish["finish"] = Paste(self.pictures, painted_share(self.masks, self.feather))
        # Pixels under a mask must play no part, and the tokenizer looks far.
        return _plan(pipe, filled(self.pictures, ~self.masks), free, class_labels, finish, **options)


def _plan(
    pipe: Pipeline,
    pictures: Tensor,
    free: Tensor,
    class_labels: Any,
    finish: dict[str, Any],
    *,
    num_inference_steps: Any = None,
    prefill_block: int | None = None,
    **options: Any,
) -> Drawing:
    """Plans the drawing of the free cells, bool [B, N], of pictures [B, 3, H, W]."""
    num_free = free.sum(1).tolist()
    if options.get("group_sizes") is None:
        options["num_inference_steps"] = _steps(num_inference_steps, pipe.defaults.num_inference_steps, num_free)
    elif num_inference_steps is not None:
        options["num_inference_steps"] = num_inference_steps  # which the request refuses
    labels = [class_labels] * len(free) if _count(class_labels) is None else class_labels
    prefill = [_blocks(free.shape[1] - count, prefill_block) for count in num_free]
    # Everything is checked before the tokenizer works; the checks do not depend on the tokens.
    request = pipe.prepare(labels, known_tokens=-free.long(), prefill=prefill, **options)
    tokens = _encode(pipe.tokenizer, pictures).flatten(1)
    known = tokens.masked_fill(free.to(tokens.device), -1)
    return pipe.drawing(replace(request, known_tokens=known, order=request.orders), **finish)


def _encode(tokenizer: VQTokenizer, pictures: Tensor) -> Tensor:
    """Encodes pictures to tokens int64 [B, h, w], one at a time: a convolution may round differently in a batch."""
    device = tokenizer.codes().device
    with torch.no_grad():
        tokens = [tokenizer.encode(picture[None].to(device))[0] for picture in pictures]
    stride = tokenizer.config.stride
    return _stack(tokens, tuple(side // stride for side in pictures.shape[2:]), torch.int64).to(device)


def _steps(steps: Any, default: int, num_free: Sequence[int]) -> list[int]:
    """Returns the steps of each edit, at most one per cell to draw."""
    if steps is None:
        return [max(1, min(default, free)) for free in num_free]
    wanted = [as_int(count, "num_inference_steps") for count in per_image(steps, "num_inference_steps", len(num_free))]
    reduced = [b for b, (count, free) in enumerate(zip(wanted, num_free, strict=True)) if count > free]
    if reduced:
        b, others = reduced[0], f" (and {len(reduced) - 1} others)" if reduced[1:] else ""
        text = f"num_inference_steps: edit {b}{others} takes {num_free[b]} steps, one per cell to draw, not {wanted[b]}"
        warnings.warn(text, stacklevel=7)
    return [min(count, free) for count, free in zip(wanted, num_free, strict=True)]


def _blocks(count: int, most: int | None) -> list[int]:
    """Returns the sizes of the blocks in which so many known cells enter the KV cache.

    One block by default: each further block is another step. On real pictures (Fashion-MNIST, the bundled model) blocks
    of 4 to 16 cells bring 0.1 to 1.6 % fewer nats of the true tokens, and no difference to a judge
    (docs/results/editing.md).
    """
    size = max(count, 1) if most is None else as_int(most, "prefill_block")
    if size < 1:
        raise ValueError(f"prefill_block must be >= 1, got {size}")
    return [min(size, count - start) for start in range(0, count, size)]


def _read_margins(margins: Any, height: int, width: int) -> tuple[list[tuple[int, ...]], bool]:
    """Returns left, top, right and bottom of each edit, and whether all edits share them."""
    several = _count(margins) is not None and (len(margins) != 4 or any(_count(side) is not None for side in margins))
    sides = []
    for b, entry in enumerate(margins if several else [margins]):
        if _count(entry) not in (None, 4):
            raise ValueError(f"margins[{b}] must be a number or (left, top, right, bottom), got {entry!r}")
        left, top, right, bottom = four = [_at_least_0(side, "margins") for side in per_image(entry, "margins", 4)]
        if left + right >= width or top + bottom >= height:
            raise ValueError(f"margins[{b}] = {four} leave nothing of {width} x {height} pixels")
        if not any(four):
            raise ValueError(f"margins[{b}] are all 0: there is nothing to paint")
        sides.append(tuple(four))
    return sides, not several


def picture_size(pipe: Pipeline) -> tuple[int, int]:
    """Returns height and width in pixels of the pictures that the model draws."""
    height, width = pipe.model.config.grid
    stride = pipe.tokenizer.config.stride
    return height * stride, width * stride


def _count(value: Any) -> int | None:
    """Returns the length of a list, None for a single value."""
    value = as_scalar(value)
    return None if isinstance(value, str) or not isinstance(value, Iterable) else len(list(value))


def _batch_size(**counts: int | None) -> int:
    """Returns the common length of the lists among the arguments, 1 if there are none."""
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in given.items())
        raise ValueError(f"lists must have one entry per edit, got {found}")
    return next(iter(given.values()), 1)


def _for_each(entries: list[Any], batch: int) -> list[Any]:
    return entries if len(entries) == batch else entries * batch


def _stack(entries: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack(list(entries)) if len(entries) else torch.empty(0, *shape, dtype=dtype)


def _at_least_0(value: object, name: str) -> int:
    number = as_int(value, name)
    if number < 0:
        raise ValueError(f"{name} must be >= 0, got {number}")
    return number
