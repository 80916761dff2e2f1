"""Have pip satisfy a requirement on PyTorch: the one given, else one that suits what is installed and the machine.

Only the version is chosen here. Which build it is (CPU, or CUDA with its libraries, as on pip's default index for
Linux) is up to the index that pip is configured for.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys

MINIMUM = (2, 10)
ANY_NEW_ENOUGH = "torch>=2.10"
WITHOUT_DRIVER = "torch==2.13.0"  # no NVIDIA driver found: the version that the library is tested with


def choose(installed: str | None) -> str:
    """The requirement for a machine with that version installed, or None; pip leaves a version that satisfies it."""
    numbers = re.match(r"(\d+)\.(\d+)", installed or "")
    new_enough = numbers is not None and (int(numbers[1]), int(numbers[2])) >= MINIMUM
    return ANY_NEW_ENOUGH if new_enough or shutil.which("nvidia-smi") else WITHOUT_DRIVER


def main(requirement: str) -> int:
    """Exit status of pip."""
    try:
        installed = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if requirement == "auto":
        requirement = choose(installed)
    if installed is None:
        print(f"Installing {requirement} ...", flush=True)
    return subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", requirement], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "auto"))
