"""Tests of all operators: a twin of the same signature, kernels where it runs, names in torch.ops."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lpd_ext import _C, ops, reference


@pytest.mark.parametrize("name", ops.OPERATORS + ops.CPU_OPERATORS)
def test_operator_has_a_twin_with_the_same_arguments(name: str) -> None:
    schema = getattr(torch.ops.lpd_ext, name).default._schema
    wrapper = inspect.signature(getattr(ops, name)).parameters
    twin = inspect.signature(getattr(reference, name)).parameters
    assert [argument.name for argument in schema.arguments] == list(wrapper) == list(twin)
    assert getattr(ops, name).__doc__


@pytest.mark.parametrize("name", ops.OPERATORS + ops.CPU_OPERATORS)
def test_operator_has_kernels_for_cpu_cuda_and_fake_tensors(name: str) -> None:
    """On CUDA, those that only the CPU has kernels for are their plain twins."""
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lpd_ext::{name}", key)
    assert torch._library.simple_registry.singleton.find(f"lpd_ext::{name}").fake_impl.kernel is not None


def test_every_operator_of_the_library_is_listed() -> None:
    schemas = torch._C._jit_get_all_schemas()
    found = {schema.name.removeprefix("lpd_ext::") for schema in schemas if schema.name.startswith("lpd_ext::")}
    assert found == {*ops.OPERATORS, *ops.CPU_OPERATORS}


def test_unknown_instruction_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'sse9' is not available; this processor and build have: .*scalar"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() in _C.available_cpu_isas()


def test_build_config_names_the_build() -> None:
    config = _C.build_config()
    assert config["version"] == _C.__version__
    assert config["torch"].startswith("2.")


IMPORTED = """
import sys
import torch
before = set(sys.modules)
import lpd_ext
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print("torch._dynamo" in sys.modules)
"""


def test_importing_the_package_brings_in_what_it_needs_alone(tmp_path: Path) -> None:
    """torch.compile, which torch.compiler.disable loads at once, would cost each process 70 MB and a second."""
    command = [sys.executable, "-c", IMPORTED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    names, compiles = done.stdout.splitlines()
    assert set(names.split()) <= {"lpd_ext", "numpy", "PIL", "safetensors", "torch", *sys.stdlib_module_names}
    assert compiles == "False"
