"""Fashion-MNIST: its IDX files, the committed fixture, and the images made of them."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from lpd_tools.data.fashion_mnist import centre_grey, load_fashion_mnist, read_idx, to_images

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"


def test_fixture_is_balanced() -> None:
    for split, count in (("train", 200), ("test", 300)):
        data = load_fashion_mnist(split, DATA)
        assert data.pixels.shape == (count, 28, 28)
        assert torch.bincount(data.labels).tolist() == [count // 10] * 10


def test_images_are_padded_grey_and_in_range() -> None:
    pixels = load_fashion_mnist("test", DATA).pixels[:7]
    images = to_images(pixels)
    assert images.shape == (7, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert (images.min(), images.max()) == (-1, 1)
    assert (images[:, :, :2] == -1).all()
    assert (images[..., -2:] == -1).all()
    assert torch.equal(((centre_grey(images).squeeze(1) + 1) * 127.5).round().to(torch.uint8), pixels)


def idx(*shape: int, value: int = 0) -> bytes:
    return gzip.compress(
        struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes([value]) * math.prod(shape)
    )


@pytest.mark.parametrize(
    ("images", "labels", "label", "problem"),
    [
        ((3, 28, 28), (4,), 0, r"must hold \[n, 28, 28\] and \[n\], got \[3, 28, 28\] and \[4\]"),
        ((4, 28, 28), (3,), 0, r"got \[4, 28, 28\] and \[3\]"),
        ((4, 32, 32), (4,), 0, r"got \[4, 32, 32\] and \[4\]"),
        ((4, 784), (4,), 0, r"got \[4, 784\] and \[4\]"),
        ((4, 28, 28), (4, 1), 0, r"got \[4, 28, 28\] and \[4, 1\]"),
        ((4, 28, 28), (4, 28, 28), 0, r"got \[4, 28, 28\] and \[4, 28, 28\]"),
        ((0, 28, 28), (0,), 0, r"got \[0, 28, 28\] and \[0\]"),
        ((4, 28, 28), (4,), 10, "has the label 10, of 10 classes"),
    ],
)
def test_idx_files_that_do_not_go_together(
    images: tuple[int, ...], labels: tuple[int, ...], label: int, problem: str, tmp_path: Path
) -> None:
    """More labels than images would end half way, more images would silently be cut."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx(*images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(*labels, value=label))
    with pytest.raises(ValueError, match=problem):
        load_fashion_mnist("train", tmp_path)


def test_damaged_idx_file(tmp_path: Path) -> None:
    source = gzip.decompress((DATA / "t10k-images-idx3-ubyte.gz").read_bytes())
    (tmp_path / "short").write_bytes(source[:-1])
    (tmp_path / "foreign").write_bytes(b"PNG" + source)
    with pytest.raises(ValueError, match="holds 235199 bytes"):
        read_idx(tmp_path / "short")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "foreign")
    (tmp_path / "header").write_bytes(source[:9])
    packed = gzip.compress(source)
    (tmp_path / "short.gz").write_bytes(packed[:-9])
    (tmp_path / "plain.gz").write_bytes(source)
    (tmp_path / "damaged.gz").write_bytes(packed[:10] + b"\xff" * 50 + packed[60:])
    for name, problem in {
        "header": "ends within its header",
        "short.gz": "no whole gzip file",
        "plain.gz": "no whole gzip file",
        "damaged.gz": "no whole gzip file",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}' .*{problem}"):
            read_idx(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        load_fashion_mnist("all", DATA)
