"""Fixtures shared by all tests: where the operators run.

Every operator test runs on each instruction set of this processor, on the CUDA kernels emulated by the CPU (once `make
emulated` has built them), and on a GPU if there is one: support/backends.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import emulation
import pytest
import torch
from backends import REQUIRED, all_backends, has_cuda, kind_of, operators_on

BACKENDS = ("backend", "host_backend")
# Modules that take three quarters of the time. `make check` leaves them out; `make test` begins with them, longest
# first, so that no core is left with one of them at the end.
SLOW = [
    "test_cuda_kernels",
    "test_miniature",
    "test_fuzz_operators",
    "test_bundled_quality",
    "test_bundled_model",
    "test_emulator",
    "test_training_resume",
    "test_training_processes",
    "test_study",
    "test_training_tokenizer",
    "test_cuda_traffic",
    "test_gpu_report",
    "test_evaluation_generate",
    "test_token_cache",
    "test_bench_serve",
    "test_growth",
    "test_sample_tokens",
    "test_few_rows",
    "test_normed_linear",
    "test_serve_ray",
    "test_training_parts",
    "test_page",
    "test_evaluation",
    "test_copies",
    "test_fuzz_files",
    "test_engine_mixed",
    "test_edits",
    "test_serve",
    "test_cuda_launch",
    "test_extreme_values",
    "test_examples",
    "test_residual_linear",
    "test_dtype_conversion",
    "test_web",
    "test_study_editing",
]


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - {"emulated", "cuda", "nvcc"}
    if unknown:
        raise pytest.UsageError(f"LPD_REQUIRE may name emulated, cuda and nvcc, got {' '.join(sorted(unknown))}")
    config.addinivalue_line("markers", "cuda: needs a GPU and kernels for it")
    config.addinivalue_line("markers", "emulated: needs the emulated CUDA kernels")
    config.addinivalue_line("markers", "slow: of a module that `make check` leaves out")
    missing = [name for name in SLOW if not list(Path(__file__).parent.glob(f"*/{name}.py"))]
    if missing:
        raise pytest.UsageError(f"conftest.py: no such module: {' '.join(missing)}")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
        if item.get_closest_marker("cuda") and not has_cuda():
            item.add_marker(pytest.mark.skip(reason="no GPU, or no CUDA kernels in this build"))
        if item.get_closest_marker("emulated") and not emulation.library_path().exists():
            item.add_marker(pytest.mark.skip(reason="emulated CUDA kernels are not built: run `make emulated`"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    params = getattr(getattr(item, "callspec", None), "params", {})
    name = next((kind_of(params[fixture]) for fixture in BACKENDS if fixture in params), "")
    name = next((marker for marker in ("cuda", "emulated") if item.get_closest_marker(marker)), name)
    if report.skipped and name in REQUIRED:
        report.outcome = "failed"
        report.longrepr = f"skipped, but LPD_REQUIRE asks for {name}: {report.longrepr}"
    return report


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
    return any(kind_of(params[fixture]) in ("emulated", "cuda") for fixture in BACKENDS if fixture in params)


@pytest.fixture
def is_emulated(request: pytest.FixtureRequest) -> bool:
    """Whether `backend` runs the CUDA kernels on the CPU, where thousands of draws take long."""
    return bool(request.node.callspec.params["backend"] == "emulated")
