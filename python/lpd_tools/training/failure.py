"""Saves the batch and the weights of a step whose loss is not finite, so that it can be replayed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lpd_ext.content import content_of
from lpd_ext.state_files import complete_file
from lpd_tools.processes import Processes
from lpd_tools.training.checkpoints import read_pickle, write_pickle
from lpd_tools.training.loop_settings import LoopSettings

FORMAT = 1  # of the dict in the file


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is no finite number; the training stopped before it touched the weights."""

    def __init__(self, step: int, loss: float, norm: float, learning_rate: float, file: Path) -> None:
        super().__init__(
            f"loss is {loss:g} and the gradient's norm {norm:g} in step {step} (learning rate {learning_rate:g}): "
            f"batch and weights are in {str(file)!r}, earlier checkpoints untouched"
        )


def first_failed(group: Processes, loss: float) -> int:
    """Returns the first process whose own `loss` is not finite; 0 if only the gradient is not."""
    bad = group.sum([float(rank == group.rank and not math.isfinite(loss)) for rank in range(group.size)])
    return next((rank for rank, count in enumerate(bad) if count), 0)


def save_failure(
    settings: LoopSettings,
    group: Processes,
    rank: int,
    step: int,
    batch: Any,
    weights: Mapping[str, Tensor],
    sizes: Mapping[str, Any],
) -> Path:
    """Returns the file in `out_dir/failed` that process `rank` writes; it exists once this returns in any process."""
    path = Path(settings.out_dir) / "failed" / f"step_{step:09d}_rank_{rank}.pt"
    if group.rank == rank:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as temporary:
            write_pickle(
                {
                    "format": FORMAT,
                    "kind": type(settings).__name__,
                    "settings": asdict(settings),
                    "sizes": dict(sizes),
                    "step": step,
                    "rank": rank,
                    "batch": {item.name: getattr(batch, item.name) for item in fields(batch)},
                    "weights": dict(weights),
                },
                temporary,
            )
    group.sum([0.0])  # all wait for the file
    return path


def read_failure(path: str | Path) -> dict[str, Any]:
    """Reads the dict of `save_failure`; ValueError for another file. Never runs pickled code (weights_only)."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path must be a file of a training that stopped, but there is none at {str(path)!r}")
    with content_of(path, "is no file to replay"):
        failure = read_pickle(path)
    if not isinstance(failure, dict) or failure.get("format") != FORMAT or "batch" not in failure:
        raise ValueError(f"path {str(path)!r} is no file to replay")
    return failure
