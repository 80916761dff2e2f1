// The product of few rows with a matrix, rows W^T, in fp32, of which operators make different results: how K is cut and
// how the work is split over blocks, on CUDA from compute capability 9.0 on.
//
// K is cut into slabs whose products are added up by a binary tree, in fp32. Their number follows from N and K alone,
// so neither the number of rows nor how blocks share the slabs changes a bit of a row's result.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace lpd {

// Strides in elements; rows are contiguous. dtype is one of 16 bits.
struct FewRowProduct {
  const void* rows;    // [R, K] in dtype
  const void* weight;  // [N, K] in dtype
  int64_t rows_stride;
  int64_t weight_stride;
  int32_t num_rows;      // R
  int32_t num_features;  // N, a multiple of 8
  int32_t depth;         // K, a multiple of 32
  DType dtype;
};

constexpr int32_t kWarpFeatures = 32;  // a warp computes these for all rows of a tile of rows, over one slab
constexpr int32_t kStepDepth = 16;     // of K, in one instruction of the tensor cores
constexpr int32_t kRoundSteps = 4;     // 128 bytes of each row and feature, which arrive together
constexpr int32_t kRingRounds = 4;     // in shared memory at a time; weights of a slab with no more stay there
constexpr int32_t kMaxProductWarps = 12;
constexpr int32_t kProductRows[] = {16, 32, 48, 64, 80};  // of a tile, that kernels are made for
constexpr int32_t kUnitBytes = 1024;                      // of the sums of 32 features and 8 rows, handed on together

// A block has feature_warps * depth_warps warps, of which each takes 32 features and one slab. The blocks of a cluster
// have the same features, and each of them depth_warps slabs. All but feature_warps are powers of two.
struct ProductTile {
  int32_t feature_warps, depth_warps, cluster;

  LPD_HOST_DEVICE int32_t warps() const { return feature_warps * depth_warps; }
  LPD_HOST_DEVICE int32_t features() const { return kWarpFeatures * feature_warps; }
  LPD_HOST_DEVICE int32_t slabs() const { return depth_warps * cluster; }
};

inline int32_t divide_up(int32_t a, int32_t b) { return (a + b - 1) / b; }

// As many as give a GPU enough warps, but none shorter than 64 of K: from 8192 features on, whose weights stream, one.
inline int32_t product_slabs(int32_t num_features, int32_t depth) {
  const int32_t feature_warps = divide_up(num_features, kWarpFeatures);
  int32_t slabs = 1;
  if (feature_warps >= 256) return slabs;
  while (slabs < 16 && slabs * feature_warps < 1024 && 2 * slabs * 64 <= depth) slabs *= 2;
  return slabs;
}

// How a launch goes about it. A block takes tiles of tile_rows rows, one after the other; an iteration is a round of
// one tile, and what it multiplies lies in slots of two rings in shared memory.
struct ProductPlan {
  ProductTile tile;
  int32_t tile_rows, tiles;
  int32_t rounds;  // of a tile
  int32_t ahead;   // iterations that are asked for before they are used
  int32_t weight_slots, row_slots;
  int32_t units;  // that a block of the cluster finishes of a tile, at most
  // Bytes of shared memory before each: weights, rows, sums of warps, sums from the cluster (twice, if tiles follow
  // each other), two mbarriers.
  int32_t rows_begin, sums_begin, received_begin, barriers_begin, shared_bytes;

  ProductPlan(const FewRowProduct& p, const ProductTile& tile_, int32_t tile_rows_)
      : tile(tile_), tile_rows(tile_rows_), tiles(divide_up(p.num_rows, tile_rows_)) {
    constexpr int32_t kRoundBytes = kRoundSteps * kStepDepth * 2;
    rounds = divide_up(divide_up(p.depth / kStepDepth, tile.slabs()), kRoundSteps);
    weight_slots = std::min(rounds, kRingRounds);
    ahead = weights_stay() ? rounds : kRingRounds - 1;
    row_slots = tiles == 1 && weights_stay() ? ahead : ahead + 1;
    units = divide_up(tile.feature_warps * (tile_rows / 8), tile.cluster);
    rows_begin = weight_slots * tile.features() * tile.depth_warps * kRoundBytes;
    sums_begin = rows_begin + row_slots * tile_rows * tile.depth_warps * kRoundBytes;
    received_begin = sums_begin + tile.warps() * 2 * kUnitBytes;
    barriers_begin = received_begin + (tiles == 1 ? 1 : 2) * units * tile.cluster * kUnitBytes;
    shared_bytes = barriers_begin + 16;
  }

  LPD_HOST_DEVICE bool weights_stay() const { return rounds <= kRingRounds; }

  // Where tiles follow each other every block of a cluster must have something to wait for in each: so none gets ahead
  // of another by more than one tile, of whose sums there is a second buffer.
  bool works(size_t shared_limit) const {
    const bool all_finish = tile.feature_warps * (tile_rows / 8) >= tile.cluster;
    return static_cast<size_t>(shared_bytes) <= shared_limit && (tiles == 1 || all_finish);
  }
};

// For any number of rows: the most that fit in shared memory, if the device has so much of it, in as few tiles as can
// be.
inline ProductPlan product_plan(const FewRowProduct& p, const ProductTile& tile, size_t shared_limit) {
  ProductPlan best(p, tile, kProductRows[0]);
  for (const int32_t tile_rows : kProductRows) {
    const ProductPlan plan(p, tile, tile_rows);
    if (plan.works(shared_limit) && (!best.works(shared_limit) || plan.tiles < best.tiles)) best = plan;
  }
  return best;
}

// The tile of least estimated time that works for any number of rows: full waves of blocks, each of which waits for its
// rows, for a part of its weights (most have come before), and for the sums of its cluster. The rates are those of an
// H200 in bytes per microsecond and multiprocessor, estimated; the time that any block takes is as of 48 rows.
inline ProductTile product_tile(const FewRowProduct& p, int32_t multiprocessors, size_t shared_limit) {
  constexpr float kAlways = 2.0f, kL2 = 42e3f, kMemory = 130e3f, kCluster = 22e3f, kRows = 48.0f;
  constexpr int32_t kUsualRows = 80;  // and fewer; they should make one tile
  const int32_t slabs = product_slabs(p.num_features, p.depth);
  FewRowProduct many_rows = p, usual_rows = p;
  many_rows.num_rows = 1 << 20;
  usual_rows.num_rows = kUsualRows;
  ProductTile best{};
  float best_time = 0.0f;
  for (int32_t feature_warps = 1; feature_warps <= 4; ++feature_warps) {
    for (int32_t cluster = 1; cluster <= std::min(slabs, 8); cluster *= 2) {
      const ProductTile tile{feature_warps, slabs / cluster, cluster};
      if (tile.warps() > kMaxProductWarps || tile.depth_warps > 8) continue;
      if (!product_plan(many_rows, tile, shared_limit).works(shared_limit)) continue;
      const int32_t blocks = divide_up(p.num_features, tile.features()) * cluster;
      const float features = static_cast<float>(tile.features());
      const float depth = static_cast<float>(p.depth) / static_cast<float>(cluster);
      const float others = 1.0f - 1.0f / static_cast<float>(cluster);
      const int32_t waves = divide_up(blocks, multiprocessors) * product_plan(usual_rows, tile, shared_limit).tiles;
      const float time =
          static_cast<float>(waves) * (kAlways + 2 * kRows * depth / kL2 + 2 * features * depth / kMemory +
                                       4 * kRows * features * others / kCluster);
      if (best.cluster == 0 || time < best_time) best = tile, best_time = time;
    }
  }
  return best;
}

}  // namespace lpd
