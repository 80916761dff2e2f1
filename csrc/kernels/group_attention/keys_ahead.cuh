// In a launch of more blocks than run at once: asks L2 for the keys and values that the block which takes this one's
// place will want first, so that memory has work while blocks end and begin.
#pragma once

#include "common/ptx.cuh"
#include "group_attention/block_work.cuh"

namespace lpd {
namespace {

// Of the cached keys and values of its first tile of `tile_keys`. Blocks begin in order, so it is the block as many
// further as run at once: a guess, which costs a little bandwidth where it is wrong. Later tiles of rows read what the
// first has read.
template <class T, int kHeadDim>
__device__ __forceinline__ void ask_for_keys_of_next(const GroupAttentionParams& p, int blocks_at_once, int tile_keys) {
  constexpr int kLine = 128, kRowBytes = kHeadDim * sizeof(T), kLines = (kRowBytes + kLine - 1) / kLine;  // of a row
  const unsigned next = blockIdx.x + blocks_at_once;
  if (!ptx::has_clusters() || blocks_at_once == 0 || blockIdx.y > 0 || next >= gridDim.x) return;
  const Segment segment = p.segments[next / p.num_heads];
  const int64_t offset = cache_offset(p, segment, next % p.num_heads);
  const int keys = min(segment.cache_length, tile_keys);
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * keys * kLines; i += kThreads) {
    const int row = i / kLines;
    const T* const cache = static_cast<const T*>(row < keys ? p.k_cache : p.v_cache) + offset;
    const T* const from = cache + (row < keys ? row : row - keys) * p.cache_position_stride;
    ptx::prefetch_l2(reinterpret_cast<const char*>(from) + i % kLines * kLine);
  }
}

}  // namespace
}  // namespace lpd
