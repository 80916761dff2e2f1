// The rows of a step and the caches that their K and V go to: what append_kv and group_attention are given alike.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/segment.h"

namespace lpd {

// All strides are in elements. The innermost dimension (D) is contiguous everywhere.
struct CacheRows {
  const void* qkv;  // [R, 3, H, D]: Q, K, V
  void* k_cache;    // [S, H, P, D], written at [cache_length, cache_length + num_context) of each segment's slot
  void* v_cache;    // [S, H, P, D], same strides as k_cache
  const Segment* segments;
  int64_t qkv_row_stride;
  int64_t qkv_part_stride;  // from q to k to v
  int64_t qkv_head_stride;
  int64_t cache_slot_stride;
  int64_t cache_head_stride;
  int64_t cache_position_stride;
  int32_t num_segments;
  int32_t num_heads;
  int32_t head_dim;
  int32_t max_rows;  // of a segment
  DType dtype;
};

}  // namespace lpd
