"""Settings of the studies. Imports no heavy library: `lpd --help` must be quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lpd_tools.data.settings import FASHION_MNIST_DIR
from lpd_tools.settings import ANY_AMOUNT, AT_LEAST_ONE, Range, Settings, setting


@dataclass(frozen=True)
class Study(Settings):
    """Settings of `lpd study`, which writes `out` with `.csv`, `.json`, `_times.json`, `_*.png` and `_tables.md`.

    An interrupted study continues where it was.
    """

    out: str = setting(..., "path of the results, without suffix (docs/results/quality/8x8)")
    judge: str = setting(..., "a trained judge that was not used for tuning")
    model: str = setting("fashion_mnist", "bundled or published model, hub id, folder or weight file")
    tokenizer: str = setting("", "tokenizer for a model without one: weight file, folder or hub id")
    twin: str = setting("", "same-budget model trained with --no-mutual-visibility; same forms as --model")
    data_dir: str = setting(str(FASHION_MNIST_DIR), "folder of the Fashion-MNIST IDX files")
    steps: tuple[int, ...] = setting(
        (2, 4, 6, 8, 10, 12, 16, 24, 32, 64), "numbers of steps T, beside one a token", range=AT_LEAST_ONE
    )
    orders: tuple[str, ...] = setting(("locality", "halton", "random", "raster"), "orders")
    seeds: int = setting(3, "seeds of each point of the sweeps over steps", range=AT_LEAST_ONE)
    images: int = setting(2000, "guided images of each point", range=Range(2))
    scored_images: int = setting(
        500, "real and unguided images of each point that are scored in nats", range=AT_LEAST_ONE
    )
    proximities: tuple[float, ...] = setting((0.5, 1.0, 1.5, 2.5), "proximity thresholds")
    repulsions: tuple[int, ...] = setting((0, 1, 2, 3), "repulsion thresholds")
    guidance_scales: tuple[float, ...] = setting((1.0, 2.0, 4.0, 6.0, 8.0, 12.0), "guidance scales")
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    minutes: float = setting(math.inf, "begin no further point after this time", range=ANY_AMOUNT)
    times: bool = setting(False, "also time each image; needs an otherwise idle machine")


@dataclass(frozen=True)
class EditingStudy(Settings):
    """Settings of `lpd study-editing`, which writes `out` with `.csv`, `.json`, `_*.png` and `_tables.md`.

    An interrupted study continues where it was.
    """

    out: str = setting(..., "path of the results, without suffix (docs/results/editing)")
    judge: str = setting(..., "a trained judge that was not used for tuning")
    model: str = setting("fashion_mnist", "bundled or published model, hub id, folder or weight file")
    tokenizer: str = setting("", "tokenizer for a model without one: weight file, folder or hub id")
    data_dir: str = setting(str(FASHION_MNIST_DIR), "folder of the Fashion-MNIST IDX files")
    masks: tuple[str, ...] = setting(("half", "quarter", "centre"), "what is hidden: half, quarter or centre")
    steps: tuple[int, ...] = setting((2, 4, 8), "numbers of steps T", range=AT_LEAST_ONE)
    orders: tuple[str, ...] = setting(("locality", "random", "outward"), "orders of what is hidden")
    prefill_blocks: tuple[int, ...] = setting(
        (4, 8, 16), "prefill block sizes to compare with one single block", range=AT_LEAST_ONE
    )
    images: int = setting(1000, "test images to edit; distances are to the others", range=Range(4))
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    minutes: float = setting(math.inf, "begin no further point after this time", range=ANY_AMOUNT)
