// LayerNorm of a row that one block holds in registers, eight elements per thread. Two reductions over the block give
// the statistics (mean, then centred squares); memory is passed over once.
#pragma once

#include <stdexcept>
#include <string>

#include "common/ptx.cuh"

namespace lpd {
namespace {

constexpr int kPerThread = 8;        // elements of a row; of a 16-bit row they are one 128-bit access
constexpr int kMaxRowThreads = 768;  // leaves 80 registers to each, which ScalarSlice needs
constexpr int kMaxRowWidth = kPerThread * kMaxRowThreads;

// VectorSlice and ScalarSlice say which elements of a row a thread holds. load() only asks memory for them, so that
// several rows can be under way at once; values() converts them, 0 outside the row; store() is the inverse of both.
// All lanes of a warp must take part, also those outside the row.

// 128-bit accesses: aligned rows, width divisible by 16. Lanes 2i and 2i + 1 share 16 elements, as four quads: the even
// lane holds quads 0 and 2, the odd one 1 and 3, so that each access to an fp32 row uses whole 32-byte sectors. An
// access to a 16-bit row moves two neighbouring quads, of which the two lanes swap one.
struct VectorSlice {
  template <class T>
  struct Loaded {
    uint4 vectors[sizeof(T) / 2];
  };

  int width;

  // Is the thread's k-th element inside the row? Here all are or none.
  __device__ bool holds(int /*k*/) const { return kPerThread * int(threadIdx.x) < width; }

  template <class T>
  __device__ Loaded<T> load(const T* row) const {
    Loaded<T> loaded = {};
    if (!holds(0)) return loaded;
    if constexpr (sizeof(T) == 4) {
      loaded.vectors[0] = load_vector<uint4>(row + first_quad());
      loaded.vectors[1] = load_vector<uint4>(row + first_quad() + 8);
    } else {
      loaded.vectors[0] = load_vector<uint4>(row + kPerThread * int(threadIdx.x));
    }
    return loaded;
  }

  template <class T>
  __device__ void values(const Loaded<T>& loaded, float (&result)[kPerThread]) const {
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < 2; ++i) {
        const uint4 quad = loaded.vectors[i];
        result[4 * i] = __uint_as_float(quad.x);
        result[4 * i + 1] = __uint_as_float(quad.y);
        result[4 * i + 2] = __uint_as_float(quad.z);
        result[4 * i + 3] = __uint_as_float(quad.w);
      }
    } else {
      const uint4 swapped = swap_quads(loaded.vectors[0]);
      const uint32_t pairs[4] = {swapped.x, swapped.y, swapped.z, swapped.w};
      for (int i = 0; i < 4; ++i) {
        const float2 pair = ptx::unpack<T>(pairs[i]);
        result[2 * i] = pair.x;
        result[2 * i + 1] = pair.y;
      }
    }
  }

  template <class T>
  __device__ void store(T* row, const float (&values)[kPerThread]) const {
    if constexpr (sizeof(T) == 4) {
      if (!holds(0)) return;
      store_vector(row + first_quad(), float4{values[0], values[1], values[2], values[3]});
      store_vector(row + first_quad() + 8, float4{values[4], values[5], values[6], values[7]});
    } else {
      const uint4 packed = swap_quads({ptx::pack<T>(values[0], values[1]), ptx::pack<T>(values[2], values[3]),
                                       ptx::pack<T>(values[4], values[5]), ptx::pack<T>(values[6], values[7])});
      if (holds(0)) store_vector(row + kPerThread * int(threadIdx.x), packed);
    }
  }

 private:
  // Element at which this lane's first quad begins; the second begins 8 elements later.
  __device__ static int first_quad() { return kPerThread * int(threadIdx.x & ~1u) + 4 * int(threadIdx.x & 1u); }

  // From quads (0, 1) in the even and (2, 3) in the odd lane to (0, 2) and (1, 3), and back.
  __device__ static uint4 swap_quads(uint4 mine) {
    const bool odd = threadIdx.x % 2 != 0;
    const uint32_t low = __shfl_xor_sync(kAllLanes, odd ? mine.x : mine.z, 1);
    const uint32_t high = __shfl_xor_sync(kAllLanes, odd ? mine.y : mine.w, 1);
    return odd ? uint4{low, high, mine.z, mine.w} : uint4{mine.x, mine.y, low, high};
  }
};

// Any width and alignment, element by element: k-th of this thread is element k * blockDim.x + threadIdx.x.
struct ScalarSlice {
  template <class T>
  struct Loaded {
    T elements[kPerThread];
  };

