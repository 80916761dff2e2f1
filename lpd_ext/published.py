"""The published models: repositories, sampling settings and class names."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from lpd_ext.model import LPDConfig

OWNER = "mit-han-lab"  # of the repositories on the hub, which have the models' names
NAMES = ("lpd_l_256", "lpd_xl_256", "lpd_xxl_256", "lpd_l_512", "lpd_xl_512")
TOKENIZER_REPOSITORY, TOKENIZER_FILE = "FoundationVision/LlamaGen", "vq_ds16_c2i.pt"  # one for all of them
TOKENIZER_CODES = 16384

# (width, depth, grid side) -> steps, guidance scale and repulsion of the published evaluation scripts; the guidance is
# linear, the order locality-aware, temperature 1 without filters. With 32 steps they take 5.4 (L) and 5.0 (XL).
_SAMPLING = {
    (1024, 24, 16): (20, 4.8, 2),
    (1280, 36, 16): (20, 4.9, 2),
    (1536, 48, 16): (20, 5.9, 3),
    (1024, 24, 32): (48, 7.3, 4),
    (1280, 36, 32): (48, 6.0, 4),
}


def has_published_size(config: LPDConfig) -> bool:
    """Whether a model has the width, depth, grid, codes and classes of a published one."""
    height, width = config.grid
    sizes = (config.vocab_size, config.num_classes) == (TOKENIZER_CODES, 1000)
    return sizes and height == width and (config.dim, config.depth, height) in _SAMPLING


def sampling_settings(config: LPDConfig) -> dict[str, Any]:
    """Returns the `SamplingDefaults` of the published model of this size, as a dict; empty for other sizes."""
    if not has_published_size(config):
        return {}
    steps, guidance, repulsion = _SAMPLING[config.dim, config.depth, config.grid[0]]
    return {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "guidance_schedule": "linear",
        "repulsion_threshold": repulsion,
    }


def class_names(config: LPDConfig) -> list[str]:
    """Returns ImageNet's class names for a model of published size, synonyms after commas; else none."""
    return list(imagenet_class_names()) if has_published_size(config) else []


@cache
def imagenet_class_names() -> tuple[str, ...]:
    """Returns WordNet's words for ImageNet's 1,000 classes by index (from timm, Apache-2.0)."""
    return tuple((resources.files("lpd_ext") / "data" / "imagenet_classes.txt").read_text("utf-8").splitlines())
