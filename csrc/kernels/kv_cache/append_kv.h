// append_kv: copy the context rows' K and V into the cache, without attention (prefill, tests).
#pragma once

#include <cstdint>

#include "kv_cache/cache_rows.h"

namespace lpd {

using AppendKvParams = CacheRows;

// CPU work items: (segment, head) pairs, item = segment * num_heads + head.
inline int64_t append_kv_items(const AppendKvParams& p) { return int64_t{p.num_segments} * p.num_heads; }

// On the current device, without waiting for it; every row must begin at a multiple of 16 bytes.
void launch_append_kv(const AppendKvParams& params, void* stream);

}  // namespace lpd
