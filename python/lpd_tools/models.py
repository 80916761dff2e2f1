"""The pipeline and the class that a command is told."""

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
    """The pipeline of a model by any of its names; ValueError for a dtype that is none of DTYPES."""
    import torch

    from lpd_ext import LPDPipeline

    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted: torch.dtype | Literal["int8"] | None = "int8" if dtype == "int8" else getattr(torch, dtype, None)
    return LPDPipeline.from_pretrained(model, tokenizer=tokenizer, dtype=wanted, device=device)


def parse_label(pipe: LPDPipeline, text: str) -> int | str | None:
    """A class of that name, and only if there is none what else the text may mean."""
    if text in pipe.class_names:
        return text
    if text.lower() == "none":
        return None
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
