// group_attention: append this step's context K and V to the cache, then attend with two KV lengths per sequence.
// Context rows see the cached positions and all context rows of the step; query rows also see each other.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/segment.h"

namespace lpd {

// All strides are in elements. The innermost dimension (D) is contiguous everywhere.
struct GroupAttentionParams {
  const void* qkv;  // [R, 3, H, D]
  void* k_cache;    // [S, H, P, D], written at [cache_length, cache_length + num_context) of each segment's slot
  void* v_cache;    // [S, H, P, D], same strides as k_cache
  void* output;     // [R - first_output_row, H * D], contiguous
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
  int32_t first_output_row;  // rows before it leave K and V only
  int32_t max_rows;
  int32_t max_keys;
  float scale;
  DType dtype;
};

// CPU work items: (segment, head) pairs, item = segment * num_heads + head.
inline int64_t group_attention_items(const GroupAttentionParams& p) { return int64_t{p.num_segments} * p.num_heads; }

}  // namespace lpd
