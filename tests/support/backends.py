"""The backends of operators in the tests: instruction sets of the CPU, the emulated CUDA kernels, a GPU.

LPD_REQUIRE names what must not be missing: "emulated" or "cuda", whose tests fail if they are skipped, and "nvcc", for
the gates of test_cuda_static.py.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import emulation
import pytest
import torch

from lpd_ext import _C, ops

REQUIRED = set(os.environ.get("LPD_REQUIRE", "").split())


def has_cuda() -> bool:
    return torch.cuda.is_available() and _C.build_config()["cuda_architectures"] != ""


def kind_of(backend: str) -> str:
    """cpu, emulated or cuda: what a backend is called before the dash."""
    return backend.partition("-")[0]


def all_backends() -> list[str]:
    backends = [f"cpu-{isa}" for isa in _C.available_cpu_isas()]
    if "emulated" in REQUIRED or emulation.library_path().exists():
        backends.append("emulated")
    if "cuda" in REQUIRED or has_cuda():
        backends.append("cuda")
    return backends


@contextmanager
def operators_on(name: str, test: str) -> Iterator[torch.device]:
    """Runs operators on a backend, "emulated-sm90" among them; the device to put their arguments on."""
    if name == "cuda":
        assert has_cuda(), "no GPU, or no CUDA kernels in this build"
        yield torch.device("cuda")
    elif kind_of(name) == "emulated":
        emulation.load()
        need_clusters = name == "emulated-sm90" or any(operator in test for operator in emulation.NEED_CLUSTERS)
        device = emulation.SM_90 if need_clusters else emulation.SM_80
        # Which of the thread orders a test sees is fixed by its name; all of them together see all.
        seed = zlib.crc32(test.encode())
        with pytest.MonkeyPatch.context() as patch, emulation.running(emulation.ORDERS[seed % 3], seed, device):
            patch.setattr(ops, "_ops", torch.ops.lpd_emulated)
            yield torch.device("cpu")
    else:
        before = _C.cpu_isa()
        _C.set_cpu_isa(name.removeprefix("cpu-"))
        yield torch.device("cpu")
        _C.set_cpu_isa(before)
