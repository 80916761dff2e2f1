// rows W^T on tensor cores, in a block that shares K with the other blocks of its cluster. Weights, of which every byte
// is read once, come by asynchronous copies, and are operand A; 8 rows are operand B. Every warp adds up 32 features of
// all rows over one slab of K. The sums of a block's slabs are added through shared memory, and pushed to the block of
// the cluster that makes results of these rows and features. Limited by latency: one load, three barriers and the push.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/ptx.cuh"
#include "few_row_product/few_row_product.h"

namespace lpd {
namespace {

__device__ __forceinline__ float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// at(first) + at(first + 1) + ... as a balanced binary tree.
template <int kCount, class At>
__device__ __forceinline__ float4 tree_sum(const At& at, int first = 0) {
  if constexpr (kCount == 1) {
    return at(first);
  } else {
    return add(tree_sum<kCount / 2>(at, first), tree_sum<kCount / 2>(at, first + kCount / 2));
  }
}

template <class At>
__device__ __forceinline__ float4 tree_sum_of(int count, const At& at) {
  switch (count) {
    case 1: return tree_sum<1>(at);
    case 2: return tree_sum<2>(at);
    case 4: return tree_sum<4>(at);
    default: return tree_sum<8>(at);
  }
}

// Where four sums of a lane belong: features [feature, feature + 4) of one row. Lanes of equal lane % 4 have the same
// row, and lane / 4 counts its fours.
struct ProductPlace {
  int row, feature;
  bool exists;
};

// T: of 16 bits. kRows: of a tile, a multiple of 16. Result makes of a row's sums what the operator is for:
//   Loaded load(ProductPlace)                     what it needs beside them, asked for before they have come
//   void finish(ProductPlace, Loaded, float4)     all lanes of a warp take part, those whose place does not exist too
template <class T, int kRows, class Result>
class ProductBlock {
 public:
  __device__ __forceinline__ ProductBlock(const FewRowProduct& p, const ProductPlan& plan, unsigned char* shared)
      : p_(p),
        plan_(plan),
        tile_(plan.tile),
        weights_(reinterpret_cast<T*>(shared)),
        rows_(reinterpret_cast<T*>(shared + plan.rows_begin)),
        sums_(reinterpret_cast<float4*>(shared + plan.sums_begin)),
        received_(reinterpret_cast<float4*>(shared + plan.received_begin)),
        barriers_(reinterpret_cast<uint64_t*>(shared + plan.barriers_begin)),
        rank_(static_cast<int>(blockIdx.x) % tile_.cluster),
        first_feature_(static_cast<int>(blockIdx.x) / tile_.cluster * tile_.features()),
        feature_warp_(warp_ % tile_.feature_warps),
        depth_warp_(warp_ / tile_.feature_warps) {
    const int steps = p.depth / kStepDepth, slab = rank_ * tile_.depth_warps + depth_warp_;
    first_step_ = steps * slab / tile_.slabs();
    end_step_ = steps * (slab + 1) / tile_.slabs();
  }

  __device__ __forceinline__ void run(const Result& result) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barriers_, 1);
      ptx::mbarrier_init(barriers_ + 1, 1);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
    for (int i = 0; i < plan_.ahead; ++i) load_weights(i);
    ptx::cp_async_commit();
    ptx::follow_launch_before();  // which wrote all but weights
    for (int i = 0; i < plan_.ahead; ++i) {
      load_rows(i);
      ptx::cp_async_commit();
    }
    for (int tile = 0; tile < plan_.tiles; ++tile) {
      float sums[2][kTiles][4] = {};
      for (int round = 0; round < plan_.rounds; ++round) {
        const int iteration = tile * plan_.rounds + round;
        wait_for_copies();
        __syncthreads();  // what came is seen, and the slots of the iteration before may be filled again
        load_iteration(iteration + plan_.ahead);
        multiply(sums, iteration);
      }
      if (tile == 0) ptx::cluster_wait();  // all blocks run, and have made their mbarriers
      push(sums, tile);
      finish(result, tile);
    }
  }

