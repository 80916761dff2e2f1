// How blocks of a cluster that share the keys of a tile combine what they made of its rows: each finishes some of the
// rows, and all push their part of these to it, by stores that its mbarrier counts. One barrier of the cluster, arrived
// at relaxed, shows before that all blocks run; none comes at the end, and nothing is read from another block.
#pragma once

#include "group_attention/partials.cuh"

namespace lpd {
namespace {

// Parts of a row lie one after the other, by the block that made them: D sums, then maximum and sum, and two unused.
template <int kHeadDim>
constexpr int kPartElements = kHeadDim + 4;

// Bytes of shared memory to receive parts in.
template <int kHeadDim>
constexpr int received_bytes(int blocks) {
  return (kTileRows + blocks - 1) / blocks * blocks * kPartElements<kHeadDim> * 4;
}

template <class T, int kHeadDim>
class ClusterExchange {
 public:
  // `barrier`, of 8 bytes, and `received` lie in shared memory, where nothing else does.
  __device__ __forceinline__ ClusterExchange(const BlockWork& work, uint64_t* barrier, float* received)
      : work_(work), barrier_(barrier), received_(received) {}

  // As soon as the block runs.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barrier_, 1);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
  }

  // Once all warps have written their partials to `own`.
  __device__ __forceinline__ void push(const Partial<kHeadDim>& own) const {
    const int rows = work_.rows();
    if (threadIdx.x == 0) {
      const int finished = first_row(work_.split + 1) - first_row(work_.split);
      ptx::mbarrier_arrive(barrier_, static_cast<unsigned>(finished * work_.num_splits * kPartElements<kHeadDim> * 4));
    }
    ptx::cluster_wait();  // all blocks run, and their mbarriers are made
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks, column = i % kChunks * kPartColumns;
      const RowPart part = merge_parts(work_.key_warps(), [&](int warp) {
        return warps_part<kHeadDim>(work_, [&](int) { return own; }, warp, work_.row_in_slabs(row), column);
      });
      const int rank = ((row + 1) * work_.num_splits - 1) / rows;
      float* const to = received(row - first_row(rank), work_.split);
      store(to + column, rank, part.sums);
      if (column == 0) store(to + kHeadDim, rank, make_float4(part.row_max, part.row_sum, 0.0f, 0.0f));
    }
  }

  __device__ __forceinline__ void finish(const GroupAttentionParams& p) const {
    const int first = first_row(work_.split), end = first_row(work_.split + 1);
    ptx::mbarrier_wait(barrier_, 0);
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - first) * kChunks; i += kThreads) {
      const int row = i / kChunks, column = i % kChunks * kPartColumns;
      const RowPart part = merge_parts(work_.num_splits, [&](int rank) -> RowPart {
        const float* const from = received(row, rank);
        const float2 statistics = load_vector<float2>(from + kHeadDim);
        return {statistics.x, statistics.y, load_vector<float4>(from + column)};
      });
      write_row<T, kHeadDim>(p, work_, work_.row_in_slabs(first + row), column, part);
    }
  }

 private:
  static constexpr int kChunks = kHeadDim / kPartColumns;

  // Rows of the tile go to the blocks in order.
  __device__ __forceinline__ int first_row(int rank) const { return work_.rows() * rank / work_.num_splits; }

  __device__ __forceinline__ float* received(int row, int rank) const {
    return received_ + (row * work_.num_splits + rank) * kPartElements<kHeadDim>;
  }

  __device__ __forceinline__ void store(float* to, int rank, float4 value) const {
    ptx::store_in_block_of_cluster(reinterpret_cast<float4*>(to), static_cast<unsigned>(rank), value, barrier_);
  }

  const BlockWork& work_;
  uint64_t* const barrier_;
  float* const received_;
};

}  // namespace
}  // namespace lpd