  int width;

  __device__ bool holds(int k) const { return element(k) < width; }

  template <class T>
  __device__ Loaded<T> load(const T* row) const {
    Loaded<T> loaded = {};
    for (int k = 0; k < kPerThread; ++k) {
      if (holds(k)) loaded.elements[k] = row[element(k)];
    }
    return loaded;
  }

  template <class T>
  __device__ void values(const Loaded<T>& loaded, float (&result)[kPerThread]) const {
    for (int k = 0; k < kPerThread; ++k) result[k] = ptx::to_float(loaded.elements[k]);
  }

  template <class T>
  __device__ void store(T* row, const float (&values)[kPerThread]) const {
    for (int k = 0; k < kPerThread; ++k) {
      if (holds(k)) row[element(k)] = ptx::from_float<T>(values[k]);
    }
  }

 private:
  __device__ static int element(int k) { return k * int(blockDim.x) + int(threadIdx.x); }
};

// Sums over the warp, with the same bits in every lane.
template <int kCount>
__device__ void warp_sum(float (&sums)[kCount]) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    for (float& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
}

// Sums over the block, with the same bits in every thread. No other call may use `partial`.
template <int kCount>
__device__ void block_sum(float (&sums)[kCount], float* partial /* shared [kCount * kWarpSize] */) {
  warp_sum(sums);
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (warps == 1) return;
  if (lane == 0) {
    for (int i = 0; i < kCount; ++i) partial[i * kWarpSize + warp] = sums[i];
  }
  __syncthreads();
  for (int i = 0; i < kCount; ++i) sums[i] = lane < warps ? partial[i * kWarpSize + lane] : 0.0f;
  warp_sum(sums);
}

constexpr int kLayerNormShared = 3 * kWarpSize;  // floats

// values = LayerNorm(values); they must be 0 outside the row.
template <class Slice, class T>
__device__ void layer_norm_row(const Slice& slice, float (&values)[kPerThread],
                               const typename Slice::template Loaded<T>& weight,
                               const typename Slice::template Loaded<T>& bias, float eps,
                               float* shared /* [kLayerNormShared] */) {
  const float width = static_cast<float>(slice.width), inverse_width = 1.0f / width;
  float total[1] = {0.0f};
  for (float value : values) total[0] += value;
  block_sum(total, shared);
  const float mean = total[0] / width;

  float sums[2] = {0.0f, 0.0f};  // of centred squares and of centred values
  for (int k = 0; k < kPerThread; ++k) {
    values[k] = slice.holds(k) ? values[k] - mean : 0.0f;
    sums[0] += values[k] * values[k];
    sums[1] += values[k];
  }
  block_sum(sums, shared + kWarpSize);
  // Rounding left `rest_mean` in the mean; where rows lie far from 0 it would dominate the error.
  const float rest_mean = sums[1] * inverse_width;
  // Where squares overflow the row becomes NaN, as torch's does: 0 * inf and inf - inf have to stay. Below 0 is
  // rounding.
  const float variance = sums[0] * inverse_width - rest_mean * rest_mean;
  const float inverse_deviation = rsqrtf((variance < 0.0f ? 0.0f : variance) + eps) + 0.0f * variance;
  const float shift = -rest_mean * inverse_deviation;

  float weights[kPerThread], biases[kPerThread];
  slice.values(weight, weights);
  slice.values(bias, biases);
  for (int k = 0; k < kPerThread; ++k) {
    values[k] = __fmaf_rn(__fmaf_rn(values[k], inverse_deviation, shift), weights[k], biases[k]);
  }
}

// Can rows that start here, `stride` bytes apart, be moved 16 bytes at a time?
inline bool rows_are_aligned(const void* rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 16 == 0;
}

// Calls run(slice, threads per row) with the slice that fits.
template <class Run>
void dispatch_row_slice(const char* name, int width, bool aligned, Run run) {
  if (width > kMaxRowWidth) {
    throw std::runtime_error(std::string(name) + ": a row must have at most " + std::to_string(kMaxRowWidth) +
                             " elements on CUDA, got " + std::to_string(width));
  }
  constexpr int kPerWarp = kPerThread * kWarpSize;
  const int threads = (width + kPerWarp - 1) / kPerWarp * kWarpSize;
  if (aligned && width % (2 * kPerThread) == 0) {
    run(VectorSlice{width}, threads);
  } else {
    run(ScalarSlice{width}, threads);
  }
}

}  // namespace
}  // namespace lpd
