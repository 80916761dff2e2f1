"""Loads the pipeline and parses the class that a command is given."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from lpd_ext import LPDPipeline

DTYPES = ("float32", "bfloat16", "float16", "int8")


def load_pipeline(
    model: str | None, tokenizer: str | None = None, dtype: str = "", device: torch.device | str = "cpu"
) -> LPDPipeline:
    """Loads a pipeline by any name of its model; ValueError for a dtype that is not one of DTYPES."""
    import torch

    from lpd_ext import LPDPipeline

    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted: torch.dtype | Literal["int8"] | None = "int8" if dtype == "int8" else getattr(torch, dtype, None)
    return LPDPipeline.from_pretrained(model, tokenizer=tokenizer, dtype=wanted, device=device)


def parse_label(pipe: LPDPipeline, text: str) -> int | str | None:
    """Returns the class of that name, or if there is none the index or 'none' that the text stands for."""
    if text in pipe.class_names:
        return text
    if text.lower() == "none":
        return None
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
