// group_attention: append this step's context K and V to the cache, then attend with two KV lengths per sequence.
// Context rows see the cached positions and all context rows of the step; query rows also see each other.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kv_cache/cache_rows.h"

namespace lpd {

// K and V of the context rows are appended first; all rows of `qkv` that segments name are attended with.
struct GroupAttentionParams : CacheRows {
  void* output;  // [R - first_output_row, H * D], contiguous
  // CUDA: scratch memory that lets blocks share keys, for one launch at a time. Zeroed once by its owner; a launch
  // leaves its counters at zero. If it is nullptr or too small, one block walks over all keys of a tile of rows. Blocks
  // that form clusters leave it alone, but only if it is given do they share keys.
  void* workspace;
  int64_t workspace_bytes;
  int32_t first_output_row;  // rows before it leave K and V only
  int32_t max_keys;          // of a segment
  float scale;
  // CUDA: neither caches nor segments were written by the launch right before, so they are read while it still runs.
  bool settled;
};

// CPU work items: (segment, head) pairs, item = segment * num_heads + head.
inline int64_t group_attention_items(const GroupAttentionParams& p) { return int64_t{p.num_segments} * p.num_heads; }

inline bool group_attention_cuda_head_dim(int32_t head_dim) {
  return head_dim == 32 || head_dim == 64 || head_dim == 128;
}

// On CUDA a block takes up to 64 rows, in four slabs of 16 rows of one class (context or query).
constexpr int32_t kGroupAttentionTileRows = 64, kGroupAttentionSlabRows = 16;

// Keys that a block reads at a time.
inline int32_t group_attention_tile_keys(DType dtype) { return dtype == DType::kFloat32 ? 32 : 64; }

inline int64_t group_attention_row_tiles(int32_t max_rows) {
  return (int64_t{max_rows} + kGroupAttentionTileRows - 1) / kGroupAttentionTileRows;
}

// The least number of keys that are worth a block of a cluster, and blocks that every GPU with clusters has room for.
constexpr int32_t kGroupAttentionClusterKeys = 32, kGroupAttentionClusterBlocks = 8;

// Blocks that share the keys of one tile of rows. More than one only where one block per (segment, head, tile) leaves
// multiprocessors idle; then as many as there are multiprocessors for and keys. A cluster reads Q once. Blocks that do
// not form one each read it, so no more of them than add a tenth to the bytes that are read and written anyway: with
// many rows and few keys a split costs about as much as it saves.
inline int32_t group_attention_key_splits(const GroupAttentionParams& p, int32_t multiprocessors, bool clusters) {
  const int64_t blocks = int64_t{p.num_segments} * p.num_heads * group_attention_row_tiles(p.max_rows);
  if (blocks == 0) return 1;
  const int64_t least_keys = clusters ? kGroupAttentionClusterKeys : group_attention_tile_keys(p.dtype);
  const int64_t with_keys = (int64_t{p.max_keys} + kGroupAttentionSlabRows - 1 + least_keys - 1) / least_keys;
  const int64_t rows_moved = 2 * int64_t{p.max_keys} + 3 * int64_t{p.max_rows};  // K and V; Q, output and appended
  const int64_t affordable = clusters ? kGroupAttentionClusterBlocks : 1 + rows_moved / (10 * int64_t{p.max_rows});
  const int64_t splits = std::min({multiprocessors / blocks, with_keys, affordable});
  return static_cast<int32_t>(std::max<int64_t>(splits, 1));
}

// The workspace: a counter per tile of rows, then per block [64, D] sums and 64 pairs of maximum and sum, in fp32.
// Blocks that share keys are no more than multiprocessors.
inline int64_t group_attention_counter_bytes(int32_t multiprocessors) {
  return (int64_t{multiprocessors} * 4 + 127) / 128 * 128;
}

inline int64_t group_attention_partial_bytes(int32_t head_dim) {
  return int64_t{kGroupAttentionTileRows} * (head_dim + 2) * 4;
}

inline int64_t group_attention_workspace_bytes(int32_t head_dim, int32_t multiprocessors) {
  return group_attention_counter_bytes(multiprocessors) +
         int64_t{multiprocessors} * group_attention_partial_bytes(head_dim);
}

// On the current device, without waiting for it; every row must begin at a multiple of 16 bytes.
void launch_group_attention(const GroupAttentionParams& params, void* stream);

}  // namespace lpd
