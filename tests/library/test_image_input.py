"""Pictures and masks of every kind that people have, and those that are refused, each with a sentence of its own."""

from __future__ import annotations

import io
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lpd_ext import image_input
from lpd_ext.image_input import fit_mask, fit_picture, read_masks, read_pictures

GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def picture(value: Any) -> Tensor:
    (one,), _, is_one = read_pictures(value, "images")
    assert is_one
    return one


def as_bytes(image: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of a picture in [-1, 1]; what was bytes comes back exactly."""
    values = ((image + 1) * 127.5).permute(1, 2, 0)
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8).numpy()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "YCbCr"])
def test_modes_of_pil(mode: str, tmp_path: Path) -> None:
    colours = Image.fromarray(COLOURS)
    image = Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else colours.convert(mode)
    wanted = np.repeat(GREY[..., None], 3, 2) if mode == "I;16" else np.asarray(image.convert("RGB"))
    assert (as_bytes(picture(image)) == wanted).all()
    if mode not in ("CMYK", "YCbCr"):
        image.save(tmp_path / "file.png")
        assert (as_bytes(picture(tmp_path / "file.png")) == wanted).all()
        assert (as_bytes(picture(str(tmp_path / "file.png"))) == wanted).all()


def test_transparent_parts_are_put_on_white() -> None:
    alpha = np.full((4, 6), 255, np.uint8)
    alpha[1, 2] = 0
    found = as_bytes(picture(Image.fromarray(np.dstack([COLOURS, alpha]))))
    assert (found[1, 2] == 255).all()
    assert (found[0] == COLOURS[0]).all()
    assert (as_bytes(picture(np.dstack([COLOURS, alpha]))) == found).all()


def test_exif_turns_pictures_and_masks_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    file = io.BytesIO()
    Image.fromarray(np.repeat(GREY, 4, 0)).save(file, "PNG", exif=exif)
    assert as_bytes(picture(Image.open(file)))[..., 0].tolist() == np.rot90(np.repeat(GREY, 4, 0), -1).tolist()
    file = io.BytesIO()
    Image.fromarray((GREY > 100).astype(np.uint8) * 255).save(file, "PNG", exif=exif)
    assert read_masks(Image.open(file), "masks")[0][0].tolist() == np.rot90(GREY > 100, -1).tolist()


def test_arrays_and_tensors() -> None:
    wanted = Image.fromarray(COLOURS)
    first = torch.from_numpy(COLOURS).permute(2, 0, 1)
    for value in (COLOURS, COLOURS / 255, first, first / 127.5 - 1, (first / 127.5 - 1).double()):
        assert (as_bytes(picture(value)) == np.asarray(wanted)).all()
    for value in (GREY, GREY[..., None], GREY.astype(np.uint16) * 257, GREY / 255, torch.from_numpy(GREY)):
        assert (as_bytes(picture(value)) == GREY[..., None]).all()
    kinds = [read_pictures(value, "images")[1] for value in (wanted, COLOURS, first, [first, COLOURS])]
    assert kinds == ["pil", "np", "pt", "pt"]
    for batch in (COLOURS[None].repeat(2, 0), first[None].repeat(2, 1, 1, 1), [COLOURS, COLOURS], (wanted, wanted)):
        several, _, is_one = read_pictures(batch, "images")
        assert not is_one
        assert [(as_bytes(one) == COLOURS).all() for one in several] == [True, True]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (4, 6, 1)])
def test_masks_of_zeros_and_ones(dtype: Any, shape: tuple[int, ...]) -> None:
    wanted = GREY > 100
    for value in (wanted.astype(dtype).reshape(shape), torch.from_numpy(wanted.astype(dtype)).reshape(shape)):
        (mask,), is_one = read_masks(value, "masks")
        assert is_one
        assert mask.tolist() == wanted.tolist()


def test_masks_are_white_from_half_on() -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    colours = Image.fromarray(grey).convert("RGB")
    for value in (grey, torch.from_numpy(grey), Image.fromarray(grey), colours, np.asarray(colours)):
        assert read_masks(value, "masks")[0][0].tolist() == [[False, False, True, True]]
    assert read_masks(np.array([[0.49, 0.5]]), "masks")[0][0].tolist() == [[False, True]]
    clear = Image.new("RGBA", (1, 1), (255, 255, 255, 0))  # nothing is painted there
    assert read_masks(clear, "masks")[0][0].tolist() == [[False]]
    several, is_one = read_masks(np.zeros((3, 4, 6), bool), "masks")
    assert (len(several), is_one) == (3, False)
    assert len(read_masks(torch.zeros(3, 1, 4, 6), "masks")[0]) == 3


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG file of that size, which no memory need hold."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    crc = zlib.crc32(b"IHDR" + header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + header + crc + bytes(4) + b"IDAT" + bytes(4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("sides", [(10_000, 10_000), (7_100, 7_100), (30_000, 30_000)])
def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path, sides: tuple[int, int]) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png(*sides))
    with pytest.raises(ValueError, match=r"images \(.*huge.png'\) cannot be read: .*pixels"):
        read_pictures(path, "images")
    if sides[0] < 20_000:  # above, Pillow itself does not open it
        with Image.open(path) as image, pytest.raises(ValueError, match="pixels are more than 50,000,000"):
            read_pictures(image, "images")


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("a shoe")
    Image.effect_noise((60, 40), 100).save(cut)
    cut.write_bytes(cut.read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"images \(.*text.png'\) cannot be read: no image format that Pillow knows"):
        read_pictures(text, "images")
    with pytest.raises(ValueError, match=r"images\[1\] \(.*cut.png'\) cannot be read: "):
        read_pictures([COLOURS, cut], "images")
    with Image.open(cut) as image, pytest.raises(ValueError, match=r"masks cannot be read: .*truncated"):
        read_masks(image, "masks")
    with pytest.raises(FileNotFoundError, match=r"images is '.*none.png', where there is no file"):
        read_pictures(tmp_path / "none.png", "images")
    with pytest.raises(ValueError, match=r"images \(.*\) cannot be read: "):
        read_pictures(tmp_path, "images")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, TypeError, "images must be a picture (a path, a PIL image, a numpy array or a tensor) or a list of them"),
        ([3], TypeError, "images[0] must be a path, a PIL image, a numpy array or a tensor, got int"),
        (COLOURS[..., :2], ValueError, "images must be uint8 or floats in [0, 1], [H, W] or [H, W, C]"),
        (COLOURS.astype(np.int64), ValueError, "got int64 [4, 6, 3]"),
        (COLOURS[:0], ValueError, "got uint8 [0, 6, 3]"),
        (COLOURS * 1.0, ValueError, "images must hold numbers in [0, 1]"),
        (np.full((4, 6), np.nan), ValueError, "images must hold numbers in [0, 1]"),
        (torch.full((3, 4, 6), 1.5), ValueError, "images must hold numbers in [-1, 1]"),
        (torch.full((3, 4, 6), float("nan")), ValueError, "images must hold numbers in [-1, 1]"),
        (torch.zeros(2, 4, 6), ValueError, "images must have 1 or 3 channels, got shape [2, 4, 6]"),
        (torch.zeros(3, 4, 6, dtype=torch.int32), ValueError, "images must be floats or uint8, got torch.int32"),
        (Image.new("F", (6, 4)), ValueError, "images cannot be read: floating-point pixels"),
        (Image.new("I", (6, 4)), ValueError, "images cannot be read: signed or 32-bit integer pixels"),
    ],
)
def test_bad_pictures(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        read_pictures(value, "images")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3, 4, 6), "masks[0] must be [H, W], in one channel, got shape [3, 4, 6]"),
        (np.zeros((4, 6, 3)), "masks must be uint8 or floats in [0, 1], [H, W] or [H, W, C]"),
        (np.full((4, 6), 256), "masks must hold numbers in [0, 255], white where to paint"),
        (np.full((4, 6), 1.5), "masks must hold numbers in [0, 1], white where to paint"),
        (np.full((4, 6), np.nan), "masks must hold numbers in [0, 1]"),
        (-torch.ones(4, 6), "masks must hold numbers in [0, 1]"),
        (np.array([["white"]]), "masks must hold numbers or booleans, got <U5"),
    ],
)
def test_bad_masks(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_masks(value, "masks")


def test_resizing_says_how() -> None:
    half = torch.zeros(3, 8, 16)
    half[:, :, 8:] = 1.0
    with pytest.raises(
        ValueError, match=re.escape("images[0] must have 4 x 4 pixels, got 16 x 8: resize='stretch' or")
    ):
        fit_picture(half, (4, 4), None, "images[0]")
    assert fit_picture(half[:, :, :8], (8, 8), None, "images[0]") is not None
    for resize in ("stretch", "crop"):
        fitted = fit_picture(half, (4, 4), resize, "images[0]")
        assert fitted.shape == (3, 4, 4)
        assert (fitted[:, :, :1].abs() < 0.15).all()
        assert (fitted[:, :, 3:] > 0.85).all()
    tall = torch.zeros(3, 16, 8)
    tall[:, 8] = 1.0
    assert fit_picture(tall, (4, 4), "crop", "images[0]").amax(2)[0].argmax() == 2
    assert fit_picture(half, (16, 64), "crop", "images[0]").shape == (3, 16, 64)


def test_a_resized_mask_keeps_every_masked_pixel() -> None:
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[33, 50] = True
    small = fit_mask(mask, (8, 8), "stretch", "masks")
    assert small.nonzero().tolist() == [[4, 4]]
    assert fit_mask(mask, (8, 8), "crop", "masks").nonzero().tolist() == [[4, 4]]
    large = fit_mask(mask[32:40, 48:56], (16, 16), "stretch", "masks")
    assert large.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    assert image_input.MAX_PIXELS == 50_000_000
