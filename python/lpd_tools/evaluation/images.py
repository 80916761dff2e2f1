"""Sets of RGB images, read when they are asked for: a folder, an .npz file, a data set, or pixels in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpd_ext.content import read_json
from lpd_ext.picture import UnreadableImageError, open_image, to_rgb
from lpd_tools.data.image_source import ImageSource
from lpd_tools.data.names import in_order, pictures_below, whole_numbers
from lpd_tools.data.pixels import centre_crop
from lpd_tools.evaluation.npz import mapped_array, read_arrays

MANIFEST_FILE, NPZ_FILE = "manifest.json", "samples.npz"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageSet:
    """Images of one size (height, width), with labels int64 [count] and names of the labels where they are known.

    `read` gives uint8 [B, H, W, 3] for a list of indices; where the images are files, UnreadableImageError names the
    first that cannot be read.
    """

    name: str
    size: tuple[int, int]
    labels: Tensor | None
    count: int
    read: Callable[[Sequence[int]], Tensor]
    class_names: Mapping[int, str] = field(default_factory=dict)
    from_files: bool = False

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
        read = self.read
        return replace(
            self, name=name, labels=labels, count=len(chosen), read=lambda some: read([chosen[i] for i in some])
        )


def data_images(source: ImageSource, size: tuple[int, int], name: str) -> ImageSet:
    """The pictures of a data set's split at `size` (h, w), those of another size cropped to their centre square."""

    def read_one(i: int) -> Tensor:
        try:
            image = to_rgb(source.image(i))
        except UnreadableImageError as error:
            raise UnreadableImageError(f"images: {source.name(i)!r} is not a whole image: {error}") from error
        return _at_size(image, size, source.name(i))

    def read(index: Sequence[int]) -> Tensor:
        return torch.stack([read_one(i) for i in index])

    return ImageSet(name, size, source.labels, len(source), read, dict(enumerate(source.class_names)), from_files=True)


def open_images(source: str, size: tuple[int, int] | None = None) -> ImageSet:
    """The images of an .npz file (arr_0 uint8 [n, H, W, 3], labels arr_1) or of a folder.

    A folder may be one that `lpd generate` wrote, or hold images or one folder of them per class: if the names of these
    are all whole numbers, they are the labels. With `size` (h, w), images of another size are cropped to their centre
    square and resized, as ADM crops ImageNet (h must be w). Raises FileNotFoundError, or ValueError naming what cannot
    be read.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"images: there is no folder and no file at {source!r}")
    if path.is_file():
        images = _npz_images(path)
    elif (path / NPZ_FILE).is_file():
        images = replace(_npz_images(path / NPZ_FILE), class_names=_names_in_manifest(path))
    elif (path / "parts").is_dir():
        raise ValueError(f"images: {source!r} has no {NPZ_FILE} yet: call `lpd generate` again to finish it")
    else:
        return _folder_images(path, size)
    return images if size is None or size == images.size else _resized(images, size)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of generated images; FileNotFoundError, or ValueError for a damaged one."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"out: {str(folder)!r} has no {MANIFEST_FILE}: `lpd generate` did not write it")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise ValueError(f"out: {str(path)!r} is no manifest of generated images")
    return manifest


def _names_in_manifest(folder: Path) -> dict[int, str]:
    """The names of the labels that `lpd generate` gave its images; empty if it did not, or its model had none."""
    names = read_manifest(folder).get("class_names") if (folder / MANIFEST_FILE).is_file() else None
    return dict(enumerate(map(str, names))) if isinstance(names, list) else {}


def in_memory(
    pixels: Tensor, labels: Tensor | None, name: str, class_names: Mapping[int, str] | None = None
) -> ImageSet:
    """Pixels uint8 [n, H, W, 3] as an image set."""
    size = (pixels.shape[1], pixels.shape[2])
    return ImageSet(name, size, labels, len(pixels), lambda index: pixels[list(index)], class_names or {})


def _folder_images(folder: Path, size: tuple[int, int] | None) -> ImageSet:
    found = sorted(pictures_below(folder, _SUFFIXES))
    if not found:
        raise ValueError(f"images: {str(folder)!r} holds no images ({', '.join(_SUFFIXES)})")
    if (folder / MANIFEST_FILE).is_file() and len(found) != (announced := read_manifest(folder).get("images")):
        raise ValueError(
            f"images: {str(folder)!r} holds {len(found)} images of {announced}: call `lpd generate` again to finish it"
        )
    labels, class_names = _labels_by_folder(folder, found)
    if size is None:
        first = _read_image(found[0])
        wanted = (first.height, first.width)
    else:
        wanted = size

    def read_one(i: int) -> Tensor:
        image = _read_image(found[i])
        if size is None and (image.height, image.width) != wanted:
            raise ValueError(
                f"images: {str(found[i])!r} has {image.height} x {image.width} pixels, others have {wanted[0]} x "
                f"{wanted[1]}; give a size to bring them all to it"
            )
        return _at_size(image, wanted, str(found[i]))

    def read(index: Sequence[int]) -> Tensor:
        return torch.stack([read_one(i) for i in index])

    return ImageSet(str(folder), wanted, labels, len(found), read, class_names, from_files=True)


def _labels_by_folder(folder: Path, found: Sequence[Path]) -> tuple[Tensor | None, dict[int, str]]:
    """Labels int64 [n] of images by the folder that each lies in, and their names; none if not all lie in such."""
    if not all(path.parent.parent == folder for path in found):
        return None, {}
    classes = in_order({path.parent.name for path in found})
    numbers = whole_numbers(classes) or list(range(len(classes)))
    label = dict(zip(classes, numbers, strict=True))
    generated = (folder / MANIFEST_FILE).is_file()  # its folders are called by the labels
    names = _names_in_manifest(folder) if generated else dict(zip(numbers, classes, strict=True))
    return torch.tensor([label[path.parent.name] for path in found]), names


def _read_image(path: Path) -> Image.Image:
    try:
        return to_rgb(open_image(path))
    except UnreadableImageError as error:
        raise UnreadableImageError(f"images: {str(path)!r} is not a whole image: {error}") from error


def _at_size(image: Image.Image, size: tuple[int, int], name: str) -> Tensor:
    """Pixels uint8 [H, W, 3] of an RGB image: as it is, or its centre square at another size."""
    if (image.height, image.width) != size:
        if size[0] != size[1]:
            raise ValueError(f"images: {name!r} is not {size[0]} x {size[1]}, and only squares are cropped and resized")
        try:
            image = centre_crop(image, size[0])
        except UnreadableImageError as error:
            raise UnreadableImageError(f"images: {name!r}: {error}") from error
    return torch.from_numpy(np.array(image))


def _resized(images: ImageSet, size: tuple[int, int]) -> ImageSet:
    def read(index: Sequence[int]) -> Tensor:
        arrays = images.read(index).numpy()
        return torch.stack([_at_size(Image.fromarray(array), size, images.name) for array in arrays])

    return replace(images, size=size, read=read)


def _npz_images(path: Path) -> ImageSet:
    pixels = mapped_array(path, "arr_0")
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
    if labels is not None and (labels.dtype.kind not in "iu" or int(labels.min()) < 0):
        some = labels[:3].tolist()
        raise ValueError(
            f"images: arr_1 of {str(path)!r} must hold whole numbers from 0 on, got {labels.dtype} {some}..."
        )
    known = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    kept = pixels

    def read(index: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([kept[i] for i in index]))

    return ImageSet(str(path), (pixels.shape[1], pixels.shape[2]), known, len(pixels), read)
