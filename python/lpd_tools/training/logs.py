"""Logs of a training: CSV tables, TensorBoard, pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lpd_ext.content import content_of
from lpd_ext.state_files import complete_file
from lpd_tools.png_settings import save_png

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STEPS, EVALUATIONS = "steps.csv", "log.csv"


class TrainingLogs:
    """steps.csv (losses), log.csv (tests), samples/*.png, and the same for TensorBoard, below `out`.

    Removes rows after step `start`, which a training wrote after its last checkpoint. Writes nothing unless `enabled`,
    as in the first process.
    """

    def __init__(self, out: Path, start: int, *, tensorboard: bool, enabled: bool = True) -> None:
        self.out, self.enabled = out, enabled
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        for name in (STEPS, EVALUATIONS):
            drop_rows_after(out / name, start)
        if tensorboard:
            self._writer = summary_writer(out / "tensorboard", start)

    def __enter__(self) -> TrainingLogs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def row(self, name: str, row: Mapping[str, float | int]) -> None:
        """Adds a row, with its `step`, to one of the tables."""
        if not self.enabled:
            return
        append_csv(self.out / name, row)
        if self._writer is not None:
            for key, value in row.items():
                if key != "step":
                    self._writer.add_scalar(f"{Path(name).stem}/{key}", value, int(row["step"]))

    def picture(self, pixels: np.ndarray, step: int, settings: Mapping[str, Any]) -> None:
        """Stores a picture uint8 [height, width, 3] of what the network draws after `step` steps, with settings."""
        path = self.out / "samples" / f"step_{step:09d}.png"
        save_png(Image.fromarray(pixels), path, settings)
        if self._writer is not None:
            self._writer.add_image("samples", pixels, step, dataformats="HWC")


def summary_writer(folder: Path, start: int) -> SummaryWriter:
    """Returns a TensorBoard writer that hides earlier entries after step `start`; ImportError with the extra's name."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard logs need tensorboard: pip install 'lpd-ext[train]', or train with --no-tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=start + 1)


def append_csv(path: str | Path, row: Mapping[str, float | int | str]) -> None:
    """Appends one row to a CSV log, with the header first in a new file; 9 digits distinguish all float32 values.

    Columns that the log lacks are added to it, empty in the rows before; those that the row lacks stay empty in it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
    header = _header(path)
    if added := [name for name in cells if name not in header]:
        rows = _rows(path)
        padded = [header + added, *([*old, *[""] * len(added)] for old in rows[1:])]
        with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(padded)
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, fieldnames=header + added).writerow(cells)


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with content_of(path, "is no log of a training"), path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with content_of(path, "is no log of a training"), path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def drop_rows_after(path: str | Path, step: int) -> None:
    """Removes the rows of a CSV log that a resumed training will write again: those with a later step.

    A row that a killed process did not finish goes too.
    """
    path = Path(path)
    if not path.is_file():
        return
    lines = _rows(path)
    header = lines[0] if lines else []
    column = header.index("step") if "step" in header else 0
    with content_of(path, "is no log of a training"):
        kept = [row for row in lines[1:] if len(row) == len(header) and int(row[column]) <= step]
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines[:1] + kept)