 private:
  static constexpr int kTiles = kRows / 8;
  static constexpr int kChunk = 8;                              // elements of 16 bytes
  static constexpr int kRoundDepth = kRoundSteps * kStepDepth;  // elements of a round
  static constexpr int kUnit = kUnitBytes / sizeof(float4);     // two halves: even rows, odd rows

  // Where 16 bytes lie in a slot. The xor puts what is read together into different banks: of rows, eight that follow
  // each other, of weights every fourth feature.
  static __device__ __forceinline__ int row_at(int row, int chunk) {
    return row * kRoundDepth + (chunk ^ (row & 7)) * kChunk;
  }
  static __device__ __forceinline__ int weight_at(int feature, int chunk) {
    return feature * kRoundDepth + (chunk ^ (feature >> 2 & 7)) * kChunk;
  }

  // Of an iteration, for this warp's slab.
  __device__ __forceinline__ T* weight_slot(int iteration) const {
    const int slot = plan_.weights_stay() ? iteration % plan_.rounds : iteration % kRingRounds;
    return weights_ + (slot * tile_.depth_warps + depth_warp_) * tile_.features() * kRoundDepth;
  }
  __device__ __forceinline__ T* row_slot(int iteration) const {
    return rows_ + (iteration % plan_.row_slots * tile_.depth_warps + depth_warp_) * kRows * kRoundDepth;
  }
  __device__ __forceinline__ int step_of(int iteration) const {
    return first_step_ + iteration % plan_.rounds * kRoundSteps;
  }
  __device__ __forceinline__ int rows_in(int tile) const { return min(p_.num_rows - tile * kRows, kRows); }

  // Lanes 8i to 8i + 7 copy 128 bytes of one row or feature. What lies outside the slab, or is no row or feature, is
  // left as it is: nobody looks at what comes of it.
  __device__ __forceinline__ void load_weights(int iteration) const {
    const int step = step_of(iteration), chunk = lane_ % 8;
    if (step + chunk / 2 >= end_step_) return;
    const T* from = static_cast<const T*>(p_.weight) + step * kStepDepth + chunk * kChunk;
    T* const to = weight_slot(iteration);
#pragma unroll
    for (int i = 0; i < kWarpFeatures; i += 4) {
      const int feature = feature_warp_ * kWarpFeatures + i + lane_ / 8;
      if (first_feature_ + feature >= p_.num_features) break;
      ptx::cp_async16(to + weight_at(feature, chunk), from + (first_feature_ + feature) * p_.weight_stride);
    }
  }

  __device__ __forceinline__ void load_rows(int iteration) const {
    const int step = step_of(iteration), chunk = lane_ % 8, tile = iteration / plan_.rounds;
    if (step + chunk / 2 >= end_step_) return;
    const T* from = static_cast<const T*>(p_.rows) + step * kStepDepth + chunk * kChunk;
    T* const to = row_slot(iteration);
#pragma unroll 1
    for (int row = feature_warp_ * 4 + lane_ / 8; row < rows_in(tile); row += tile_.feature_warps * 4) {
      ptx::cp_async16(to + row_at(row, chunk), from + (int64_t{tile} * kRows + row) * p_.rows_stride);
    }
  }

  // An empty group after the last one keeps the count of groups in flight.
  __device__ __forceinline__ void load_iteration(int iteration) const {
    if (iteration < plan_.tiles * plan_.rounds) {
      if (!plan_.weights_stay()) load_weights(iteration);
      load_rows(iteration);
    }
    ptx::cp_async_commit();
  }

