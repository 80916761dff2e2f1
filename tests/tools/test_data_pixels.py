"""From pictures to the tokenizer's input: decoding, RGB, ADM's centre crop, batches of a reader."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.image_reader import ImageReader, Skipped, read_skipped, write_skipped
from lpd_tools.data.pixels import background_colour, centre_crop, square_pixels, to_input
from lpd_tools.data.sources import open_data

from lpd_ext.picture import UnreadableImageError, open_image, to_rgb

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"
WHITE = (255, 255, 255)


def grey(rows: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# crop


def test_crop_halves_by_averaging_boxes() -> None:
    image = grey([[0, 4, 10, 20], [8, 12, 30, 40], [100, 100, 1, 1], [100, 104, 1, 5]])
    assert np.asarray(centre_crop(image, 2)).tolist() == [[6, 25], [101, 2]]


def test_crop_takes_the_middle_and_cuts_an_odd_rest_right_and_below() -> None:
    wide = grey([[10 * row + column for column in range(6)] for row in range(3)])
    assert np.asarray(centre_crop(wide, 3)).tolist() == [[1, 2, 3], [11, 12, 13], [21, 22, 23]]
    tall = grey([[10 * row + column for column in range(3)] for row in range(8)])
    assert np.asarray(centre_crop(tall, 3))[:, 0].tolist() == [20, 30, 40]


@pytest.mark.parametrize(
    ("size", "halved", "resized", "corner"),
    [
        ((100, 300), [(50, 150)], (32, 96), (0, 32)),
        ((129, 257), [(64, 128), (32, 64)], (32, 64), (0, 16)),
        ((63, 70), [], (32, 36), (0, 2)),
        ((64, 95), [(32, 47)], (32, 47), (0, 7)),
        ((20, 25), [], (32, 40), (0, 4)),
        ((500, 375), [(250, 187), (125, 93), (62, 46)], (43, 32), (5, 0)),
    ],
)
def test_crop_is_halving_then_bicubic_then_middle(
    size: tuple[int, int], halved: list[tuple[int, int]], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = noise(*size)
    expected = image
    for half in halved:
        expected = expected.resize(half, Image.Resampling.BOX)
    expected = expected.resize(resized, Image.Resampling.BICUBIC)
    expected = expected.crop((*corner, corner[0] + 32, corner[1] + 32))
    assert np.array_equal(np.asarray(centre_crop(image, 32)), np.asarray(expected))


def test_crop_refuses_what_would_be_enlarged_without_bound() -> None:
    with pytest.raises(UnreadableImageError, match="1x51: one side is over 50 times the other"):
        centre_crop(grey([[0]] * 51), 32)
    assert centre_crop(grey([[7]] * 50), 4).size == (4, 4)


# RGB


def test_transparent_parts_show_the_background() -> None:
    image = Image.new("RGBA", (3, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.putpixel((2, 0), (0, 100, 200, 51))
    # 51/255 = 0.2 of the picture, 0.8 of the background.
    assert np.asarray(to_rgb(image)).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]]
    assert np.asarray(to_rgb(image, (100, 0, 0)))[0, 1:].tolist() == [[100, 0, 0], [80, 20, 40]]
    assert np.asarray(to_rgb(image.convert("LA"), (0, 255, 0)))[0, 1].tolist() == [0, 255, 0]
    palette = image.quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert np.asarray(to_rgb(palette, (1, 2, 3)))[0, 0].tolist() == [1, 2, 3]


def test_other_modes_become_rgb() -> None:
    assert np.asarray(to_rgb(grey([[0, 7, 255]]))).tolist() == [[[0] * 3, [7] * 3, [255] * 3]]
    deep = Image.fromarray(np.array([[0, 257 * 7, 65535, 128 * 257 + 100]], dtype=np.uint16))
    assert np.asarray(to_rgb(deep))[0, :, 1].tolist() == [0, 7, 255, 128]
    assert np.asarray(to_rgb(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    assert np.asarray(to_rgb(Image.new("CMYK", (1, 1), (255, 0, 0, 0)))).tolist() == [[[0, 255, 255]]]
    with pytest.raises(UnreadableImageError, match="floating-point pixels"):
        to_rgb(Image.new("F", (1, 1)))


def stored(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The picture as a file of that kind has it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return open_image(file.getvalue())


def value_of(image: Image.Image) -> list[int]:
    return np.asarray(to_rgb(image))[0, :, 0].tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("brightest", [255, 100, 0])
def test_dark_pictures_of_16_bits_stay_dark(kind: str, brightest: int) -> None:
    """Whose brightest value is one of 8 bits too: what white is, the file says."""
    image = stored(Image.fromarray(np.array([[0, brightest]], dtype=np.uint16)), kind)
    assert image.mode == "I;16"
    assert value_of(image) == [0, round(brightest / 257)]


def test_white_is_what_the_format_says() -> None:
    assert value_of(open_image(b"P5 2 1 65535\n\x00\x10\x80\x00")) == [0, 128]
    assert value_of(open_image(b"P5 3 1 300\n\x00\x00\x00\x96\x01\x2c")) == [0, 128, 255]
    grey = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert value_of(stored(grey, "TIFF", tiffinfo={262: 0})) == [255, 254, 0]  # white is zero
    twelve = tiff(bits=12, photometric=1, extra=(), data=b"\x00\x08\x00\xff\xf0")  # 0x000, 0x800, 0xfff
    assert value_of(twelve) == [0, 128, 255]
    clear = stored(grey, "PNG", transparency=257)
    assert np.asarray(to_rgb(clear, (9, 8, 7)))[0].tolist() == [[0, 0, 0], [9, 8, 7], [255, 255, 255]]


def tiff(
    bits: int, photometric: int, extra: tuple[int, ...], data: bytes, samples: int = 1, width: int = 3
) -> Image.Image:
    """A TIFF of one row, written by hand."""
    entries = [(256, 3, 1, width), (257, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, photometric), (277, 3, 1, samples),
               (278, 3, 1, 1), (279, 4, 1, len(data))]  # fmt: skip
    entries.append((258, 3, samples, bits if samples == 1 else bits | bits << 16))
    entries += [(338, 3, 1, value) for value in extra]
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries.append((273, 4, 1, start))
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return open_image(b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + data)


def test_colours_multiplied_by_alpha_are_divided_by_it() -> None:
    """TIFF's associated alpha: grey 100 at half, on black, lies there as 50."""
    data = bytes([50, 128, 100, 255, 0, 0])
    try:
        image = tiff(bits=8, photometric=1, extra=(1,), data=data, samples=2)
        assert image.mode == "La"
    except UnreadableImageError:
        assert int(PIL.__version__.split(".")[0]) < 13  # which knows no such TIFF
        image = Image.frombytes("La", (3, 1), data)
    assert np.asarray(to_rgb(image, (0, 0, 0)))[0, :, 0].tolist() == [50, 100, 0]
    assert np.asarray(to_rgb(image, (255, 0, 0)))[0].tolist() == [[177, 50, 50], [100, 100, 100], [255, 0, 0]]
    colours = Image.new("RGBA", (1, 1), (100, 0, 200, 128)).convert("RGBa")
    expected = np.asarray(to_rgb(colours.convert("RGBA"), (0, 255, 0)))
    assert np.array_equal(np.asarray(to_rgb(colours, (0, 255, 0))), expected)
    assert expected[0, 0, 1] == 127


