// One warp's share of group_attention in fp32: 16 rows times some keys of every tile, by FMA.
#pragma once

#include "group_attention/key_ring.cuh"
#include "group_attention/partials.cuh"

namespace lpd {
namespace {

// Lane 8i + j has rows i, i + 4, i + 8, i + 12; of the scores the j-th run of kLaneKeys keys, of the sums the j-th four
// columns of every 32. Eight lanes that read one row of Q, or of weights, get it in one access.
template <class T, int kHeadDim, int kKeyWarps>
class FmaWarp {
 public:
  using Shape = TileShape<T, kHeadDim>;
  static constexpr bool kQueriesInRegisters = false;
  static constexpr int kKeys = Shape::kKeys / kKeyWarps;
  static constexpr int kLaneKeys = kKeys / 8;
  static constexpr int kLaneRows = kSlabRows / 4;
  static constexpr int kScratchBytes = kWarps * kSlabRows * kKeys * 4;

  __device__ __forceinline__ FmaWarp(const BlockWork& work, int key_end, int slab_in_tile, int key_warp, float scale,
                                     const T* ring, void* scratch)
      : work_(work),
        ring_(ring),
        key_end_(key_end),
        slab_row_(slab_in_tile * kSlabRows),
        key_row_(key_warp * kKeys),
        scale_(scale),
        weights_(static_cast<float*>(scratch) + threadIdx.x / 32 * kSlabRows * kKeys) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) sums_[r][c] = 0.0f;
    }
  }

  __device__ __forceinline__ void take_queries() {}

  __device__ __forceinline__ void score(int slot, int first_key) {
    float scores[kLaneRows][kLaneKeys] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
      float4 q[kLaneRows];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        q[r] = load_vector<float4>(ring_ + Shape::kQueryOffset + Shape::at(slab_row_ + row(r), chunk));
      }
#pragma unroll
      for (int k = 0; k < kLaneKeys; ++k) {
        const float4 key = load_vector<float4>(ring_ + slot + Shape::at(key_row_ + lane_ % 8 * kLaneKeys + k, chunk));
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
          scores[r][k] += q[r].x * key.x;
          scores[r][k] += q[r].y * key.y;
          scores[r][k] += q[r].z * key.z;
          scores[r][k] += q[r].w * key.w;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kLaneKeys; ++k) {
      const int key = first_key + key_row_ + lane_ % 8 * kLaneKeys + k;
      const bool seen = key < key_end_ && work_.key_exists(key);
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) scores[r][k] = seen ? scores[r][k] * scale_ : kMinusInfinity;
    }
    float rescale[kLaneRows];
    softmax_.template update<kLaneKeys>([&](int r, int k) -> float& { return scores[r][k]; }, rescale);
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) sums_[r][c] *= rescale[r];
      float* to = weights_ + row(r) * kKeys + lane_ % 8 * kLaneKeys;
      if constexpr (kLaneKeys == 4) {
        store_vector(to, make_float4(scores[r][0], scores[r][1], scores[r][2], scores[r][3]));
      } else if constexpr (kLaneKeys == 2) {
        store_vector(to, make_float2(scores[r][0], scores[r][1]));
      } else {
        *to = scores[r][0];
      }
    }
  }

  // Barriers of the block stand between this and score(), which writes weights_, on both sides.
  __device__ __forceinline__ void add_values(int slot, int first_key) {
    const int keys = min(key_end_ - first_key - key_row_, kKeys);
#pragma unroll 1
    for (int key = 0; key < keys; key += 4) {  // keys between key_end_ and the multiple of 4 are zeros
      float weights[kLaneRows][4];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const float4 four = load_vector<float4>(weights_ + row(r) * kKeys + key);
        weights[r][0] = four.x, weights[r][1] = four.y, weights[r][2] = four.z, weights[r][3] = four.w;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int c = 0; c < kLaneColumns; c += 4) {
          const float4 value = load_vector<float4>(ring_ + slot + Shape::at(key_row_ + key + k, c * 2 + lane_ % 8));
#pragma unroll
          for (int r = 0; r < kLaneRows; ++r) {
            sums_[r][c] += weights[r][k] * value.x;
            sums_[r][c + 1] += weights[r][k] * value.y;
            sums_[r][c + 2] += weights[r][k] * value.z;
            sums_[r][c + 3] += weights[r][k] * value.w;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write(T* output, int64_t row_stride, int rows, T*) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const float factor = 1.0f / softmax_.row_sum(r);
      if (row(r) < rows) store_row(factor, r, [&](int column) { return output + row(r) * row_stride + column; });
    }
  }

  __device__ __forceinline__ void write_partial(Partial<kHeadDim> partial, int warp, int rows) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int warp_row = warp * kSlabRows + row(r);
      const float row_sum = softmax_.row_sum(r);
      if (row(r) >= rows) continue;
      if (lane_ % 8 == 0) store_vector(partial.row_statistics(warp_row), make_float2(softmax_.row_max[r], row_sum));
      store_row(1.0f, r, [&](int column) { return partial.at(warp_row, column); });
    }
  }

 private:
  static constexpr int kLaneColumns = kHeadDim / 8;

  __device__ __forceinline__ int row(int r) const { return lane_ / 8 + 4 * r; }

  template <class At>
  __device__ __forceinline__ void store_row(float factor, int r, const At& at) const {
#pragma unroll
    for (int c = 0; c < kLaneColumns; c += 4) {
      store_vector(at(c * 8 + lane_ % 8 * 4), make_float4(sums_[r][c] * factor, sums_[r][c + 1] * factor,
                                                          sums_[r][c + 2] * factor, sums_[r][c + 3] * factor));
    }
  }

  const BlockWork& work_;
  const T* const ring_;
  const int key_end_;  // this slab sees the keys before it
  const int lane_ = threadIdx.x % 32;
  const int slab_row_;
  const int key_row_;
  const float scale_;
  float* const weights_;  // [16, kKeys] in shared memory
  float sums_[kLaneRows][kLaneColumns];
  RowSoftmax<kLaneRows, 8> softmax_;
};

}  // namespace
}  // namespace lpd
