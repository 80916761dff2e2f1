"""Training state on disk: written atomically, resumed exactly."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpd_ext.state_files import complete_file

# Paths may move, logging and saving change no weight, and a run may go on for longer or in another precision.
_PATHS = ("tokens", "out_dir", "data_dir", "judge")
_LOGGING = ("save_every_s", "evaluate_every", "evaluate_images")
FREE_ON_RESUMING = (*_PATHS, *_LOGGING, "steps", "decay_steps", "precision")


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """ValueError naming the first setting (or entry of a tuple) of `config` outside its closed range."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {number}")


def fixed_settings(config: Any, **inputs: str) -> dict[str, Any]:
    """What a resumed training must share with its beginning: settings of `config`, and hashes of its `inputs`."""
    return {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUMING} | inputs


def save_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Writes `state` so that `path` holds either the old or the whole new file, whenever the process dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as temporary:
        torch.save(dict(state), temporary)


def load_state(path: str | Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state at `path`, or None if there is none; pickled code is never run (weights_only).

    Raises ValueError for a file that is damaged, foreign, or of a training with other fixed `settings`.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"path {str(path)!r} is not a readable training state: {type(error).__name__}") from error
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise ValueError(f"path {str(path)!r} holds no training state of this version")
    for name, value in settings.items():
        began = state["settings"].get(name)
        if began != value:
            raise ValueError(
                f"{name} is {value!r}, but the training in {str(path)!r} began with {began!r}: "
                "resume it with that, or start another in another out_dir"
            )
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
    new = not path.exists() or path.stat().st_size == 0
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
        lines = list(csv.reader(file))
    column = lines[0].index("step") if lines else 0
    with complete_file(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(lines[:1] + [row for row in lines[1:] if int(row[column]) <= step])


def autocast_dtype(precision: str) -> torch.dtype | None:
    """bf16 for "bf16", None for "fp32"; "auto" takes bf16 where the CPU multiplies it in hardware."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    if precision == "auto":
        precision = "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
