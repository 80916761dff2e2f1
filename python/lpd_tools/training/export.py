"""The averaged weights in a checkpoint of the transformer, as a folder that LPDModel and `lpd bundle` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lpd_ext.checkpoint import save_model
from lpd_ext.content import content_of
from lpd_ext.model import LPDConfig, LPDModel
from lpd_tools.training.checkpoints import read_checkpoint
from lpd_tools.training.settings import Export
from lpd_tools.training.state import filled


def sizes_in(settings: Mapping[str, Any]) -> LPDConfig:
    """The sizes of the transformer whose training shares `settings`; ValueError if they are of another training."""
    names = [item.name for item in fields(LPDConfig)]
    if missing := [name for name in names if name not in settings]:
        raise ValueError(f"a training of the transformer has sizes, but {missing[0]} is missing")
    return LPDConfig(**{name: settings[name] for name in names})


def model_in(checkpoint: str | Path) -> tuple[LPDModel, dict[str, Any], int]:
    """The model of a checkpoint's averaged weights, its tokenizer and class names for config.json, and its steps.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint of a transformer.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint must be a file, but there is none at {str(checkpoint)!r}")
    with content_of(checkpoint):
        state = read_checkpoint(checkpoint)
        settings = state["settings"]
        sizes = sizes_in(settings)
        model = filled(lambda: LPDModel(sizes), state["average"])
        said = {
            "tokenizer_sha256": settings["tokenizer_sha256"],
            "class_names": state["task"].get("class_names", []),
        }
        step = int(state["progress"]["done"])
    return model.eval(), said, step


def export(config: Export) -> Path:
    """Writes config.json and model.safetensors (fp16); returns the folder. Errors as `model_in`."""
    model, said, _ = model_in(config.checkpoint)
    save_model(model, config.out, extra=said, dtype=torch.float16)
    return Path(config.out)
