"""PEP 517 backend: scikit-build-core, with torch as a build requirement only where the target environment has none.

Listing torch outright would unpack a second copy of several gigabytes into every isolated build.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import build_editable, build_sdist, build_wheel, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

_FIND_TORCH = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"


def _torch_is_at_hand() -> bool:
    if os.environ.get("LPD_TORCH_DIR") or importlib.util.find_spec("torch") is not None:
        return True
    # pip's isolation works through PYTHONPATH, which -I ignores: this asks the target environment.
    return subprocess.run([sys.executable, "-I", "-c", _FIND_TORCH], check=False).returncode == 0


def _check_compiler() -> None:
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        sys.exit("lpd-ext needs a C++17 compiler and found none: install g++ or clang++, or set CXX to one.")


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    _check_compiler()
    requires = list(_backend.get_requires_for_build_wheel(config_settings))
    return requires if _torch_is_at_hand() else [*requires, "torch>=2.10"]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    _check_compiler()
    requires = list(_backend.get_requires_for_build_editable(config_settings))
    return requires if _torch_is_at_hand() else [*requires, "torch>=2.10"]
