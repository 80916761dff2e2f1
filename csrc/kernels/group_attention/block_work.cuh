// The work of one block of group_attention. Rows and keys are laid out so that context rows never share a matrix
// product with keys they do not see, whatever those hold (0 * NaN is NaN).
//
//   rows:  context rows, 16 to a slab | query rows, 16 to a slab          four slabs make a tile
//   keys:  cache | context | zeros up to a multiple of 16 | query rows    context rows see those before the zeros
#pragma once

#include "common/ptx.cuh"
#include "group_attention/group_attention.h"
#include "kv_cache/append_kv.cuh"

namespace lpd {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlabRows = kGroupAttentionSlabRows;
constexpr int kTileRows = kGroupAttentionTileRows;
constexpr int kKeyGroup = 16;  // keys of one matrix product; all of them cached or context, or all of query rows
static_assert(kTileRows == kWarps * kSlabRows);

// Rows of one class, as numbered in qkv.
struct RowRange {
  int first;
  int count;
};

// Up to 16 rows of one class. count <= 0: none.
struct Slab {
  int first;  // in qkv
  int count;
  int key_end;  // they see the keys before it, less the zeros
};

__device__ __forceinline__ RowRange rows_with_output(int start, int count, int first_output_row) {
  const int skipped = min(max(first_output_row - start, 0), count);
  return {start + skipped, count - skipped};
}

__device__ __forceinline__ int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Splits keys over blocks. blockIdx.x counts (segment, head); blockIdx.y splits of tiles of rows, tile by tile,
// for as many tiles as max_rows fill, and last one that both classes' partly empty slabs may need. If the blocks that
// share a tile form a cluster, all of them take part, be there keys for them or not, and the last tile is split too.
// Otherwise they meet in global memory, no more of them than there are tiles of keys, and the last tile is not split.
struct KeySplits {
  int count;           // of a tile of rows
  int row_tiles;       // that are split
  unsigned* counters;  // [segments, heads, row_tiles], 0 between launches
  float* partials;     // [segments, heads, row_tiles, count, Partial<D>::kElements]
  int blocks_at_once;  // that run, if the launch has more: the next take their places; or 0
};

struct BlockWork {
  Segment segment;
  int head;
  RowRange context, query;  // rows with an output
  int row_tile;
  int context_slabs;          // of the segment
  int first_slab, num_slabs;  // of this tile
  int split, num_splits;      // of the keys of this tile
  int shared_keys;            // where keys end that all rows see, cached and context, or this split before
  int query_keys;             // where keys of query rows begin
  int key_end;                // where they end, or this split before
  int first_key, num_tiles;   // of keys, for this split

  __device__ __forceinline__ BlockWork(const GroupAttentionParams& p, const KeySplits& splits, const Segment& s,
                                       int tile_keys)
      : segment(s),
        head(blockIdx.x % p.num_heads),
        context(rows_with_output(s.context_start, s.num_context, p.first_output_row)),
        query(rows_with_output(s.query_start, s.num_query, p.first_output_row)) {
    const int split_tiles = splits.row_tiles * splits.count;
    const bool is_split = static_cast<int>(blockIdx.y) < split_tiles;
    row_tile = is_split ? blockIdx.y / splits.count : blockIdx.y - split_tiles + splits.row_tiles;
    split = is_split ? blockIdx.y % splits.count : 0;
    context_slabs = (context.count + kSlabRows - 1) / kSlabRows;
    const int slabs = context_slabs + (query.count + kSlabRows - 1) / kSlabRows;
    first_slab = row_tile * kWarps;
    num_slabs = min(max(slabs - first_slab, 0), kWarps);
    shared_keys = s.cache_length + s.num_context;
    query_keys = round_up(shared_keys, kKeyGroup);
    key_end = query_keys + s.num_query;
    const bool context_only = first_slab + num_slabs <= context_slabs;
    const int end = context_only ? shared_keys : key_end;
    num_splits = !is_split             ? 1
                 : ptx::has_clusters() ? splits.count
                                       : min(splits.count, (end + tile_keys - 1) / tile_keys);
    const int groups = (end + kKeyGroup - 1) / kKeyGroup;  // which are not split
    const int each = groups / max(num_splits, 1), rest = groups % max(num_splits, 1);
    first_key = kKeyGroup * (split * each + min(split, rest));
    const int split_end = first_key + kKeyGroup * (each + (split < rest ? 1 : 0));
    num_tiles = (min(end, split_end) - first_key + tile_keys - 1) / tile_keys;
    segment.cache_length = min(segment.cache_length, split_end);
    shared_keys = min(shared_keys, split_end);
    key_end = min(key_end, split_end);
  }

  // Whether the blocks that share this tile's keys form a cluster.
  __device__ __forceinline__ bool in_cluster() const { return ptx::has_clusters() && num_splits > 1; }

  // Warps that share the keys of each tile of keys.
  __device__ __forceinline__ int key_warps() const { return num_slabs == 1 ? 4 : num_slabs == 2 ? 2 : 1; }

  __device__ __forceinline__ Slab slab(int in_tile) const {
    const int index = first_slab + in_tile;
    const bool is_context = index < context_slabs;
    const int skipped = kSlabRows * (is_context ? index : index - context_slabs);
    return {(is_context ? context.first : query.first) + skipped,
            min((is_context ? context.count : query.count) - skipped, kSlabRows), is_context ? shared_keys : key_end};
  }

  // Rows of the tile that exist: those of context, then query rows.
  __device__ __forceinline__ int rows() const { return context_rows() + query_rows(); }

  // The i-th of them, counted in the slabs of the tile.
  __device__ __forceinline__ int row_in_slabs(int i) const {
    return i < context_rows() ? i : tile_context_slabs() * kSlabRows + i - context_rows();
  }

  // Number of keys in the group that begins at `group`, for rows that see the first one.
  __device__ __forceinline__ int keys_in_group(int group) const {
    return (group < query_keys ? shared_keys : key_end) - group;
  }

  __device__ __forceinline__ bool key_exists(int key) const {
    return key < shared_keys || (key >= query_keys && key < key_end);
  }

 private:
  // Of this tile.
  __device__ __forceinline__ int tile_context_slabs() const {
    return min(max(context_slabs - first_slab, 0), num_slabs);
  }
  __device__ __forceinline__ int context_rows() const {
    return min(max(context.count - first_slab * kSlabRows, 0), tile_context_slabs() * kSlabRows);
  }
  __device__ __forceinline__ int query_rows() const {
    return min(max(query.count - max(first_slab - context_slabs, 0) * kSlabRows, 0),
               (num_slabs - tile_context_slabs()) * kSlabRows);
  }
};

}  // namespace
}  // namespace lpd
