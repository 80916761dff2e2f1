"""Install PyTorch here unless a new enough one is: a CUDA build only where an NVIDIA driver is found."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys

MINIMUM = (2, 13)
CPU_BUILD = "torch==2.13.0"


def main(requirement: str) -> None:
    try:
        installed = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    if installed and tuple(int(part) for part in installed.split(".")[:2]) >= MINIMUM:
        return
    if requirement != "auto":
        command = [requirement]
    elif shutil.which("nvidia-smi"):
        command = ["torch>=2.13"]
    else:
        command = [CPU_BUILD]
    print(f"Installing {' '.join(command)} ...", flush=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *command], check=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "auto")
