// Device code that append_kv and group_attention share: reading a segment, and copying context K and V into the cache.
#pragma once

#include "common/cuda.cuh"
#include "kv_cache/cache_rows.h"

namespace lpd {
namespace {

constexpr int kSegmentFields = sizeof(Segment) / sizeof(int32_t);

// Reads a segment once for the whole block; `shared` [kSegmentFields] is free again after the block's next barrier.
__device__ __forceinline__ Segment read_segment(const Segment* segments, int index, int32_t* shared) {
  if (threadIdx.x < kSegmentFields) {
    shared[threadIdx.x] = reinterpret_cast<const int32_t*>(segments)[int64_t{index} * kSegmentFields + threadIdx.x];
  }
  __syncthreads();
  return {shared[0], shared[1], shared[2], shared[3], shared[4], shared[5]};
}

// Elements from the start of a cache to position 0 of this segment and head.
__device__ __forceinline__ int64_t cache_offset(const CacheRows& p, const Segment& segment, int head) {
  return segment.cache_slot * p.cache_slot_stride + head * p.cache_head_stride;
}

// Copies K and V of context rows [first, last) of one segment and head into the cache, 16 bytes per thread and access;
// for a block of kThreads.
template <int kThreads>
__device__ __forceinline__ void append_rows(const CacheRows& p, const Segment& segment, int head, int first, int last) {
  const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2;
  const int chunks = static_cast<int>(p.head_dim * size) / 16;  // per row
  const char* k_rows = static_cast<const char*>(p.qkv) +
                       (segment.context_start * p.qkv_row_stride + p.qkv_part_stride + head * p.qkv_head_stride) * size;
  const int64_t v_from_k = p.qkv_part_stride * size;
  const int64_t cached = (cache_offset(p, segment, head) + segment.cache_length * p.cache_position_stride) * size;
  char* k_cache = static_cast<char*>(p.k_cache) + cached;
  char* v_cache = static_cast<char*>(p.v_cache) + cached;
#pragma unroll 2
  for (int i = first * chunks + threadIdx.x; i < last * chunks; i += kThreads) {
    const int row = i / chunks, byte = i % chunks * 16;
    const char* from = k_rows + row * p.qkv_row_stride * size + byte;
    const int64_t to = row * p.cache_position_stride * size + byte;
    const uint4 k = load_vector<uint4>(from), v = load_vector<uint4>(from + v_from_k);
    store_vector(k_cache + to, k);
    store_vector(v_cache + to, v);
  }
}

}  // namespace
}  // namespace lpd
