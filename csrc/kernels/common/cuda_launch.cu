// Failures of a launch, as sentences that say what to do.
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/cuda.cuh"

namespace lpd {
namespace {

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

std::string explain(cudaError_t error, size_t shared_bytes) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorSystemDriverMismatch:
      return "no NVIDIA driver found that can run CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
             std::to_string(CUDART_VERSION % 1000 / 10) + "; install or update it, or use tensors on the CPU";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "this GPU (compute capability " + std::to_string(device_attribute(cudaDevAttrComputeCapabilityMajor)) +
             "." + std::to_string(device_attribute(cudaDevAttrComputeCapabilityMinor)) +
             ") has no kernels in this build, which holds " LPD_CUDA_ARCHITECTURES
             "; build for it by LPD_CUDA_ARCHITECTURES (8.0 or newer), or use tensors on the CPU";
    default: break;
  }
  const int offered = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaErrorInvalidValue && shared_bytes > static_cast<size_t>(offered)) {
    return "it needs " + std::to_string(shared_bytes) + " bytes of shared memory per block, this GPU offers " +
           std::to_string(offered);
  }
  return cudaGetErrorString(error);
}

}  // namespace

void check_cuda(cudaError_t error, const char* kernel, size_t shared_bytes) {
  if (error == cudaSuccess) return;
  const std::string reason = explain(error, shared_bytes);
  cudaGetLastError();  // an error that is not sticky must not fail the next launch too
  throw std::runtime_error(std::string(kernel) + ": " + reason);
}

void allow_shared_memory(const char* name, const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), name, bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name,
             bytes);
  most = bytes;
}

void* create_stream() {
  cudaStream_t stream = nullptr;
  // Non-blocking: one that waits for the default stream, as others' work there would make it, cannot be captured.
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create_stream", 0);
  return stream;
}

bool can_form_clusters(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> known;
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find({device, kernel}); found != known.end()) return found->second;
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) {
      return known[{device, kernel}] = attributes.ptxVersion >= 90;
    }
  }
  cudaGetLastError();  // the launch will say it
  return false;
}

int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

size_t shared_memory_limit() { return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

}  // namespace lpd
