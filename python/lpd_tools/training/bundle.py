"""Puts a trained transformer, its tokenizer and sampling defaults into one folder that LPDPipeline loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import torch

from lpd_ext.checkpoint import load_model, read_config
from lpd_ext.hub import CONFIG_FILE, TOKENIZER_FILE
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.request import GuidanceSchedule
from lpd_ext.state_files import complete_file
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.token_cache import check_tokenizer, file_hash
from lpd_tools.training.settings import Bundling


def bundle(config: Bundling) -> Path:
    """Writes config.json, model.safetensors and tokenizer.safetensors (fp16); returns the folder.

    Raises ValueError unless the tokenizer is the one whose tokens the model was trained on.
    """
    schedules = get_args(GuidanceSchedule)
    if config.guidance_schedule not in schedules:
        raise ValueError(f"guidance_schedule must be one of {schedules}, got {config.guidance_schedule!r}")
    defaults = SamplingDefaults(
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_schedule="linear" if config.guidance_schedule == "linear" else "constant",
        temperature=config.temperature,
        repulsion_threshold=config.repulsion_threshold,
    )
    check_tokenizer(config.model, config.tokenizer)
    tokenizer = VQTokenizer.from_file(config.tokenizer)
    class_names = list(read_config(Path(config.model)).get("class_names", []))
    pipe = LPDPipeline(load_model(config.model), tokenizer, defaults, class_names)
    out = Path(config.out)
    pipe.save_pretrained(out, dtype=torch.float16)
    # Rounded to fp16, the tokenizer is another file: the folder names the one beside the model.
    entries = read_config(out) | {"tokenizer_sha256": file_hash(out / TOKENIZER_FILE)}
    with complete_file(out / CONFIG_FILE) as file:
        file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return out
