"""Generated images on disk: a manifest, and PNG files by class or one .npz file; written so that a run can go on."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from lpd_ext.state_files import complete_file, write_text
from lpd_tools.evaluation.images import MANIFEST_FILE, NPZ_FILE, read_manifest
from lpd_tools.png_settings import save_png

FORMATS = ("png", "npz")
_PARTS = "parts"


class Samples(Protocol):
    """The destination of a run's images; `batch` is a range of the run's image numbers."""

    def has(self, batch: range) -> bool:
        """Whether every image of the batch is there, whole."""
        ...

    def write(self, batch: range, pixels: NDArray[np.uint8]) -> None:
        """Images uint8 [len(batch), H, W, 3]."""
        ...

    def finish(self, batches: Sequence[range]) -> None:
        """Called once, when every batch is there."""
        ...


class PngFolder:
    """One PNG file for each image, class/number.png, which carries the settings, its label and its seed."""

    def __init__(self, folder: Path, count: int, num_classes: int, settings: Mapping[str, Any], seed: int) -> None:
        self.folder, self.num_classes, self.settings, self.seed = folder, num_classes, settings, seed
        self.class_digits, self.digits = len(str(num_classes - 1)), len(str(count - 1))

    def path(self, number: int) -> Path:
        """The file of an image."""
        label = str(number % self.num_classes).zfill(self.class_digits)
        return self.folder / label / f"{str(number).zfill(self.digits)}.png"

    def has(self, batch: range) -> bool:
        return all(self.path(number).is_file() for number in batch)

    def write(self, batch: range, pixels: NDArray[np.uint8]) -> None:
        for number, image in zip(batch, pixels, strict=True):
            path = self.path(number)
            of_image = {"label": number % self.num_classes, "seed": self.seed + number}
            save_png(Image.fromarray(image), path, {**self.settings, **of_image})

    def finish(self, batches: Sequence[range]) -> None:
        pass


class NpzFile:
    """ADM's sample batch: arr_0 uint8 [n, H, W, 3] and labels arr_1 int64 [n]; batches lie beside it until all are."""

    def __init__(self, folder: Path, num_classes: int) -> None:
        self.path, self.parts, self.num_classes = folder / NPZ_FILE, folder / _PARTS, num_classes

    def _part(self, batch: range) -> Path:
        return self.parts / f"{batch.start}.npy"

    def has(self, batch: range) -> bool:
        return self.path.is_file() or self._part(batch).is_file()

    def write(self, batch: range, pixels: NDArray[np.uint8]) -> None:
        self.parts.mkdir(exist_ok=True)
        with complete_file(self._part(batch)) as temporary, temporary.open("wb") as file:
            np.save(file, pixels)

    def finish(self, batches: Sequence[range]) -> None:
        if not self.path.is_file():
            with complete_file(self.path) as temporary:
                self._join(batches, temporary)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _join(self, batches: Sequence[range], path: Path) -> None:
        """The parts as one array, one part in memory at a time: 50,000 images of 256 px are 10 GB."""
        count = batches[-1].stop
        shape = (count, *np.load(self._part(batches[0]), mmap_mode="r").shape[1:])
        header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                for batch in batches:
                    file.write(np.load(self._part(batch)).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, np.arange(count) % self.num_classes)


def open_samples(
    folder: Path, kind: str, count: int, num_classes: int, settings: Mapping[str, Any], seed: int
) -> Samples:
    """Opens the destination of `count` images of `num_classes` classes in one of FORMATS; image i has `seed` + i."""
    if kind != "png":
        return NpzFile(folder, num_classes)
    return PngFolder(folder, count, num_classes, settings, seed)


def check_manifest(folder: Path, settings: Mapping[str, Any]) -> None:
    """ValueError naming the first setting that is not the one the images in the folder were begun with."""
    begun = read_manifest(folder)["settings"]
    for name in [*settings, *(name for name in begun if name not in settings)]:
        if settings.get(name) != begun.get(name):
            raise ValueError(
                f"{name} is {settings.get(name)!r}, but the images in {str(folder)!r} were begun with "
                f"{begun.get(name)!r}: go on with that, or write to another folder"
            )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Begins a folder of images."""
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def remove_unfinished(folder: Path) -> None:
    """Deletes what a killed process left half written."""
    for path in folder.rglob(".*"):
        if path.is_file() and any(
            kind in path.name for kind in (".png.", ".npy.", f"{NPZ_FILE}.", f"{MANIFEST_FILE}.")
        ):
            path.unlink()
