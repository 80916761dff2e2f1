"""Puts a transformer, its tokenizer and sampling defaults into one folder that LPDPipeline loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from lpd_ext import published
from lpd_ext.checkpoint import load_model, read_config
from lpd_ext.hub import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, find_tokenizer, how_to_bundle, is_training_folder
from lpd_ext.model import LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.request import GuidanceSchedule
from lpd_ext.state_files import complete_file
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.model_files import model_files
from lpd_tools.data.token_cache import check_trained_with, file_hash
from lpd_tools.training.checkpoints import BEST, CHECKPOINTS
from lpd_tools.training.export import model_in
from lpd_tools.training.settings import Bundling

WEIGHTS = ("best", "last")
STEP = "trained_steps"  # in config.json
_OF_A_TRAINING = SamplingDefaults(10, 8.0, "linear", 0.9, repulsion_threshold=2)
_SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_schedule", "temperature", "repulsion_threshold")


def bundle(config: Bundling) -> Path:
    """Writes config.json, model.safetensors and tokenizer.safetensors (fp16); returns the folder.

    Of a training whose test loss was lowest before its end config.json says after which step that was. Raises
    ValueError unless the tokenizer is the one whose tokens the model was trained on, and the errors of
    `hub.find_model`.
    """
    schedules = get_args(GuidanceSchedule)
    if config.guidance_schedule not in (None, *schedules):
        raise ValueError(f"guidance_schedule must be one of {schedules}, got {config.guidance_schedule!r}")
    if config.weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {config.weights!r}")
    pipe, extra = _trained(config) if is_training_folder(Path(config.model)) else _found(config)
    given = {name: value for name in _SAMPLING if (value := getattr(config, name)) is not None}
    pipe.defaults = replace(pipe.defaults, **given)
    out = Path(config.out)
    pipe.save_pretrained(out, dtype=torch.float16)
    # Rounded to fp16, the tokenizer is another file: the folder names the one beside the model.
    entries = read_config(out) | {"tokenizer_sha256": file_hash(out / TOKENIZER_FILE)} | extra
    with complete_file(out / CONFIG_FILE) as file:
        file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return out


def _found(config: Bundling) -> tuple[LPDPipeline, dict[str, Any]]:
    """The pipeline of a model by any of its names."""
    files = model_files(config.model, config.tokenizer)
    return LPDPipeline.from_pretrained(files.model, tokenizer=files.tokenizer), {}


def _trained(config: Bundling) -> tuple[LPDPipeline, dict[str, Any]]:
    """Returns the pipeline of a training's weights, and their step if it is not the last."""
    folder = Path(config.model)
    if not config.tokenizer:
        raise ValueError(how_to_bundle(folder))
    tokenizer = find_tokenizer(config.tokenizer)
    model, said, extra = _weights(folder, config.weights)
    check_trained_with(said, tokenizer, str(folder))
    published_defaults = published.sampling_settings(model.config)
    defaults = SamplingDefaults(**published_defaults) if published_defaults else _OF_A_TRAINING
    names = list(said.get("class_names", [])) or published.class_names(model.config)
    return LPDPipeline(model, VQTokenizer.from_file(tokenizer), defaults, names), extra


def _weights(folder: Path, which: str) -> tuple[LPDModel, Mapping[str, Any], dict[str, Any]]:
    best = folder / CHECKPOINTS / BEST
    if which == "best" and best.is_file():
        model, said, step = model_in(best)
        return model, said, {STEP: step}
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(
            f"model: the training in {str(folder)!r} has not ended, and has no best weights yet; "
            "`lpd export` takes those of any checkpoint"
        )
    return load_model(folder), read_config(folder), {}
