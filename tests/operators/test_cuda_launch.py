"""Tests of the error of a launch that cannot work. Compiled here by nvcc, for one architecture; no GPU is needed."""

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


# As much of CUDA's runtime as launches ask for. A launch fails that wants more shared memory than its kernel may have,
# as the real one does, and a kernel may have what was set last.
STAND_IN = """
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#define __device__
#define __global__
#define __forceinline__ inline
#define CUDART_VERSION 12000
struct dim3 { unsigned x = 1, y = 1, z = 1; dim3(unsigned count = 1) : x(count) {} };
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess, cudaErrorInvalidValue, cudaErrorInsufficientDriver, cudaErrorNoDevice, cudaErrorSystemDriverMismatch,
  cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaFuncAttributes { int ptxVersion; };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { struct { unsigned x, y, z; } clusterDim; int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
constexpr unsigned cudaStreamNonBlocking = 1;
inline std::atomic<size_t> limit[2];  // of the kernel on each device
inline std::atomic<int> times_set, streams;
inline thread_local int current_device = 0;
inline cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = 1 << 20; return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "limit too low"; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  limit[current_device] = bytes;
  ++times_set;
  return cudaSuccess;
}
template <class... Rest>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Rest...) {
  std::this_thread::yield();
  return config->dynamicSmemBytes <= limit[current_device] ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = reinterpret_cast<void*>(static_cast<uintptr_t>(++streams));
  return flags == cudaStreamNonBlocking ? cudaSuccess : cudaErrorInvalidValue;
}
"""

LAUNCHES = """
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/cuda.cuh"

void kernel(int) {}

int main() {
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, &failed] {
      current_device = t / 2;
      for (int i = 0; i < 3000; ++i) {
        try {
          lpd::launch("some_kernel", kernel, dim3(1), dim3(32), (t % 2 ? 50 + i % 50 : 60) << 10, nullptr, 1);
        } catch (const std::runtime_error&) {
          ++failed;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const bool two_streams = lpd::create_stream() != lpd::create_stream();
  std::printf("%d %zu %zu %d %d", failed.load(), limit[0].load(), limit[1].load(), times_set <= 100, two_streams);
}
"""


def test_the_limit_of_shared_memory_is_only_raised(tmp_path: Path) -> None:
    """Four threads launch one kernel on two devices, with more and less of it."""
    compiler = shutil.which("c++") or "g++"
    (tmp_path / "cuda_runtime.h").write_text(STAND_IN)
    (tmp_path / "main.cpp").write_text(LAUNCHES)
    sources = [tmp_path / "main.cpp", "-x", "c++", KERNELS / "common/cuda_launch.cu"]
    options = ["-std=c++17", "-O1", "-pthread", f"-I{tmp_path}", f"-I{KERNELS}", '-DLPD_CUDA_ARCHITECTURES="90"']
    command = [compiler, *options, *map(str, sources), "-o", str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout.split()
    assert found == ["0", str(99 << 10), str(99 << 10), "1", "1"]
