// Results of warps that saw only part of a row's keys, and their combination. They lie in shared memory where the keys
// were split over the warps of one block or over the blocks of a cluster, in the workspace where over other blocks.
#pragma once

#include "group_attention/block_work.cuh"
#include "group_attention/row_softmax.cuh"

namespace lpd {
namespace {

// Partial results of one block: a slab of [16, D] sums per warp, then a pair of row_max and row_sum per row.
template <int kHeadDim>
struct Partial {
  static constexpr int kSums = kTileRows * kHeadDim;
  static constexpr int kElements = kSums + 2 * kTileRows;
  float* sums;

  // Four columns stay together; the xor spreads what a tensor-core warp stores at once, 8 columns of each of 4 rows,
  // over all banks.
  __device__ __forceinline__ float* at(int warp_row, int column) const {
    return sums + warp_row * kHeadDim + (column ^ (warp_row & 3) * 8);
  }
  __device__ __forceinline__ float* row_statistics(int warp_row) const { return sums + kSums + 2 * warp_row; }
};

__device__ __forceinline__ int64_t tile_index(const KeySplits& splits, const BlockWork& work) {
  return int64_t{blockIdx.x} * splits.row_tiles + work.row_tile;
}

template <int kHeadDim>
__device__ __forceinline__ Partial<kHeadDim> split_partial(const KeySplits& splits, const BlockWork& work, int split) {
  return {splits.partials + (tile_index(splits, work) * splits.count + split) * Partial<kHeadDim>::kElements};
}

// Writes the tile's rows, or one of `shares` equal parts of them, from the partials of num_blocks blocks. Always in the
// same order, so that the result does not depend on which block came last.
template <class T, int kHeadDim, class PartialOf>
__device__ __forceinline__ void combine(const GroupAttentionParams& p, const BlockWork& work, int num_blocks,
                                        const PartialOf& partial_of, int share = 0, int shares = 1) {
  constexpr int kColumns = 4;  // per thread: one access to shared memory, without a bank conflict
  constexpr int kChunks = kHeadDim / kColumns;
  const int key_warps = work.key_warps(), warp_rows = kTileRows / key_warps;
#pragma unroll 1
  for (int i = share * kThreads + threadIdx.x; i < work.num_slabs * kSlabRows * kChunks; i += shares * kThreads) {
    const int row = i / kChunks, column = i % kChunks * kColumns, in_slab = row % kSlabRows;
    const Slab slab = work.slab(row / kSlabRows);
    if (in_slab >= slab.count) continue;
    float row_max = kMinusInfinity, row_sum = 0.0f;
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4  // partials come from far: as many are under way at a time
    for (int part = 0; part < num_blocks * key_warps; ++part) {
      const Partial<kHeadDim> partial = partial_of(part / key_warps);
      const int warp_row = part % key_warps * warp_rows + row;
      const float2 statistics = load_vector<float2>(partial.row_statistics(warp_row));
      const float new_max = fmaxf(row_max, statistics.x), reference = softmax_reference(new_max);
      const float rescale = ptx::exp2_approx(row_max - reference), weight = ptx::exp2_approx(statistics.x - reference);
      row_max = new_max;
      row_sum = row_sum * rescale + weight * statistics.y;
      const float4 part_sums = load_vector<float4>(partial.at(warp_row, column));
      sums.x = sums.x * rescale + weight * part_sums.x;
      sums.y = sums.y * rescale + weight * part_sums.y;
      sums.z = sums.z * rescale + weight * part_sums.z;
      sums.w = sums.w * rescale + weight * part_sums.w;
    }
    const float factor = 1.0f / row_sum;
    T* output = static_cast<T*>(p.output) +
                (int64_t{slab.first} + in_slab - p.first_output_row) * p.num_heads * kHeadDim + work.head * kHeadDim;
    if constexpr (sizeof(T) == 2) {
      store_vector(output + column, make_uint2(ptx::pack<T>(sums.x * factor, sums.y * factor),
                                               ptx::pack<T>(sums.z * factor, sums.w * factor)));
    } else {
      store_vector(output + column, make_float4(sums.x * factor, sums.y * factor, sums.z * factor, sums.w * factor));
    }
  }
}

// True in the block that arrives last of `blocks`, for all its threads; what the others wrote before is visible then.
// Leaves the counter at 0.
__device__ __forceinline__ bool arrive_last(unsigned* counter, int blocks) {
  __threadfence();
  __syncthreads();
  int last = 0;
  if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == static_cast<unsigned>(blocks - 1);
  if (!__syncthreads_or(last)) return false;
  __threadfence();
  return true;
}

}  // namespace
}  // namespace lpd
