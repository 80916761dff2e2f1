"""Folders of pictures, one folder for each class."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpd_ext.picture import open_image, reads_heif
from lpd_tools.data.image_source import DataSet, ImageSource, check_share, check_splits, digest, few, held_out
from lpd_tools.data.names import in_order, is_hidden, pictures_below

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
HEIF_SUFFIXES = frozenset({".heic", ".heif"})  # which Pillow reads with the help of pillow-heif
OPTIONS = {"held_out": "0.1"}  # the share held out where there is no folder of test images

log = logging.getLogger(__name__)


class FolderSource(ImageSource):
    """Pictures by their paths below a folder."""

    def __init__(self, root: Path, paths: list[str], labels: Tensor, class_names: tuple[str, ...]) -> None:
        self.root = root
        # One array instead of a million strings, whose reference counts would copy them into each worker process.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.labels = labels
        self.class_names = class_names

    def image(self, index: int) -> Image.Image:
        """Picture `index`, decoded; UnreadableImageError if it cannot be."""
        return open_image(self.root / self.name(index))

    def name(self, index: int) -> str:
        """The path of picture `index` below the root."""
        return os.fsdecode(self._paths[index])

    def fingerprint(self) -> str:
        """SHA-256 of paths, labels and class names."""
        return digest(self._paths.tobytes(), self.labels.numpy().tobytes(), *self.class_names)


def open_folders(location: str, options: dict[str, str]) -> DataSet:
    """root/train/<class> with root/val/<class> (or root/test/<class>); a share is held out of root/train or root alone.

    Raises FileNotFoundError for a missing root, ValueError for folders that are no data set.
    """
    root, share = Path(location), check_share(options["held_out"])
    if not root.is_dir():
        raise FileNotFoundError(f"data: there is no folder {location!r}")
    # A lone folder `train` of pictures is a class of that name.
    if (root / "train").is_dir() and _folders(root / "train"):
        test = next((name for name in ("val", "test") if (root / name).is_dir()), None)
        splits, names = _held_out_splits(root, "train", share) if test is None else _given_splits(root, test)
    else:
        splits, names = _held_out_splits(root, "", share)
    sources = []
    for files in splits:
        labels = torch.tensor([label for label, _ in files], dtype=torch.int64)
        sources.append(FolderSource(root, [path for _, path in files], labels, names))
    check_splits("folder", location, sources[0].labels, sources[1].labels, names)
    return DataSet("folder", sources[0], sources[1])


Files = list[tuple[int, str]]  # label, path below the root


def _given_splits(root: Path, test: str) -> tuple[list[Files], tuple[str, ...]]:
    names = _folders(root / "train")
    others = _folders(root / test)
    if names != others:
        differences = [
            f"{few([name for name in a if name not in b])} only in {where}"
            for a, b, where in ((names, others, "train"), (others, names, test))
            if set(a) - set(b)
        ]
        raise ValueError(f"data: the class folders of {str(root)!r} differ: {'; '.join(differences)}")
    return [_files(root, split, names) for split in ("train", test)], tuple(names)


def _held_out_splits(root: Path, below: str, share: float) -> tuple[list[Files], tuple[str, ...]]:
    names = _folders(root / below)
    if not names:
        raise ValueError(f"data: {str(root)!r} has no class folders; images belong in <folder>/<class>/")
    files = _files(root, below, names)
    test = [held_out(path, share) for _, path in files]
    log.info(
        "%s has no val or test: %d of its %d pictures are held out by their names (?held_out=%g)",
        root, sum(test), len(files), share,
    )  # fmt: skip
    return [[file for file, out in zip(files, test, strict=True) if out == side] for side in (False, True)], tuple(
        names
    )


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return in_order(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def _files(root: Path, split: str, names: list[str]) -> Files:
    files: Files = []
    empty, left_out = [], 0
    for label, name in enumerate(names):
        top = root / split / name
        found = sorted(path.relative_to(root).as_posix() for path in pictures_below(top, SUFFIXES | HEIF_SUFFIXES))
        readable = [path for path in found if reads_heif() or Path(path).suffix.lower() not in HEIF_SUFFIXES]
        left_out += len(found) - len(readable)
        if not readable:
            empty.append(f"{split}/{name}" if split else name)
        files += [(label, path) for path in readable]
    heif = f"{left_out} HEIC pictures of {str(root / split)!r} are left out: `pip install pillow-heif` reads them"
    if empty:
        why = f"; {heif}" if left_out else ""
        raise ValueError(
            f"data: no images in {few(empty)} of {str(root)!r} (files ending in {', '.join(sorted(SUFFIXES))}){why}"
        )
    if left_out:
        log.warning("%s", heif)
    return files
