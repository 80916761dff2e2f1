"""The machine and the versions that every figure is published with."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lpd_ext import _C


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what every figure is published with: processor or card, threads, versions and commit."""
    described: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads(), "isa": _C.cpu_isa()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        described = {"gpu": card.name, "multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda}
    return described | {"torch": torch.__version__, "lpd_ext": version()}


def version() -> str:
    """Returns the version, with the commit if the command belongs to a checkout or runs in one (as in `make bench`)."""
    for folder in (Path(__file__).parents[2], Path.cwd()):
        if (folder / ".git").exists() and (folder / "lpd_ext" / "_C.pyi").exists():
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
            try:
                commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            except (OSError, subprocess.CalledProcessError):
                continue  # no git here, or it does not trust the folder
            return f"{_C.__version__} ({commit})"
    return _C.__version__


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
