"""Loads the pipeline and parses the class that a command is given."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lpd_ext import LPDPipeline

DTYPES = ("float32", "bfloat16", "float16", "int8")


def load_pipeline(
    model: str | Path | None,
    tokenizer: str | Path | None = None,
    dtype: str = "",
    device: torch.device | str = "cpu",
) -> LPDPipeline:
    """Loads a pipeline by any name of its model; ValueError for a dtype that is not one of DTYPES (empty: its own)."""
    import torch

    from lpd_ext import LPDPipeline

    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted: torch.dtype | Literal["int8"] | None = "int8" if dtype == "int8" else getattr(torch, dtype, None)
    return LPDPipeline.from_pretrained(model, tokenizer=tokenizer, dtype=wanted, device=device)


def carried_names(model: str | None, tokenizer: str | None, dtype: str | None) -> dict[str, str | None]:
    """Returns the names that pictures carry of the model that drew them, the default one by its own name.

    A later version may have another default, and `--like` must find the model that drew the picture.
    """
    from lpd_ext.bundled import DEFAULT_MODEL

    return {"model": model or DEFAULT_MODEL, "tokenizer": tokenizer or None, "dtype": dtype or None}


def parse_label(pipe: LPDPipeline, text: str) -> int | str | None:
    """Returns the class of that name, or if there is none the index or 'none' that the text stands for."""
    if text in pipe.class_names:
        return text
    if text.lower() == "none":
        return None
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
