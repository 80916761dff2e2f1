// Results of warps that saw only part of a row's keys, and their combination. They lie in shared memory where the keys
// were split over the warps of one block, in the workspace where over other blocks. Blocks of a cluster push theirs.
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

// What some of a row's keys make of it: four columns of its sums, relative to the maximum of these keys' scores.
struct RowPart {
  float row_max, row_sum;
  float4 sums;
};

// Merges part_at(0), part_at(1), ..., in this order.
template <class PartAt>
__device__ __forceinline__ RowPart merge_parts(int count, const PartAt& part_at) {
  RowPart merged{kMinusInfinity, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll 4  // as many are under way at a time
  for (int i = 0; i < count; ++i) {
    const RowPart part = part_at(i);
    const float new_max = fmaxf(merged.row_max, part.row_max), reference = softmax_reference(new_max);
    const float rescale = ptx::exp2_approx(merged.row_max - reference);
    const float weight = ptx::exp2_approx(part.row_max - reference);
    merged.row_max = new_max;
    merged.row_sum = merged.row_sum * rescale + weight * part.row_sum;
    merged.sums.x = merged.sums.x * rescale + weight * part.sums.x;
    merged.sums.y = merged.sums.y * rescale + weight * part.sums.y;
    merged.sums.z = merged.sums.z * rescale + weight * part.sums.z;
    merged.sums.w = merged.sums.w * rescale + weight * part.sums.w;
  }
  return merged;
}

constexpr int kPartColumns = 4;  // per thread: one access to shared memory, without a bank conflict

// Part i of a row of the slabs, whose keys the warps of each block share.
template <int kHeadDim, class PartialOf>
__device__ __forceinline__ RowPart warps_part(const BlockWork& work, const PartialOf& partial_of, int i, int row,
                                              int column) {
  const int key_warps = work.key_warps();
  const Partial<kHeadDim> partial = partial_of(i / key_warps);
  const int warp_row = i % key_warps * (kTileRows / key_warps) + row;
  const float2 statistics = load_vector<float2>(partial.row_statistics(warp_row));
  return {statistics.x, statistics.y, load_vector<float4>(partial.at(warp_row, column))};
}

// Four columns of a row of the slabs, from all its keys.
template <class T, int kHeadDim>
__device__ __forceinline__ void write_row(const GroupAttentionParams& p, const BlockWork& work, int row, int column,
                                          const RowPart& part) {
  const Slab slab = work.slab(row / kSlabRows);
  const float factor = 1.0f / part.row_sum;
  const float4 sums = part.sums;
  T* output = static_cast<T*>(p.output) +
              (int64_t{slab.first} + row % kSlabRows - p.first_output_row) * p.num_heads * kHeadDim +
              work.head * kHeadDim;
  if constexpr (sizeof(T) == 2) {
    store_vector(output + column, make_uint2(ptx::pack<T>(sums.x * factor, sums.y * factor),
                                             ptx::pack<T>(sums.z * factor, sums.w * factor)));
  } else {
    store_vector(output + column, make_float4(sums.x * factor, sums.y * factor, sums.z * factor, sums.w * factor));
  }
}

// Writes the tile's rows from the partials of num_blocks blocks. Always in the same order, so that the result does not
// depend on which block came last.
template <class T, int kHeadDim, class PartialOf>
__device__ __forceinline__ void combine(const GroupAttentionParams& p, const BlockWork& work, int num_blocks,
                                        const PartialOf& partial_of) {
  constexpr int kChunks = kHeadDim / kPartColumns;
#pragma unroll 1
  for (int i = threadIdx.x; i < work.rows() * kChunks; i += kThreads) {
    const int row = work.row_in_slabs(i / kChunks), column = i % kChunks * kPartColumns;
    write_row<T, kHeadDim>(p, work, row, column, merge_parts(num_blocks * work.key_warps(), [&](int part) {
                             return warps_part<kHeadDim>(work, partial_of, part, row, column);
                           }));
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
