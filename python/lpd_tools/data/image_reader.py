"""Batches of pictures for programs that train on pixels."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lpd_ext.content import content_of
from lpd_ext.picture import UnreadableImageError
from lpd_ext.state_files import complete_file
from lpd_tools.data.image_source import ImageSource
from lpd_tools.data.pixels import square_pixels, to_input

WHITE = (255, 255, 255)


class Skipped(NamedTuple):
    """A picture that could not be read."""

    split: str
    name: str
    reason: str


def write_skipped(skipped: Iterable[Skipped], path: str | Path) -> None:
    """Writes the list as CSV with a header, whole or not at all."""
    with (
        complete_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Skipped._fields)
        writer.writerows(skipped)


def read_skipped(path: str | Path) -> list[Skipped]:
    """The list that `write_skipped` wrote; empty if there is none."""
    if not Path(path).is_file():
        return []
    with (
        content_of(path, "is no list of pictures that were skipped"),
        Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        return [Skipped(*row) for row in list(csv.reader(file))[1:]]


class ImageReader:
    """Square images of a source by index, decoded by threads and, with `keep`, kept in memory as bytes.

    In the place of a picture that cannot be read stands the next one of the source that can, so that batches depend on
    the data alone; `skipped` lists such pictures. With `strict` the first one raises UnreadableImageError.
    """

    def __init__(
        self,
        source: ImageSource,
        size: int,
        background: tuple[int, int, int] = WHITE,
        strict: bool = False,
        keep: bool = False,
        threads: int = 2,
        split: str = "train",
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.source, self.size, self.background, self.strict, self.split = source, size, background, strict, split
        self.unreadable: dict[int, str] = {}  # found so far, by index: why
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-reader")
        self._kept = torch.empty(len(source), 3, size, size, dtype=torch.uint8) if keep else None
        self._have = torch.zeros(len(source), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def skipped(self) -> list[Skipped]:
        """The pictures that could not be read so far, in the order of the source."""
        return [Skipped(self.split, self.source.name(i), why) for i, why in sorted(self.unreadable.items())]

    def pixels(self, index: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] of the pictures `index` int64 [B]."""
        return torch.stack(list(self._pool.map(self._one, index.tolist())))

    def images(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """float32 [B, 3, S, S] in [-1, 1] of the pictures `index` [B]; those where bool `flip` [B] holds, mirrored."""
        images = to_input(self.pixels(index))
        return images if flip is None else torch.where(flip[:, None, None, None], images.flip(3), images)

    def _one(self, index: int) -> Tensor:
        for step in range(len(self)):
            i = (index + step) % len(self)
            if i in self.unreadable and not self.strict:
                continue
            if self._kept is not None and self._have[i]:
                return self._kept[i]
            try:
                pixels = square_pixels(self.source.image(i), self.size, self.background)
            except UnreadableImageError as error:
                if self.strict:
                    raise UnreadableImageError(f"image {self.source.name(i)!r} cannot be read: {error}") from error
                self.unreadable[i] = str(error)
                continue
            if self._kept is not None:
                self._kept[i] = pixels
                self._have[i] = True
            return pixels
        raise UnreadableImageError(f"none of the {len(self)} {self.split} images can be read")
