"""Sets of RGB images, read when they are asked for: a folder, an .npz file, Fashion-MNIST, or pixels in memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lpd_tools.data.fashion_mnist import BORDER, FASHION_MNIST_DIR, load_fashion_mnist
from lpd_tools.evaluation.metrics import read_arrays

MANIFEST_FILE, NPZ_FILE = "manifest.json", "samples.npz"
FASHION_MNIST = "fashion-mnist"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageSet:
    """Images of one size (height, width), with labels int64 [count] where they are known.

    `read` gives uint8 [B, H, W, 3] for a list of indices.
    """

    name: str
    size: tuple[int, int]
    labels: Tensor | None
    count: int
    read: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [B, H, W, 3]."""
        for start in range(0, self.count, batch_size):
            yield self.read(range(start, min(start + batch_size, self.count)))

    def subset(self, index: Sequence[int], name: str) -> ImageSet:
        """The images at `index`, in that order."""
        chosen = list(index)
        labels = None if self.labels is None else self.labels[chosen]
        return ImageSet(name, self.size, labels, len(chosen), lambda some: self.read([chosen[i] for i in some]))


def open_images(source: str, size: tuple[int, int] | None = None, data_dir: str | Path = FASHION_MNIST_DIR) -> ImageSet:
    """The images of "fashion-mnist:train" or ":test", an .npz file (arr_0 uint8 [n, H, W, 3], labels arr_1) or folder.

    A folder may be one that `lpd generate` wrote, or hold images or one folder of them per class. With `size` (h, w),
    images of another size are cropped to their centre square and resized (`centre_crop`; h must be w). Raises
    FileNotFoundError, or ValueError naming what cannot be read.
    """
    name, _, split = source.partition(":")
    if name == FASHION_MNIST and not Path(source).exists():
        return _fashion_mnist(split or "test", data_dir, source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"images: there is no folder and no file at {source!r}")
    if path.is_file():
        images = _npz_images(path)
    elif (path / NPZ_FILE).is_file():
        images = _npz_images(path / NPZ_FILE)
    elif (path / "parts").is_dir():
        raise ValueError(f"images: {source!r} has no {NPZ_FILE} yet: call `lpd generate` again to finish it")
    else:
        return _folder_images(path, size)
    return images if size in (None, images.size) else _resized(images, _square(size, images.name))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of generated images; FileNotFoundError, or ValueError for a damaged one."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"out: {str(folder)!r} has no {MANIFEST_FILE}: `lpd generate` did not write it")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"out: {str(path)!r} is not readable: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise ValueError(f"out: {str(path)!r} is no manifest of generated images")
    return manifest


def in_memory(pixels: Tensor, labels: Tensor | None, name: str) -> ImageSet:
    """Pixels uint8 [n, H, W, 3] as an image set."""
    size = (pixels.shape[1], pixels.shape[2])
    return ImageSet(name, size, labels, len(pixels), lambda index: pixels[list(index)])


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The centre square of an RGB image at side x side pixels, as ADM's ImageNet pipeline makes it.

    Halved by box filters while the shorter side is at least 2 · side, then resized bicubically, then cropped.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _fashion_mnist(split: str, data_dir: str | Path, name: str) -> ImageSet:
    data = load_fashion_mnist(split, data_dir)

    def read(index: Sequence[int]) -> Tensor:
        padded = torch.nn.functional.pad(data.pixels[list(index)], (BORDER,) * 4)
        return padded[..., None].expand(-1, -1, -1, 3)

    side = data.pixels.shape[1] + 2 * BORDER
    return ImageSet(name, (side, side), data.labels, len(data), read)


def _folder_images(folder: Path, size: tuple[int, int] | None) -> ImageSet:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.name[0] != ".")
    if not found:
        raise ValueError(f"images: {str(folder)!r} holds no images ({', '.join(_SUFFIXES)})")
    if (folder / MANIFEST_FILE).is_file() and len(found) != (announced := read_manifest(folder).get("images")):
        raise ValueError(
            f"images: {str(folder)!r} holds {len(found)} images of {announced}: call `lpd generate` again to finish it"
        )
    classes = sorted({path.parent.name for path in found if path.parent.parent == folder})
    in_classes = all(path.parent.parent == folder for path in found)
    labels = torch.tensor([classes.index(path.parent.name) for path in found]) if in_classes else None
    with _opened(found[0]) as first:
        own_size = (first.height, first.width)

    def read(index: Sequence[int]) -> Tensor:
        return torch.stack([_read_image(found[i], size or own_size, fixed=size is None) for i in index])

    return ImageSet(str(folder), size or own_size, labels, len(found), read)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"images: {str(path)!r} is not a readable image: {error}") from error


def _read_image(path: Path, size: tuple[int, int], fixed: bool) -> Tensor:
    """Pixels uint8 [H, W, 3] of a file; `fixed`: an image of another size is an error instead of resized."""
    with _opened(path) as file:
        try:
            image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"images: {str(path)!r} is not a whole image: {error}") from error
    if (image.height, image.width) != size:
        if fixed:
            raise ValueError(
                f"images: {str(path)!r} has {image.height} x {image.width} pixels, others have {size[0]} x {size[1]}; "
                "give a size to bring them all to it"
            )
        image = centre_crop(image, _square(size, str(path)))
    return torch.from_numpy(np.asarray(image).copy())


def _square(size: tuple[int, int] | None, name: str) -> int:
    if size is None or size[0] != size[1]:
        raise ValueError(f"images: those of {name!r} have another size than {size} and only squares are cropped")
    return size[0]


def _resized(images: ImageSet, side: int) -> ImageSet:
    def read(index: Sequence[int]) -> Tensor:
        cropped = [centre_crop(Image.fromarray(image.numpy()), side) for image in images.read(index)]
        return torch.from_numpy(np.stack([np.asarray(image) for image in cropped]))

    return ImageSet(images.name, (side, side), images.labels, images.count, read)


def _npz_images(path: Path) -> ImageSet:
    pixels = _mapped(path, "arr_0")
    if pixels is None:
        pixels = read_arrays(path, ("arr_0",)).get("arr_0")
    if pixels is None:
        raise ValueError(f"images: {str(path)!r} holds no images under arr_0")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        raise ValueError(
            f"images: arr_0 of {str(path)!r} must be uint8 [n, H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    labels = read_arrays(path, ("arr_1",)).get("arr_1")
    if labels is not None and labels.shape != (len(pixels),):
        raise ValueError(f"images: arr_1 of {str(path)!r} must hold {len(pixels)} labels, got {list(labels.shape)}")
    known = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    kept = pixels

    def read(index: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([kept[i] for i in index]))

    return ImageSet(str(path), (pixels.shape[1], pixels.shape[2]), known, len(pixels), read)


def _mapped(path: Path, name: str) -> np.ndarray | None:
    """An array of an uncompressed .npz file, memory-mapped: sample batches are larger than memory; else None."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            if f"{name}.npy" not in archive.namelist():
                return None
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                return None
            file.seek(entry.header_offset + 26)  # the local header's lengths of name and extra field
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
            if fortran or dtype.hasobject:
                return None
            return np.memmap(path, dtype, "r", file.tell(), shape)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"images: {str(path)!r} is no readable .npz file: {error}") from error
