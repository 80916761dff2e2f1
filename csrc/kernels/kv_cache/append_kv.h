// append_kv: copy the context rows' K and V into the cache, without attention (prefill, tests).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/segment.h"

namespace lpd {

// All strides are in elements. The innermost dimension (D) is contiguous everywhere.
struct AppendKvParams {
  const void* qkv;  // [R, 3, H, D]; part 1 is K, part 2 is V
  void* k_cache;    // [S, H, P, D]
  void* v_cache;    // [S, H, P, D], same strides as k_cache
  const Segment* segments;
  int64_t qkv_row_stride;
  int64_t qkv_part_stride;
  int64_t qkv_head_stride;
  int64_t cache_slot_stride;
  int64_t cache_head_stride;
  int64_t cache_position_stride;
  int32_t num_segments;
  int32_t num_heads;
  int32_t head_dim;
  int32_t max_rows;
  DType dtype;
};

// CPU work items: (segment, head) pairs, item = segment * num_heads + head.
inline int64_t append_kv_items(const AppendKvParams& p) { return int64_t{p.num_segments} * p.num_heads; }

// On the current device, without waiting for it; every row must begin at a multiple of 16 bytes.
void launch_append_kv(const AppendKvParams& params, void* stream);

}  // namespace lpd
