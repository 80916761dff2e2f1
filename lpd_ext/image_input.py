"""Reads pictures and masks of many kinds into tensors of the size that a model draws: checked, resized on request.

A picture is a file's path, a PIL image, a numpy array (uint8, 16-bit grey or floats in [0, 1]; [H, W], [H, W, C] or
[B, H, W, C]) or a tensor (uint8, or floats in [-1, 1] as a pipeline's 'pt' has them; [H, W], [C, H, W] or
[B, C, H, W]). EXIF orientation is applied to files and PIL images; transparent parts are put on white, 16-bit grey is
scaled to 8 bits, palettes, CMYK and other modes are converted by Pillow.

A mask takes the same forms, in one channel: pixels of at least half brightness, or the ones of a mask of 0 and 1, are
painted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lpd_ext.picture import UnreadableImageError, check_pixels, open_image, to_rgb

Picture = str | Path | Image.Image | NDArray[Any] | Tensor
Pictures = Picture | Sequence[Picture]
Kind = Literal["pil", "np", "pt"]
Resize = Literal["stretch", "crop"]
Size = tuple[int, int]  # height, width, in pixels

MAX_PIXELS = 50_000_000  # of a picture, checked before it is decoded
_RESIZE: tuple[Resize, ...] = ("stretch", "crop")


def read_pictures(pictures: Pictures, name: str) -> tuple[list[Tensor], Kind, bool]:
    """Returns pictures float32 [3, H, W] in [-1, 1], the kind of the first, and whether a single one was given.

    Raises ValueError, TypeError or FileNotFoundError with the picture's name.
    """
    entries, is_one = _entries(pictures, name, batch_dim=4)
    kind: Kind = "pil"
    if entries and isinstance(entries[0], np.ndarray | Tensor):
        kind = "np" if isinstance(entries[0], np.ndarray) else "pt"
    return [_picture(entry, _name(name, i, is_one)) for i, entry in enumerate(entries)], kind, is_one


def read_masks(masks: Pictures, name: str) -> tuple[list[Tensor], bool]:
    """Returns masks bool [H, W], True where to paint, and whether a single one was given; errors as `read_pictures`."""
    entries, is_one = _entries(masks, name, batch_dim=3)
    return [_mask(entry, _name(name, i, is_one)) for i, entry in enumerate(entries)], is_one


def fit_picture(picture: Tensor, size: Size, resize: Resize | None, name: str) -> Tensor:
    """Resizes a picture [3, h, w] to [3, H, W]; with resize None, ValueError unless it has that size."""

    def smoothly(image: Tensor, size: Size) -> Tensor:
        return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)

    return _fit(picture[None], size, resize, name, smoothly)[0]


def fit_mask(mask: Tensor, size: Size, resize: Resize | None, name: str) -> Tensor:
    """Resizes a mask [h, w] to [H, W]: a pixel is painted if any pixel that it covers is."""

    def any_of(image: Tensor, size: Size) -> Tensor:
        return F.interpolate(image, size, mode="area").gt(0).float()

    return _fit(mask[None, None].float(), size, resize, name, any_of)[0, 0] > 0


def check_resize(resize: object) -> None:
    """Raises ValueError unless resize is None or one of the ways to resize."""
    if resize is not None and resize not in _RESIZE:
        raise ValueError(f"resize must be None, 'stretch' or 'crop', got {resize!r}")


def _fit(
    image: Tensor, size: Size, resize: Resize | None, name: str, resized: Callable[[Tensor, Size], Tensor]
) -> Tensor:
    height, width = found = (image.shape[2], image.shape[3])
    if found == size:
        return image
    if resize is None:
        raise ValueError(
            f"{name} must have {size[1]} x {size[0]} pixels, got {width} x {height}: "
            "resize='stretch' or resize='crop' makes it fit"
        )
    if resize == "stretch":
        return resized(image, size)
    scale = max(size[0] / height, size[1] / width)
    larger = resized(image, (max(size[0], round(height * scale)), max(size[1], round(width * scale))))
    top, left = (larger.shape[2] - size[0]) // 2, (larger.shape[3] - size[1]) // 2
    return larger[:, :, top : top + size[0], left : left + size[1]]


def _name(name: str, index: int, is_one: bool) -> str:
    return name if is_one else f"{name}[{index}]"


def _entries(value: Any, name: str, batch_dim: int) -> tuple[list[Any], bool]:
    """Returns one entry per picture, and whether a single picture was given; batch_dim: dims of batched arrays."""
    if isinstance(value, str | Path | Image.Image):
        return [value], True
    if isinstance(value, np.ndarray | Tensor):
        one_plane = value.ndim == 3 and (1 in value.shape or _has_colours(value))
        several = value.ndim >= batch_dim and not (batch_dim == 3 and one_plane)
        return (list(value), False) if several else ([value], True)
    if isinstance(value, Sequence):
        return list(value), False
    raise TypeError(
        f"{name} must be a picture (a path, a PIL image, a numpy array or a tensor) or a list of them, got "
        f"{type(value).__name__}"
    )


def _picture(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return _in_range(_channels_first(value, name), name).expand(3, -1, -1).contiguous()
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        planes = torch.from_numpy(np.array(value, np.float32))
        planes = planes.permute(2, 0, 1) if planes.ndim == 3 else planes
        planes = _channels_first(planes, name)
        return (_in_range(planes, name, low=0) * 2 - 1).expand(3, -1, -1).contiguous()
    pixels = np.array(_rgb(value, name))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def _mask(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray | Tensor) and not _has_colours(value):
        if isinstance(value, np.ndarray) and value.dtype.kind not in "buif":
            raise ValueError(f"{name} must hold numbers or booleans, got {value.dtype}")
        plane = torch.from_numpy(np.array(value, np.float32)) if isinstance(value, np.ndarray) else value.detach()
        plane = plane.cpu().float()
        if plane.ndim == 3 and 1 in (plane.shape[0], plane.shape[2]):
            plane = plane[0] if plane.shape[0] == 1 else plane[..., 0]
        if plane.ndim != 2 or 0 in plane.shape:
            raise ValueError(f"{name} must be [H, W], in one channel, got shape {list(value.shape)}")
        floating = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
        white = 1 if floating or plane.max() <= 1 else 255
        if not bool(((plane >= 0) & (plane <= white)).all()):  # NaN neither
            raise ValueError(f"{name} must hold numbers in [0, {white}], white where to paint")
        return plane >= white / 2
    pixels = np.array(_rgb(value, name, background=(0, 0, 0)).convert("L"))
    return torch.from_numpy(pixels >= 128)


def _has_colours(value: Any) -> bool:
    """Whether an array is one colour picture in numpy's layout."""
    return isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] in (3, 4)


