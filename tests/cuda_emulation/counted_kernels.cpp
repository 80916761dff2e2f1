// Small kernels whose traffic is known; runs them in blocks of 32 threads and prints what was counted, as JSON.
#include <cstdio>

#include "common/ptx.cuh"
#include "emulator_counters.h"

extern "C" const char* lpd_emulator_stop_counting();

namespace lpd {
namespace {

__device__ float sum(float2 v) { return v.x + v.y; }
__device__ float sum(float4 v) { return v.x + v.y + v.z + v.w; }

// in[stride * i + offset] of each lane; out holds 32.
template <int kStride, int kOffset>
__global__ void read_strided_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[kStride * threadIdx.x + kOffset];
}

template <class Vector>
__global__ void copy_vectors_kernel(const float* in, float* out) {
  constexpr unsigned kFloats = sizeof(Vector) / sizeof(float);
  store_vector(out + kFloats * threadIdx.x, load_vector<Vector>(in + kFloats * threadIdx.x));
}

// 80 of 2-byte elements with a stride of a warp: the last round is for half of the lanes.
__global__ void sum_halves_kernel(const float* in, float* out) {
  const uint16_t* const halves = reinterpret_cast<const uint16_t*>(in);
  unsigned sum = 0;
  for (unsigned i = threadIdx.x; i < 80; i += 32) sum += halves[i];
  out[threadIdx.x] = static_cast<float>(sum);
}

// All lanes of a group of 8 read one row of four floats.
__global__ void read_broadcast_kernel(const float* in, float* out) {
  out[threadIdx.x] = sum(load_vector<float4>(in + threadIdx.x / 8 * 4));
}

// Lanes of one request go to two arrays.
__global__ void read_either_kernel(const float* in, float* out) {
  const float* const from = threadIdx.x < 8 ? in : out;
  out[threadIdx.x] = from[threadIdx.x];
}

__global__ void add_atomically_kernel(const float* in, float* out) { atomicAdd(out, in[threadIdx.x]); }

// Before the meeting lanes 0 to 15 read once, after it all do, by the same instruction.
__global__ void read_around_meeting_kernel(const float* in, float* out) {
  float sum = 0.0f;
#pragma unroll 1
  for (unsigned round = 0; round < 2; ++round) {
    if (round == 1 || threadIdx.x < 16) sum += in[32 * round + threadIdx.x];
    __syncwarp();
  }
  out[threadIdx.x] = sum;
}

// values[stride * i] in shared memory; stride in words.
template <int kStride>
__global__ void read_shared_kernel(const float*, float* out) {
  SMEM_ARRAY(float, values, 32 * (kStride == 0 ? 1 : kStride));
  values[threadIdx.x] = 0.0f;
  __syncwarp();
  out[threadIdx.x] = values[kStride * threadIdx.x];
}

// Vectors in shared memory, each lane its own; stride in vectors.
template <class Vector, int kStride>
__global__ void store_shared_vectors_kernel(const float*, float* out) {
  SMEM_ARRAY(Vector, vectors, 32 * kStride);
  store_vector(vectors + kStride * threadIdx.x, Vector{});
  __syncwarp();
  out[threadIdx.x] = sum(load_vector<Vector>(vectors + kStride * threadIdx.x));
}

// Lanes 0 to 23 copy 16 bytes, the others write zeros.
__global__ void copy_asynchronously_kernel(const float* in, float* out) {
  SMEM_ARRAY(float4, vectors, 32);
  ptx::cp_async16(vectors + threadIdx.x, in + 4 * threadIdx.x, threadIdx.x < 24);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = sum(load_vector<float4>(vectors + threadIdx.x));
}

// Rows of 128 bytes, 16-byte chunk c of row r at chunk c, or, swizzled, at chunk c XOR r % 8.
template <bool kSwizzled>
__global__ void load_matrix_kernel(const float*, float* out) {
  SMEM_DYN(bytes);
  const unsigned row = threadIdx.x % 16, chunk = threadIdx.x / 16;
  store_vector(bytes + 16 * threadIdx.x, uint4{0, 0, 0, 0});
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, bytes + 128 * row + 16 * (kSwizzled ? chunk ^ (row % 8) : chunk));
  out[threadIdx.x] = __uint_as_float(r[0] ^ r[1] ^ r[2] ^ r[3]);
}

// Two blocks: each writes 16 bytes per lane into the other, and reads 4 of its own and 8 back from the other.
__global__ void exchange_in_cluster_kernel(const float*, float* out) {
  SMEM_ARRAY(float4, vectors, 32);
  float4* const theirs = ptx::in_block_of_cluster(vectors, 1 - blockIdx.x);
  ptx::cluster_sync();
  store_vector(theirs + threadIdx.x, float4{});
  ptx::cluster_sync();
  out[threadIdx.x] = vectors[threadIdx.x].x + sum(load_vector<float2>(theirs + threadIdx.x));
  ptx::cluster_sync();
}

}  // namespace
}  // namespace lpd

int main() {
  using namespace lpd;
  struct Case {
    const char* name;
    void (*kernel)(const float*, float*);
    unsigned blocks = 1;
    size_t shared_bytes = 0;
    unsigned cluster = 1;
  };
  const Case cases[] = {
      {"contiguous", read_strided_kernel<1, 0>},
      {"shifted", read_strided_kernel<1, 1>},
      {"strided", read_strided_kernel<8, 0>},
      {"two_blocks", read_strided_kernel<1, 0>, 2},
      {"vectors_of_8", copy_vectors_kernel<float2>},
      {"vectors_of_16", copy_vectors_kernel<float4>},
      {"halves", sum_halves_kernel},
      {"broadcast", read_broadcast_kernel},
      {"two_arrays", read_either_kernel},
      {"atomic", add_atomically_kernel},
      {"around_meeting", read_around_meeting_kernel},
      {"shared_stride_1", read_shared_kernel<1>},
      {"shared_stride_2", read_shared_kernel<2>},
      {"shared_stride_32", read_shared_kernel<32>},
      {"shared_stride_33", read_shared_kernel<33>},
      {"shared_broadcast", read_shared_kernel<0>},
      {"shared_vectors_of_8", store_shared_vectors_kernel<float2, 1>},
      {"shared_vectors_of_16", store_shared_vectors_kernel<float4, 1>},
      {"shared_vectors_apart", store_shared_vectors_kernel<float4, 8>},
      {"cp_async", copy_asynchronously_kernel},
      {"ldmatrix", load_matrix_kernel<false>, 1, 2048},
      {"ldmatrix_swizzled", load_matrix_kernel<true>, 1, 2048},
      {"cluster", exchange_in_cluster_kernel, 2, 0, 2},
  };
  alignas(128) static float in[512], out[512];
  emulator::start_counting({{"in", in, sizeof(in)}, {"out", out, sizeof(out)}});
  emulator::settings().compute_capability = 90;
  for (const Case& c : cases) {
    launch(c.name, c.kernel, Grid(dim3(c.blocks), dim3(c.cluster)), dim3(32), c.shared_bytes, nullptr, in, out);
  }
  std::puts(lpd_emulator_stop_counting());
}
