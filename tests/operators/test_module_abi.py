"""The built module needs nothing of torch but its stable ABI, as of the oldest version that the package allows.

The tests run on one torch; this is what lets the module that was built against it be used with the others.
"""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_abi_audit")

from torch_abi_audit import inspect_extension

from lpd_ext import _C


def test_the_module_keeps_to_the_stable_abi_of_the_oldest_torch() -> None:
    found = inspect_extension(Path(_C.__file__)).torch
    assert found.uses_torch
    assert found.stable, found.unstable_symbols
    assert not found.unknown_shim_symbols
    (oldest,) = (match[1] for line in requires("lpd-ext") or [] if (match := re.fullmatch(r"torch>=([\d.]+)", line)))
    assert found.min_torch_version == f"{oldest}.0"


def test_a_library_that_does_not_is_found() -> None:
    found = inspect_extension(Path(torch.__file__).parent / "lib" / "libtorch_python.so").torch
    assert not found.stable
