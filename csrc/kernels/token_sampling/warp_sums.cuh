// Sums over a warp and a block in one fixed order: all lanes get the same bits, from run to run.
#pragma once

#include "common/cuda.cuh"

namespace lpd {
namespace {

constexpr int kMaxWarps = 16;  // of a block

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// kCount sums over the warp at once (a power of two); lane i returns sum i % kCount. Each of the first steps halves
// what a lane is responsible for: 9 shuffles for 8 sums instead of 40.
template <int kCount>
__device__ __forceinline__ float warp_sums(float (&x)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= kCount) {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
      continue;
    }
    const bool odd = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kCount / (2 * distance); ++i) {
      const float mine = odd ? x[2 * i + 1] : x[2 * i], theirs = odd ? x[2 * i] : x[2 * i + 1];
      x[i] = mine + __shfl_xor_sync(kAllLanes, theirs, distance);
    }
  }
  return x[0];
}

// Eight sums over the block; lane i of every warp returns sum i % 8. One barrier; consecutive calls need different
// `partial_sums` [warps, 8].
__device__ __forceinline__ float block_sums(float (&x)[8], float* partial_sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const float mine = warp_sums(x);
  if (lane < 8) partial_sums[warp * 8 + lane] = mine;
  __syncthreads();
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < static_cast<int>(blockDim.x) / 4; i += 32)
    sum += partial_sums[i];
  sum += __shfl_xor_sync(kAllLanes, sum, 8);
  sum += __shfl_xor_sync(kAllLanes, sum, 16);
  return sum;
}

}  // namespace
}  // namespace lpd
