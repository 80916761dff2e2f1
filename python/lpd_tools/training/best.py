"""The best weights of a training: those whose test loss was lowest."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lpd_ext.content import content_of
from lpd_tools.training.checkpoints import BEST, CHECKPOINTS, read_checkpoint


class Best(NamedTuple):
    """A checkpoint, how many steps had been done, and the test loss then."""

    checkpoint: Path
    step: int
    loss: float


def best_of(folder: str | Path) -> Best | None:
    """Reads the best checkpoint of the training in `folder`; None without a test loss, ValueError if damaged."""
    path = Path(folder) / CHECKPOINTS / BEST
    if not path.is_file():
        return None
    with content_of(path):
        progress = read_checkpoint(path)["progress"]
        return Best(path, int(progress["done"]), float(progress["best"]))


def best_sentence(folder: str | Path, steps: int) -> str | None:
    """Returns a sentence about the best checkpoint for the end of a training of `steps`; None without a test loss."""
    best = best_of(folder)
    if best is None:
        return None
    if best.step == steps:
        return f"the test loss was lowest at the end, {best.loss:.4g}: more steps may lower it further"
    return (
        f"the test loss was lowest after step {best.step} of {steps}, {best.loss:.4g}: "
        "`lpd bundle` takes those weights, and the last ones by --weights last"
    )
