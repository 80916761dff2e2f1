"""The averaged weights in a checkpoint of the transformer, as a folder that LPDModel and `lpd bundle` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lpd_ext.checkpoint import save_model
from lpd_ext.model import LPDConfig, LPDModel
from lpd_tools.training.checkpoints import read_checkpoint
from lpd_tools.training.settings import Export
from lpd_tools.training.state import fill


def sizes_in(settings: Mapping[str, Any]) -> LPDConfig:
    """The sizes of the transformer whose training shares `settings`; ValueError if they are of another training."""
    names = [item.name for item in fields(LPDConfig)]
    if missing := [name for name in names if name not in settings]:
        raise ValueError(f"a training of the transformer has sizes, but {missing[0]} is missing")
    return LPDConfig(**{name: settings[name] for name in names})


def model_in(checkpoint: str | Path) -> tuple[LPDModel, dict[str, Any]]:
    """The model of a checkpoint's averaged weights, and what config.json says of it: its tokenizer and class names.

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint of a transformer.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint must be a file, but there is none at {str(checkpoint)!r}")
    state = read_checkpoint(checkpoint)
    try:
        model = LPDModel(sizes_in(state["settings"]))
    except ValueError as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r}: {error}") from error
    fill(model, state["average"])
    said = {
        "tokenizer_sha256": state["settings"]["tokenizer_sha256"],
        "class_names": state["task"].get("class_names", []),
    }
    return model.eval(), said


def export(config: Export) -> Path:
    """Writes config.json and model.safetensors (fp16); returns the folder. Errors as `model_in`."""
    model, said = model_in(config.checkpoint)
    save_model(model, config.out, extra=said, dtype=torch.float16)
    return Path(config.out)