MODES = list(dict.fromkeys([*Image.MODES, "La", "RGBa", "RGBX", "HSV", "LAB", "I;16L", "I;16B", "I;16N"]))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_or_is_an_unreadable_picture(mode: str) -> None:
    """None of Pillow's modes stops a program with an error that names no picture."""
    image = Image.new(mode, (4, 4))
    if mode in ("I", "F"):
        with pytest.raises(UnreadableImageError, match="whose range nothing tells"):
            square_pixels(image, 4, WHITE)
    else:
        assert square_pixels(image, 4, WHITE).shape == (3, 4, 4)


def test_what_cannot_be_converted_is_an_unreadable_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("conversion from XYZ to RGB not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(UnreadableImageError, match="pixels of mode CMYK: conversion from XYZ to RGB not supported"):
        square_pixels(Image.new("CMYK", (4, 4)), 4, WHITE)


def test_background_colours() -> None:
    assert background_colour("white") == WHITE
    assert background_colour("#0a141e") == (10, 20, 30)
    for text in ("blurple", "#0a141e80", ""):
        with pytest.raises(ValueError, match=r"background must be a colour such as"):
            background_colour(text)


def test_pixels_become_floats_in_order() -> None:
    image = Image.new("RGB", (2, 2), (0, 51, 255))
    image.putpixel((1, 0), (255, 0, 0))
    pixels = square_pixels(image, 2, WHITE)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0, 1].tolist() == [255, 0, 0]  # [channel, row, column]
    assert pixels[:, 1, 0].tolist() == [0, 51, 255]
    assert to_input(pixels[None])[0, :, 1, 0].tolist() == pytest.approx([-1, -0.6, 1])


