"""Pictures drawn by a model in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lpd_ext.model import LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.pictures import tiled


def draw_grid(model: LPDModel, tokenizer: VQTokenizer, count: int, guidance: float) -> np.ndarray:
    """Draws `count` images, classes in turn with fixed seeds, as one picture uint8 [height, width, 3]."""
    device = model.pos_embed.device
    pipe = LPDPipeline(model, tokenizer.to(device).eval(), SamplingDefaults(guidance_schedule="constant"))
    steps = min(20, model.config.num_tokens)
    labels = [i % model.config.num_classes for i in range(count)]
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    with torch.inference_mode():
        images = pipe(labels, seeds=list(range(count)), output_type="np", **options).images
    return tiled(images)
