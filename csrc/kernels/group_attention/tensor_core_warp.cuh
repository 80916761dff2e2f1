// One warp's share of group_attention in 16 bits: 16 rows times some keys of every tile, on tensor cores.
#pragma once

#include "group_attention/key_ring.cuh"
#include "group_attention/partials.cuh"

namespace lpd {
namespace {

// Lane 4i + j has columns 2j and 2j + 1 of every 8, of rows i and i + 8: the accumulators of mma.m16n8k16. kKeyWarps
// warps share the keys of a tile.
template <class T, int kHeadDim, int kKeyWarps>
class TensorCoreWarp {
 public:
  using Shape = TileShape<T, kHeadDim>;
  static constexpr bool kQueriesInRegisters = true;
  static constexpr int kScratchBytes = 0;

  __device__ __forceinline__ TensorCoreWarp(const BlockWork& work, int key_end, int slab_in_tile, int key_warp,
                                            float scale, const T* ring, void*)
      : work_(work),
        ring_(ring),
        key_end_(key_end),
        slab_row_(slab_in_tile * kSlabRows),
        key_row_(key_warp * kKeys),
        scale_(scale) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[n][e] = 0.0f;
    }
  }

  __device__ __forceinline__ void take_queries() {
    const int row = slab_row_ + lane_ % 16;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d)
      ptx::ldmatrix_x4(queries_[d], chunk_pair(Shape::kQueryOffset + Shape::at(row, lane_ / 16), d));
  }

  // Weights of the keys of a tile that begins at first_key.
  __device__ __forceinline__ void score(int slot, int first_key) {
    if (all_seen(first_key)) {
      score_all(slot);
    } else {
      score_seen(slot, first_key);
    }
    float rescale[2];
    softmax_.template update<kKeys / 4>(
        [&](int r, int column) -> float& { return weights_[column / 2][2 * r + column % 2]; }, rescale);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[n][e] *= rescale[e / 2];
    }
  }

  __device__ __forceinline__ void add_values(int slot, int first_key) {
#pragma unroll
    for (int g = 0; g < kKeys / kKeyGroup; ++g) {
      if (first_key + key_row_ + g * kKeyGroup >= key_end_) continue;
      const float (&low)[4] = weights_[2 * g];
      const float (&high)[4] = weights_[2 * g + 1];
      const uint32_t weights[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]),
                                   ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
      const int first = slot + Shape::at(key_row_ + lane_ % 16, lane_ / 16);
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t values[4];
        ptx::ldmatrix_x4_transposed(values, chunk_pair(first, n) + g * kKeyGroup * kHeadDim);
        ptx::mma_m16n8k16<T>(sums_[2 * n], weights, values[0], values[1]);
        ptx::mma_m16n8k16<T>(sums_[2 * n + 1], weights, values[2], values[3]);
      }
    }
  }

  // Rows go through `staging` [64, D], of which this warp uses its own rows, so that 16 bytes at a time are written.
  __device__ __forceinline__ void write(T* output, int64_t row_stride, int rows, T* staging) const {
    const float factors[2] = {1.0f / softmax_.row_sum(0), 1.0f / softmax_.row_sum(1)};
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<uint32_t*>(staging + Shape::at(slab_row_ + lane_ / 4 + 8 * r, n) + lane_ % 4 * 2) =
            ptx::pack<T>(sums_[n][2 * r] * factors[r], sums_[n][2 * r + 1] * factors[r]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane_; i < kSlabRows * Shape::kChunks; i += 32) {
      const int row = i / Shape::kChunks, chunk = i % Shape::kChunks;
      if (row < rows) {
        store_vector(output + row * row_stride + chunk * Shape::kChunk,
                     load_vector<uint4>(staging + Shape::at(slab_row_ + row, chunk)));
      }
    }
  }

  __device__ __forceinline__ void write_partial(Partial<kHeadDim> partial, int warp, int rows) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int warp_row = warp * kSlabRows + lane_ / 4 + 8 * r;
      const float row_sum = softmax_.row_sum(r);
      if (lane_ / 4 + 8 * r >= rows) continue;
      if (lane_ % 4 == 0) store_vector(partial.row_statistics(warp_row), make_float2(softmax_.row_max[r], row_sum));
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        store_vector(partial.at(warp_row, 8 * n + lane_ % 4 * 2), make_float2(sums_[n][2 * r], sums_[n][2 * r + 1]));
      }
    }
  }

 private:
  static constexpr int kKeys = Shape::kKeys / kKeyWarps;

  // As in most tiles: then the products of all groups are independent and need no branch.
  __device__ __forceinline__ bool all_seen(int first_key) const {
    return first_key + key_row_ + kKeys <= work_.shared_keys;
  }

  // The i-th pair of chunks after the one at `element`, which is of a row's first pair. Swizzled, it lies one xor away;
  // this costs no register per i, where Shape::at would.
  __device__ __forceinline__ const T* chunk_pair(int element, int i) const {
    return ring_ + (element ^ (2 * i * Shape::kChunk));
  }

  // Elements [16d, 16d + 16) of the keys of group g, as the matrix unit wants them: 8 keys in two registers.
  __device__ __forceinline__ void load_keys(uint32_t (&keys)[4], int slot, int g, int d) const {
    const int row = key_row_ + lane_ / 16 * 8 + lane_ % 8;
    ptx::ldmatrix_x4(keys, chunk_pair(slot + Shape::at(row, lane_ / 8 % 2), d) + g * kKeyGroup * kHeadDim);
  }

  __device__ __forceinline__ void score_all(int slot) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) weights_[n][e] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
      for (int g = 0; g < kKeys / kKeyGroup; ++g) {
        uint32_t keys[4];
        load_keys(keys, slot, g, d);
        ptx::mma_m16n8k16<T>(weights_[2 * g], queries_[d], keys[0], keys[1]);
        ptx::mma_m16n8k16<T>(weights_[2 * g + 1], queries_[d], keys[2], keys[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) weights_[n][e] *= scale_;
    }
  }

  // Leaves out groups that no row sees; elsewhere keys that do not exist get no weight.
  __device__ __forceinline__ void score_seen(int slot, int first_key) {
#pragma unroll
    for (int g = 0; g < kKeys / kKeyGroup; ++g) {
      float (&low)[4] = weights_[2 * g];
      float (&high)[4] = weights_[2 * g + 1];
      const int group_key = first_key + key_row_ + g * kKeyGroup;
      const bool seen = group_key < key_end_;
#pragma unroll
      for (int e = 0; e < 4; ++e) low[e] = high[e] = seen ? 0.0f : kMinusInfinity;
      if (!seen) continue;
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t keys[4];
        load_keys(keys, slot, g, d);
        ptx::mma_m16n8k16<T>(low, queries_[d], keys[0], keys[1]);
        ptx::mma_m16n8k16<T>(high, queries_[d], keys[2], keys[3]);
      }
      const int existing = work_.keys_in_group(group_key);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = lane_ % 4 * 2 + e % 2;
        low[e] = column < existing ? low[e] * scale_ : kMinusInfinity;
        high[e] = column + 8 < existing ? high[e] * scale_ : kMinusInfinity;
      }
    }
  }

  const BlockWork& work_;
  const T* const ring_;
  const int key_end_;  // this slab sees the keys before it
  const int lane_ = threadIdx.x % 32;
  const int slab_row_;  // this warp's first row in the tile of rows
  const int key_row_;   // and first key in every tile of keys
  const float scale_;   // to powers of two
  uint32_t queries_[kHeadDim / 16][4];
  float sums_[kHeadDim / 8][4];
  float weights_[kKeys / 8][4];
  RowSoftmax<2, 4> softmax_;
};

}  // namespace
}  // namespace lpd