def test_unreadable_files(tmp_path: Path) -> None:
    file = io.BytesIO()
    noise(40, 40).save(file, "JPEG")
    whole = file.getvalue()
    assert open_image(whole).size == (40, 40)
    (tmp_path / "cut.jpg").write_bytes(whole[:-100])
    with pytest.raises(UnreadableImageError, match="truncated"):
        open_image(tmp_path / "cut.jpg")
    for data in (b"", b"text", whole[:3]):
        with pytest.raises(UnreadableImageError, match="no image format that Pillow knows"):
            open_image(data)
    with pytest.raises(UnreadableImageError, match=r"^No such file or directory$"):
        open_image(tmp_path / "none.png")


# reader


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                image = Image.new("RGB", (8, 8), (i, 0 if label == "a" else 100, 0))
                image.putpixel((0, 0), (255, 255, 255))
                image.save(tmp_path / split / label / f"{i}.png")
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "train" / name).write_bytes(b"damaged")
    return f"folder:{tmp_path}"


@pytest.mark.parametrize("keep", [False, True])
def test_reader_puts_the_next_picture_in_the_place_of_an_unreadable_one(folder: str, keep: bool) -> None:
    reader = ImageReader(open_data(folder).train, 8, keep=keep)
    index = torch.tensor([0, 1, 2, 3, 4, 7])
    for _ in range(2):
        pixels = reader.pixels(index)
        assert pixels[:, 0, 1, 1].tolist() == [0, 3, 3, 3, 0, 0]
        assert pixels[:, 1, 1, 1].tolist() == [0, 0, 0, 0, 100, 0]
    assert [skipped.name for skipped in reader.skipped] == ["train/a/1.png", "train/a/2.png", "train/b/3.png"]
    assert reader.skipped[0] == Skipped("train", "train/a/1.png", "no image format that Pillow knows")
    assert len(reader) == 8
    strict = ImageReader(open_data(folder).train, 8, strict=True)
    strict.unreadable.update(reader.unreadable)  # of a training that was not strict before it was stopped
    with pytest.raises(UnreadableImageError, match="no image format"):
        strict.pixels(torch.tensor([1]))


def test_reader_mirrors_left_to_right(folder: str) -> None:
    reader = ImageReader(open_data(folder).train, 8)
    images = reader.images(torch.tensor([0, 0]), torch.tensor([False, True]))
    assert images.dtype == torch.float32
    assert images[0, :, 0, 0].tolist() == [1, 1, 1]
    assert images[1, :, 0, 7].tolist() == [1, 1, 1]
    assert torch.equal(images[1], images[0].flip(2))
    assert not torch.equal(images[1], images[0])
    assert torch.equal(reader.images(torch.tensor([0])), images[:1])


def test_reader_keeps_pictures(folder: str, tmp_path: Path) -> None:
    kept, fresh = (ImageReader(open_data(folder).train, 8, keep=keep) for keep in (True, False))
    index = torch.tensor([0, 3])
    before = kept.pixels(index)
    assert torch.equal(fresh.pixels(index), before)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "train/a/3.png")
    assert torch.equal(kept.pixels(index), before)
    assert fresh.pixels(index)[1, :, 1, 1].tolist() == [9, 9, 9]


def test_strict_reader_and_bad_arguments(folder: str, tmp_path: Path) -> None:
    source = open_data(folder).train
    with pytest.raises(UnreadableImageError, match=r"image 'train/a/1\.png' cannot be read: no image format"):
        ImageReader(source, 8, strict=True).pixels(torch.tensor([0, 1]))
    for path in (tmp_path / "train").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="none of the 8 train images can be read"):
        ImageReader(source, 8).pixels(torch.tensor([0]))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        ImageReader(source, 0)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        ImageReader(source, 8, threads=0)


def test_list_of_skipped_pictures(tmp_path: Path) -> None:
    write_skipped([Skipped("test", "a, b.png", 'says "no"')], tmp_path / "skipped.csv")
    assert (tmp_path / "skipped.csv").read_text() == 'split,name,reason\ntest,"a, b.png","says ""no"""\n'
    assert read_skipped(tmp_path / "skipped.csv") == [Skipped("test", "a, b.png", 'says "no"')]
    assert read_skipped(tmp_path / "none.csv") == []