def _rgb(value: Any, name: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    of_file = f" ({str(value)!r})" if isinstance(value, str | Path) else ""
    try:
        if isinstance(value, str | Path):
            if not Path(value).exists():
                raise FileNotFoundError(f"{name} is {str(value)!r}, where there is no file")
            value = open_image(value, MAX_PIXELS)
        elif isinstance(value, np.ndarray):
            value = _from_array(value, name)
        elif not isinstance(value, Image.Image):
            raise TypeError(
                f"{name} must be a path, a PIL image, a numpy array or a tensor, got {type(value).__name__}"
            )
        check_pixels(value, MAX_PIXELS)
        try:
            return to_rgb(ImageOps.exif_transpose(value), background)
        except OSError as error:  # a truncated file that the caller opened
            raise UnreadableImageError(str(error)) from error
    except UnreadableImageError as error:
        raise ValueError(f"{name}{of_file} cannot be read: {error}") from error


def _from_array(value: NDArray[Any], name: str) -> Image.Image:
    grey = value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value
    deep = grey.dtype == np.uint16 and grey.ndim == 2
    if 0 in grey.shape or not (deep or (grey.dtype == np.uint8 and (grey.ndim == 2 or grey.shape[2:] in ((3,), (4,))))):
        raise ValueError(
            f"{name} must be uint8 or floats in [0, 1], [H, W] or [H, W, C] of 1, 3 or 4 channels (16 bits: of one), "
            f"got {value.dtype} {list(value.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(grey))


def _channels_first(value: Tensor, name: str) -> Tensor:
    """Returns [1 or 3, H, W], float32, on the CPU."""
    planes = value[None] if value.ndim == 2 else value
    if planes.ndim != 3 or planes.shape[0] not in (1, 3) or 0 in planes.shape:
        raise ValueError(f"{name} must have 1 or 3 channels, got shape {list(value.shape)}")
    planes = planes.detach().cpu()
    if planes.dtype == torch.uint8:
        return planes.float() / 127.5 - 1
    if not planes.is_floating_point():
        raise ValueError(f"{name} must be floats or uint8, got {value.dtype}")
    return planes.float()


def _in_range(planes: Tensor, name: str, low: int = -1) -> Tensor:
    if not bool(((planes >= low) & (planes <= 1)).all()):  # NaN neither
        raise ValueError(f"{name} must hold numbers in [{low}, 1]")
    return planes
