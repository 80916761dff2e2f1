"""Fixtures shared by all tests: where the operators run, and the golden data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lpd_ext import _C

DATA = Path(__file__).parent / "data"


@pytest.fixture(params=[f"cpu-{isa}" for isa in _C.available_cpu_isas()])
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Device to put an operator's arguments on; runs the test on every instruction set this processor has."""
    device, isa = request.param.split("-")
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    yield torch.device(device)
    _C.set_cpu_isa(before)
