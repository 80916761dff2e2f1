"""The interface of data sets: labelled pictures, read one at a time."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor


class ImageSource(ABC):
    """The pictures of one split: labels int64 [count] at once, each picture when it is asked for."""

    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Picture `index`, decoded, in any mode; UnreadableImageError if it cannot be."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns the name of picture `index` in lists and messages: a path below the data set, or split and row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 that differs when names, order, labels or class names do."""


@dataclass(frozen=True)
class DataSet:
    """Both splits of a data set; they have the same classes."""

    kind: str
    train: ImageSource
    test: ImageSource
    default_image_size: int = 256

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, by label."""
        return self.train.class_names

    def split(self, name: str) -> ImageSource:
        """The split "train" or "test"."""
        return {"train": self.train, "test": self.test}[name]

    def fingerprint(self) -> str:
        """SHA-256 of the fingerprints of both splits."""
        return digest(self.train.fingerprint(), self.test.fingerprint())


def digest(*parts: str | bytes) -> str:
    """SHA-256, in hexadecimal, of the parts with their lengths."""
    state = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def held_out(name: str, share: float) -> bool:
    """Whether the picture of that name belongs to the test split; depends on the hash of its name alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") < share * 2**64


def evenly_spaced(count: int, total: int) -> Tensor:
    """Returns the indices int64 of `count` images, or all, at equal distances among `total`.

    The first `count` would be of a few classes only, since the images of a class lie together.
    """
    count = min(count, total)
    return torch.arange(count) * total // max(count, 1)


def check_share(text: str) -> float:
    """The share of pictures held out, from the command line; ValueError unless it is in (0, 1)."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"data: held_out must be a number in (0, 1), got {text!r}")
    return share


def check_splits(kind: str, where: str, train: Tensor, test: Tensor, class_names: tuple[str, ...]) -> None:
    """ValueError unless both splits have pictures and the train split has some of every class."""
    for split, labels in (("train", train), ("test", test)):
        if not len(labels):
            raise ValueError(f"data: {kind} {where!r} has no images in its {split} split")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
            raise ValueError(
                f"data: {kind} {where!r} has labels {int(labels.min())} to {int(labels.max())} in its {split} split, "
                f"but {len(class_names)} classes"
            )
    absent = sorted(set(range(len(class_names))) - set(train.unique().tolist()))
    if absent:
        raise ValueError(f"data: {kind} {where!r} has no train images of {few([class_names[i] for i in absent])}")


def few(names: list[str], shown: int = 5) -> str:
    """Returns the first names of a list, quoted, and the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more
