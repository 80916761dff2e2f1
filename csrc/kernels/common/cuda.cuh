// The header of every .cu file, with ptx.cuh. nvcc compiles it as CUDA; with LPD_CUDA_EMULATED defined a C++
// compiler runs the same source on the CPU, one fiber per CUDA thread (tests/cuda_emulation). So kernels declare shared
// memory by SMEM_ARRAY or SMEM_DYN, start by launch(), and move 8 or 16 bytes at once by load_vector and store_vector.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef LPD_CUDA_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#define SMEM_ARRAY(T, name, count) __shared__ T name[count]
#define SMEM_DYN(name) extern __shared__ __align__(128) unsigned char name[]

namespace lpd {

// One access of 8 or 16 bytes, aligned to its size, to global or shared memory.
template <class Vector>
__device__ __forceinline__ Vector load_vector(const void* from) {
  static_assert(sizeof(Vector) == 8 || sizeof(Vector) == 16, "4 bytes and less need no wrapper");
  return *static_cast<const Vector*>(from);
}

template <class Vector>
__device__ __forceinline__ void store_vector(void* to, Vector value) {
  static_assert(sizeof(Vector) == 8 || sizeof(Vector) == 16, "4 bytes and less need no wrapper");
  // As one integer, because nvcc 13.0 stores some structs member by member.
  using Word = std::conditional_t<sizeof(Vector) == 8, unsigned long long, unsigned __int128>;
  Word word;
  memcpy(&word, &value, sizeof(word));
  *static_cast<Word*>(to) = word;
}

// Throws std::runtime_error with a sentence for the user, unless error is cudaSuccess.
void check_cuda(cudaError_t error, const char* kernel, size_t shared_bytes);

// Lets launches of the kernel on the current device ask for that much dynamic shared memory. Other threads may launch
// it with less at the same time, so the limit is only ever raised.
void allow_shared_memory(const char* name, const void* kernel, size_t bytes);

// A stream of the current device that nobody else has, as none of torch's are; a cudaStream_t.
void* create_stream();

// Multiprocessors of the current device.
int multiprocessor_count();
size_t shared_memory_limit();  // that a block may ask for

// Whether blocks of the kernel may form clusters on the current device, and launches begin early: its code there must
// be made for 9.0 or newer, as PTX for 8.0 compiled for a newer device is not. Looked up once per kernel and device.
bool can_form_clusters(const void* kernel);

template <class... Parameters>
bool can_form_clusters(void (*kernel)(Parameters...)) {
  return can_form_clusters(reinterpret_cast<const void*>(kernel));
}

// Blocks, and how many of them, next to each other, form a cluster; without clusters a dim3 will do.
struct Grid {
  dim3 blocks, cluster;
  Grid(dim3 blocks_, dim3 cluster_ = dim3(1)) : blocks(blocks_), cluster(cluster_) {}
};

// Starts the kernel on the stream (a cudaStream_t), every failure turned into a sentence. From 9.0 on it may begin
// before the launch before it has ended, so every kernel waits for that itself (ptx::follow_launch_before).
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  constexpr size_t kSharedWithoutAsking = 40 * 1024;  // of 48 KiB, which static shared memory counts towards
  if (shared_bytes > kSharedWithoutAsking) {
    allow_shared_memory(name, reinterpret_cast<const void*>(kernel), shared_bytes);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (grid.cluster.x * grid.cluster.y * grid.cluster.z > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {grid.cluster.x, grid.cluster.y, grid.cluster.z};
  }
  if (can_form_clusters(kernel)) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name, shared_bytes);
}

}  // namespace lpd
#endif

namespace lpd {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace
}  // namespace lpd
