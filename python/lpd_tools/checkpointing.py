"""Training state on disk: written atomically, resumed exactly."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def save_atomic(state: Mapping[str, Any], path: str | Path) -> None:
    """Writes `state` so that `path` holds either the old or the whole new file, whenever the process dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # The rename itself must reach the disk too.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_state(path: str | Path) -> dict[str, Any] | None:
    """The state at `path`, or None if there is none; pickled code is refused (weights_only)."""
    path = Path(path)
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"path: {str(path)!r} holds no training state")
    return state


def update_ema(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 - decay)·model, in place, for every entry of the state dict."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            average[name].lerp_(value.to(average[name].dtype), 1 - decay)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: int) -> float:
    """Linear warm-up over `warmup` steps, constant `peak`, cosine to zero over the last `decay` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    remaining = steps - step
    if remaining >= decay:
        return peak
    return float(peak * 0.5 * (1 - torch.cos(torch.tensor(torch.pi * remaining / decay))))


def append_csv(path: str | Path, row: Mapping[str, float | int | str]) -> None:
    """Appends one row to a CSV log, with the header first in a new file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def drop_rows_after(path: str | Path, step: int) -> None:
    """Removes the rows of a CSV log that a resumed training will write again: those with a later step."""
    path = Path(path)
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    path.unlink()
    for row in rows:
        if int(row["step"]) <= step:
            append_csv(path, row)


def autocast_dtype(precision: str) -> torch.dtype | None:
    """bf16 for "bf16", None for "fp32"; "auto" takes bf16 where the CPU multiplies it in hardware."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    if precision == "auto":
        precision = "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
