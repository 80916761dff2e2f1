"""Run by torchrun: several trainings, one after the other, in one process group; the tests read what they leave.

The argument is a JSON file: a list of {"kind", "settings", "fault"}, where a fault {"rank", "step", "kind"} is a "nan"
for a loss or a "signal" in one process. What a training raises goes to error_<rank>.txt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lpd_tools.launch import run_and_leave
from lpd_tools.training.stopping import TrainingStopped
from lpd_tools.training.tokenizer import TokenizerTraining, train_tokenizer
from lpd_tools.training.transformer import Batch, LPDTraining, TransformerTask, train

batch_of, losses_of = TransformerTask.batch, TransformerTask.losses


def cause(fault: dict[str, Any]) -> None:
    """Makes the fault happen in the next training of a transformer, if it is in this process."""

    def batch(self: TransformerTask, step: int, rows: slice) -> Batch:
        self.at_fault = fault["rank"] == dist.get_rank() and fault["step"] == step
        if self.at_fault and fault["kind"] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(self, step, rows)

    def losses(self: TransformerTask, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        found = losses_of(self, model, batch)
        return found | {"loss": found["loss"] * torch.nan} if self.at_fault and fault["kind"] == "nan" else found

    TransformerTask.batch, TransformerTask.losses = batch, losses


def run(kind: str, settings: dict[str, Any], fault: dict[str, Any] | None) -> None:
    TransformerTask.batch, TransformerTask.losses = batch_of, losses_of
    if fault is not None:
        cause(fault)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        if kind == "LPDTraining":
            train(LPDTraining(**values))
        else:
            train_tokenizer(TokenizerTraining(**values))
    except (RuntimeError, ValueError, TrainingStopped) as error:
        out = Path(settings["out_dir"])
        out.mkdir(exist_ok=True)
        (out / f"error_{dist.get_rank()}.txt").write_text(f"{type(error).__name__}: {error}")


def run_all() -> None:
    dist.init_process_group("gloo")
    for training in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(training["kind"], training["settings"], training["fault"])
    dist.destroy_process_group()


if __name__ == "__main__":
    run_and_leave(run_all)
