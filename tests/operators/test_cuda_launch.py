"""What a launch that cannot work says to the user. Compiled here by nvcc, for one architecture; no GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "csrc" / "kernels"
NVCC = shutil.which("nvcc")

PROGRAM = """
#include <cstdio>
#include <stdexcept>
#include <string>

#include "common/cuda.cuh"
#include "kv_cache/append_kv.h"

int main(int, char** arguments) {
  try {
    if (std::string(arguments[1]) == "launch") {
      lpd::AppendKvParams p{};
      p.num_segments = p.num_heads = p.max_rows = 1;
      p.head_dim = 64;
      lpd::launch_append_kv(p, nullptr);
    } else {
      lpd::check_cuda(static_cast<cudaError_t>(std::stoi(arguments[1])), "some_kernel", 1 << 20);
    }
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if NVCC is None:
        pytest.skip("SENTENCES OF FAILED LAUNCHES SKIPPED: no nvcc")
    folder = tmp_path_factory.mktemp("launch")
    (folder / "main.cu").write_text(PROGRAM)
    sources = [folder / "main.cu", KERNELS / "common/cuda_launch.cu", KERNELS / "kv_cache/append_kv_cuda.cu"]
    options = ["-std=c++17", "-arch=sm_90", "-O1", f"-I{KERNELS}", '-DLPD_CUDA_ARCHITECTURES="90"']
    command = [NVCC, *options, *map(str, sources), "-o", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def said(program: Path, argument: str) -> str:
    return subprocess.run([program, argument], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_without_a_driver(program: Path) -> None:
    assert said(program, "launch").startswith("append_kv: no NVIDIA driver found that can run CUDA ")


# Codes of cudaError_t.
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (35, "some_kernel: no NVIDIA driver found that can run CUDA "),
        (100, "some_kernel: no NVIDIA driver found that can run CUDA "),
        (209, "has no kernels in this build, which holds 90; build for it by LPD_CUDA_ARCHITECTURES (8.0 or newer)"),
        (1, "some_kernel: it needs 1048576 bytes of shared memory per block, this GPU offers "),
        (700, "some_kernel: an illegal memory access was encountered"),
    ],
)
def test_sentences(program: Path, code: int, sentence: str) -> None:
    assert sentence in said(program, str(code))


def test_success_says_nothing(program: Path) -> None:
    assert said(program, "0") == ""