  // Those of the iterations that are not needed yet, one group each, may be under way.
  __device__ __forceinline__ void wait_for_copies() const {
    switch (plan_.ahead) {
      case 1: return ptx::cp_async_wait<0>();
      case 2: return ptx::cp_async_wait<1>();
      case 3: return ptx::cp_async_wait<2>();
      default: return ptx::cp_async_wait<3>();
    }
  }

  __device__ __forceinline__ void multiply(float (&sums)[2][kTiles][4], int iteration) const {
    const int steps = min(end_step_ - step_of(iteration), kRoundSteps);
    // Row i of the operand that is the m-th half of the 32 features is feature 4 (i % 8) + i / 8 + 2m: so each lane
    // comes to hold four that follow each other.
    const int feature = feature_warp_ * kWarpFeatures + 4 * (lane_ % 8) + lane_ / 8 % 2;
    const T* const weights = weight_slot(iteration) + feature * kRoundDepth;
    const T* const rows = row_slot(iteration) + (lane_ / 16 * 8 + lane_ % 8) * kRoundDepth;
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      const int weight_chunk = ((2 * step + lane_ / 16) ^ (lane_ % 8)) * kChunk;
      const int row_chunk = ((2 * step + lane_ / 8 % 2) ^ (lane_ % 8)) * kChunk;
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4(a[m], weights + 2 * m * kRoundDepth + weight_chunk);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, rows + t * 8 * kRoundDepth + row_chunk);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ptx::mma_m16n8k16<T>(sums[m][t], a[m], b[0], b[1]);
          ptx::mma_m16n8k16<T>(sums[m][t + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Units, of 32 features and 8 rows, go to the blocks of the cluster in order, rows first to last.
  __device__ __forceinline__ int units_in(int tile) const { return tile_.feature_warps * ((rows_in(tile) + 7) / 8); }
  __device__ __forceinline__ int first_unit(int units, int rank) const { return units * rank / tile_.cluster; }

  __device__ __forceinline__ float4* received(int tile, int unit_of_block, int from_rank) const {
    return received_ + ((tile % 2 * plan_.units + unit_of_block) * tile_.cluster + from_rank) * kUnit;
  }

  // Adds the sums of the block's slabs, 16 rows at a time, and pushes them to where they are finished.
  __device__ __forceinline__ void push(const float (&sums)[2][kTiles][4], int tile) const {
    const int units = units_in(tile), own = first_unit(units, rank_ + 1) - first_unit(units, rank_);
    uint64_t* const barrier = barriers_ + tile % 2;
    if (threadIdx.x == 0) ptx::mbarrier_arrive(barrier, own * tile_.cluster * kUnitBytes);
    float4* const mine = sums_ + warp_ * 2 * kUnit + lane_;
#pragma unroll
    for (int t = 0; t < kTiles; t += 2) {
      if (t * 8 >= rows_in(tile)) break;
#pragma unroll
      for (int half = 0; half < 4; ++half) {
        const int odd = half % 2, at = t + half / 2;
        store_vector(mine + half * kWarpSize,
                     float4{sums[0][at][odd], sums[0][at][2 + odd], sums[1][at][odd], sums[1][at][2 + odd]});
      }
      __syncthreads();
      for (int i = warp_; i < 4 * tile_.feature_warps; i += tile_.warps()) {
        const int feature_warp = i % tile_.feature_warps, half = i / tile_.feature_warps;
        const int unit = (t + half / 2) * tile_.feature_warps + feature_warp;
        if (unit >= units) continue;
        const float4 sum = tree_sum_of(tile_.depth_warps, [&](int depth_warp) {
          const int warp = depth_warp * tile_.feature_warps + feature_warp;
          return load_vector<float4>(sums_ + warp * 2 * kUnit + half * kWarpSize + lane_);
        });
        const int rank = ((unit + 1) * tile_.cluster - 1) / units;
        float4* const to = received(tile, unit - first_unit(units, rank), rank_) + half % 2 * kWarpSize + lane_;
        ptx::store_in_block_of_cluster(to, static_cast<unsigned>(rank), sum, barrier);
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ ProductPlace place(int tile, int unit, int odd) const {
    const int row = unit / tile_.feature_warps * 8 + lane_ % 4 * 2 + odd;
    const int feature = first_feature_ + unit % tile_.feature_warps * kWarpFeatures + lane_ / 4 * 4;
    return {tile * kRows + row, feature, row < rows_in(tile) && feature < p_.num_features};
  }

  // Each warp takes half units of the block's own.
  __device__ __forceinline__ void finish(const Result& result, int tile) const {
    const int units = units_in(tile), first = first_unit(units, rank_), own = first_unit(units, rank_ + 1) - first;
    typename Result::Loaded loaded{};
    if (warp_ < 2 * own) loaded = result.load(place(tile, first + warp_ / 2, warp_ % 2));
    ptx::mbarrier_wait(barriers_ + tile % 2, static_cast<unsigned>(tile / 2 % 2));
#pragma unroll 1
    for (int i = warp_; i < 2 * own; i += tile_.warps()) {
      const ProductPlace here = place(tile, first + i / 2, i % 2);
      if (i != warp_) loaded = result.load(here);
      const float4 sum = tree_sum_of(tile_.cluster, [&](int rank) {
        return load_vector<float4>(received(tile, i / 2, rank) + i % 2 * kWarpSize + lane_);
      });
      result.finish(here, loaded, sum);
    }
  }

  const FewRowProduct& p_;
  const ProductPlan& plan_;
  const ProductTile& tile_;
  T* const weights_;        // [weight_slots, depth_warps, features, 64]
  T* const rows_;           // [row_slots, depth_warps, kRows, 64]
  float4* const sums_;      // [warps, 2 units]
  float4* const received_;  // [receive_buffers, units of a block, cluster, a unit]
  uint64_t* const barriers_;
  const int lane_ = threadIdx.x % 32;
  const int warp_ = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);  // so the compiler knows that it is the warp's
  const int rank_;                                                // in the cluster
  const int first_feature_;                                       // of the block
  const int feature_warp_, depth_warp_;
  int first_step_, end_step_;  // of this warp's slab, 16 of K each
};

// Starts kernel_of(rows of a tile), a kernel of these params and a plan.
template <class Params, class KernelOf>
void launch_product(const char* name, const Params& p, void* stream, const KernelOf& kernel_of) {
  const size_t shared_limit = shared_memory_limit();
  const ProductTile tile = product_tile(p, multiprocessor_count(), shared_limit);
  if (tile.cluster == 0) {
    throw std::runtime_error(std::string(name) + ": K = " + std::to_string(p.depth) +
                             " is too large for the shared memory of this GPU, " + std::to_string(shared_limit) +
                             " bytes per block");
  }
  const ProductPlan plan = product_plan(p, tile, shared_limit);
  const auto start = [&](auto tile_rows) {
    const auto kernel = kernel_of(tile_rows);
    if (!can_form_clusters(kernel)) {
      throw std::runtime_error(std::string(name) +
                               ": needs a GPU of compute capability 9.0 or newer, and kernels made for it");
    }
    const auto blocks = static_cast<unsigned>(divide_up(p.num_features, tile.features()) * tile.cluster);
    launch(name, kernel, Grid(dim3(blocks), dim3(static_cast<unsigned>(tile.cluster))),
           dim3(static_cast<unsigned>(32 * tile.warps())), static_cast<size_t>(plan.shared_bytes), stream, p, plan);
  };
  switch (plan.tile_rows) {
    case 16: return start(std::integral_constant<int, 16>{});
    case 32: return start(std::integral_constant<int, 32>{});
    case 48: return start(std::integral_constant<int, 48>{});
    case 64: return start(std::integral_constant<int, 64>{});
    default: return start(std::integral_constant<int, 80>{});
  }
}

}  // namespace
}  // namespace lpd
