"""Fixtures shared by all tests: where the operators run, and the golden data.

Every operator test runs on each instruction set of this processor, on the CUDA kernels emulated by the CPU (once `make
emulated` has built them), and on a GPU if there is one. LPD_REQUIRE names what must not be missing: "emulated" or
"cuda", whose tests fail if they are skipped, and "nvcc", for the gates of test_cuda_static.py.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import emulation
import pytest
import torch

from lpd_ext import _C, ops

DATA = Path(__file__).parent / "data"
BACKENDS = ("backend", "host_backend")
REQUIRED = set(os.environ.get("LPD_REQUIRE", "").split())


def _has_cuda() -> bool:
    return torch.cuda.is_available() and _C.build_config()["cuda_architectures"] != ""


def _kind(backend: str) -> str:
    """cpu, emulated or cuda: what a backend is called before the dash."""
    return backend.partition("-")[0]


def all_backends() -> list[str]:
    backends = [f"cpu-{isa}" for isa in _C.available_cpu_isas()]
    if "emulated" in REQUIRED or emulation.library_path().exists():
        backends.append("emulated")
    if "cuda" in REQUIRED or _has_cuda():
        backends.append("cuda")
    return backends


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - {"emulated", "cuda", "nvcc"}
    if unknown:
        raise pytest.UsageError(f"LPD_REQUIRE may name emulated, cuda and nvcc, got {' '.join(sorted(unknown))}")
    config.addinivalue_line("markers", "cuda: needs a GPU and kernels for it")
    config.addinivalue_line("markers", "emulated: needs the emulated CUDA kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="no GPU, or no CUDA kernels in this build"))
        if item.get_closest_marker("emulated") and not emulation.library_path().exists():
            item.add_marker(pytest.mark.skip(reason="emulated CUDA kernels are not built: run `make emulated`"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    params = getattr(getattr(item, "callspec", None), "params", {})
    name = next((_kind(params[fixture]) for fixture in BACKENDS if fixture in params), "")
    name = next((marker for marker in ("cuda", "emulated") if item.get_closest_marker(marker)), name)
    if report.skipped and name in REQUIRED:
        report.outcome = "failed"
        report.longrepr = f"skipped, but LPD_REQUIRE asks for {name}: {report.longrepr}"
    return report


@contextmanager
def operators_on(name: str, test: str) -> Iterator[torch.device]:
    """Runs operators on a backend, "emulated-sm90" among them; the device to put their arguments on."""
    if name == "cuda":
        assert _has_cuda(), "no GPU, or no CUDA kernels in this build"
        yield torch.device("cuda")
    elif _kind(name) == "emulated":
        emulation.load()
        device = emulation.SM_90 if name == "emulated-sm90" else emulation.SM_80
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


@pytest.fixture(params=all_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Device to put an operator's arguments on; runs the test wherever the operators have kernels."""
    with operators_on(request.param, request.node.nodeid) as device:
        yield device


@pytest.fixture(params=[name for name in all_backends() if name != "cuda"])
def host_backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """`backend` without the GPU, for values in tensors that are not looked at there: that would wait for the device."""
    with operators_on(request.param, request.node.nodeid) as device:
        yield device


@pytest.fixture(params=[name for name in all_backends() if name.startswith("cpu-")])
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """`backend` for the operators that only the CPU has kernels for."""
    with operators_on(request.param, request.node.nodeid) as device:
        yield device


@pytest.fixture
def on_cuda_kernels(request: pytest.FixtureRequest) -> bool:
    """Whether `backend` or `host_backend` stands for the CUDA kernels, on a GPU or emulated."""
    params = request.node.callspec.params
    return any(_kind(params[fixture]) in ("emulated", "cuda") for fixture in BACKENDS if fixture in params)


@pytest.fixture
def is_emulated(request: pytest.FixtureRequest) -> bool:
    """Whether `backend` runs the CUDA kernels on the CPU, where thousands of draws take long."""
    return bool(request.node.callspec.params["backend"] == "emulated")
