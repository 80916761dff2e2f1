"""Run by torchrun: several trainings, one after the other, in one process group; the tests read what they leave.

The argument is a JSON file: a list of {"kind", "settings", "nan_in_rank"}. What a training raises goes to error.txt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lpd_tools.training.tokenizer import TokenizerTraining, train_tokenizer
from lpd_tools.training.transformer import LPDTraining, TransformerTask, train

losses = TransformerTask.losses


def run(kind: str, settings: dict[str, Any], nan_in_rank: int | None) -> None:
    def broken(self: TransformerTask, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        found = losses(self, model, batch)
        return found | {"loss": found["loss"] * torch.nan} if dist.get_rank() == nan_in_rank else found

    TransformerTask.losses = broken  # type: ignore[method-assign]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        if kind == "LPDTraining":
            train(LPDTraining(**values))
        else:
            train_tokenizer(TokenizerTraining(**values))
    except (RuntimeError, ValueError) as error:
        out = Path(settings["out_dir"])
        out.mkdir(exist_ok=True)
        (out / f"error_{dist.get_rank()}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for training in json.loads(Path(sys.argv[1]).read_text()):
        run(training["kind"], training["settings"], training["nan_in_rank"])
    dist.destroy_process_group()
