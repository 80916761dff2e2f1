"""Settings of the data programs. Imports no heavy library: `lpd --help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lpd_tools.settings import ANY_AMOUNT, AT_LEAST_ONE, Range, Settings, setting

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
DATA_HELP = (
    "data set: fashion-mnist[:folder], folder:path[?held_out=0.1], or hf:path-or-hub-name[?option=value&...] with the "
    "options image and label (columns), train and test (splits), config and held_out"
)


@dataclass(frozen=True)
class IconFolder(Settings):
    """Settings of `lpd prepare-icons`."""

    package: tuple[str, ...] = setting(
        ..., "unpacked npm package of icons: emoji-datasource-*, an Iconify set, or one with assets/<code points>.*"
    )
    out: str = setting(..., "image folder to make, with train/<class> and val/<class>")
    classes: str = setting("", "TOML table of classes (empty: the one that comes with this program)")
    size: int = setting(64, "side of the square pictures in pixels", range=AT_LEAST_ONE)
    margin: int = setting(4, "empty pixels on every side of an icon", range=ANY_AMOUNT)
    background: str = setting("#eef2f6", "colour behind the icons, by name or #rrggbb")
    placements: int = setting(
        1, "pictures of each train icon: the first in the middle, others shifted, smaller, ...", range=AT_LEAST_ONE
    )
    held_out: float = setting(
        0.1,
        "share of the emoji of each class whose pictures all go to val",
        range=Range(0, 1, open_low=True, open_high=True),
    )
    variants: int = setting(
        3, "most variants of an emoji (skin tones, woman and man) from each package", range=AT_LEAST_ONE
    )
    seed: int = setting(0, "random seed of the placements")


@dataclass(frozen=True)
class TokenCaching(Settings):
    """Settings of `lpd cache-tokens`.

    When a folder is continued, only `workers`, `strict` and paths may change.
    """

    tokenizer: str = setting(..., "tokenizer weights")
    out: str = setting(..., "folder to write or resume")
    data: str = setting("fashion-mnist", DATA_HELP)
    image_size: int = setting(
        0, "side of the square images in pixels; 0: 32 for fashion-mnist, else 256", range=ANY_AMOUNT
    )
    background: str = setting("white", "colour behind transparent images, by name or #rrggbb")
    mirror: bool = setting(True, "encode the mirror image of each train image too")
    strict: bool = setting(False, "stop at the first image that cannot be read, rather than skip and list it")
    batch_size: int = setting(64, "images per forward pass", range=AT_LEAST_ONE)
    shard_size: int = setting(4096, "images per file", range=AT_LEAST_ONE)
    workers: int = setting(2, "processes that read and crop images; 0: none beside this one", range=ANY_AMOUNT)
    device: str = setting("", "cpu, cuda or cuda:0; empty: cuda if there is one")


@dataclass(frozen=True)
class TokenCheck(Settings):
    """Settings of `lpd check-tokens`."""

    tokens: str = setting(..., "token cache")
    tokenizer: str = setting("", "tokenizer weights expected to match")
