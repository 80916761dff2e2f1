"""Locality-aware parallel decoding (LPD, arXiv 2507.01957) for autoregressive image models."""

from __future__ import annotations

import logging

import torch  # noqa: F401  (the extension needs its libraries to be loaded)

try:
    from lpd_ext._C import __version__
except ModuleNotFoundError as error:
    if error.name != "lpd_ext._C":
        raise
    raise ImportError(
        "lpd_ext was found in its source directory, where its extension is not built: leave that directory after "
        "'pip install .', or install it editable (see CONTRIBUTING.md)"
    ) from error
from lpd_ext.checkpoint import load_model
from lpd_ext.compat import accelerate, restore
from lpd_ext.drawing import LPDPipelineOutput, StepPreview
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.request import DecodeRequest, OrderPolicy, make_request
from lpd_ext.sampler import decode, generate
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program decides what is shown

__all__ = [
    "DecodeRequest",
    "LPDConfig",
    "LPDModel",
    "LPDPipeline",
    "LPDPipelineOutput",
    "OrderPolicy",
    "SamplingDefaults",
    "StepPreview",
    "TokenizerConfig",
    "VQTokenizer",
    "__version__",
    "accelerate",
    "decode",
    "generate",
    "load_model",
    "make_request",
    "restore",
]
