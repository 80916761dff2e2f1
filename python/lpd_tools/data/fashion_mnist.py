"""Fashion-MNIST from its IDX files, as images the tokenizer takes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpd_tools.data.image_source import DataSet, ImageSource, digest
from lpd_tools.data.settings import FASHION_MNIST_DIR
from lpd_tools.pictures import psnr

CLASS_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_MOST_COMPRESSED = 1032  # bytes that one byte of a gzip file can stand for
BORDER = 2  # 28x28 images are zero-padded to 32x32
SIDE = 28 + 2 * BORDER


@dataclass(frozen=True)
class LabelledImages:
    """Grey images uint8 [count, 28, 28] with labels int64 [count]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array of a (gzipped) IDX file; ValueError if it is no such file or is cut short."""
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08":
                raise ValueError(f"path: {str(path)!r} is not an IDX file of bytes")
            sizes = file.read(4 * start[3])
            if len(sizes) < 4 * start[3]:
                raise ValueError(f"path: {str(path)!r} ends within its header")
            shape = struct.unpack(f">{start[3]}I", sizes)
            count = math.prod(shape)
            if count > _MOST_COMPRESSED * path.stat().st_size:
                raise ValueError(f"path: {str(path)!r} announces shape {shape}, more than its bytes can hold")
            data = file.read(count + 1)  # and no more, however far a damaged or hostile file can be unpacked
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"path: {str(path)!r} is no whole gzip file: {error}") from error
    if len(data) != count:
        held = f"holds {len(data)} bytes" if len(data) < count else "holds more bytes"
        raise ValueError(f"path: {str(path)!r} announces shape {shape} but {held}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def load_fashion_mnist(split: str, data_dir: str | Path = FASHION_MNIST_DIR) -> LabelledImages:
    """Split "train" (60,000) or "test" (10,000) of Fashion-MNIST; ValueError for files that do not go together."""
    stems = {"train": "train", "test": "t10k"}
    if split not in stems:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    paths = [Path(data_dir) / f"{stems[split]}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"data_dir: {path} is missing; install Debian's dataset-fashion-mnist or pass its folder"
            )
    pixels, labels = (torch.from_numpy(read_idx(path).copy()) for path in paths)
    if pixels.shape != (len(labels), 28, 28) or labels.shape != (len(labels),) or not len(labels):
        raise ValueError(
            f"data_dir: {str(paths[0])!r} and {str(paths[1])!r} must hold [n, 28, 28] and [n], got "
            f"{list(pixels.shape)} and {list(labels.shape)}"
        )
    if int(labels.max()) >= len(CLASS_NAMES):
        raise ValueError(
            f"data_dir: {str(paths[1])!r} has the label {int(labels.max())}, of {len(CLASS_NAMES)} classes"
        )
    return LabelledImages(pixels, labels.long())


class FashionMNISTSource(ImageSource):
    """Fashion-MNIST as grey 32x32 pictures: the 28x28 of the files with a black border."""

    class_names = CLASS_NAMES

    def __init__(self, data: LabelledImages, split: str) -> None:
        self._pixels = F.pad(data.pixels, (BORDER,) * 4)
        self._split = split
        self.labels = data.labels

    def image(self, index: int) -> Image.Image:
        """Picture `index`, mode L."""
        return Image.fromarray(self._pixels[index].numpy())

    def name(self, index: int) -> str:
        """The split and number of picture `index`."""
        return f"{self._split}[{index}]"

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels."""
        return digest(self._pixels.numpy().tobytes(), self.labels.numpy().tobytes())


def open_fashion_mnist(location: str, options: dict[str, str]) -> DataSet:
    """Fashion-MNIST of the folder `location`, by default where Debian's package puts it; there are no options."""
    folder = location or FASHION_MNIST_DIR
    train, test = (FashionMNISTSource(load_fashion_mnist(split, folder), split) for split in ("train", "test"))
    return DataSet("fashion-mnist", train, test, default_image_size=28 + 2 * BORDER)


def to_images(pixels: Tensor) -> Tensor:
    """Tokenizer input float32 [B, 3, 32, 32] in [-1, 1] of grey pixels uint8 [B, 28, 28]."""
    padded = F.pad(pixels, (BORDER,) * 4)
    return (padded.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def centre_grey(images: Tensor) -> Tensor:
    """Grey centre float [B, 1, 28, 28] of images [B, 3, 32, 32] in [-1, 1]."""
    return images[:, :, BORDER:-BORDER, BORDER:-BORDER].mean(1, keepdim=True)


def from_pixels(pixels: Tensor) -> Tensor:
    """Grey centre float [B, 1, 28, 28] in [-1, 1] of pixels uint8 [B, 32, 32, 3]."""
    return centre_grey(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)


def centre_psnr(restored: Tensor, pixels: Tensor) -> float:
    """PSNR in dB of grey images [B, 1, 28, 28] in [-1, 1] against their pixels uint8 [B, 28, 28]."""
    return psnr((restored.squeeze(1) + 1) * 127.5, pixels.float())


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A generator that depends on (seed, step, stream) alone; no state to save for resuming."""
    words = np.random.SeedSequence((seed, step, stream)).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
