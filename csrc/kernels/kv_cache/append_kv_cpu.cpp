// append_kv on the CPU: one memcpy of D elements per row, part and head. Limited by memory bandwidth.
#include <cstring>

#include "common/cpu_kernels.h"

namespace lpd::LPD_ISA {

void append_kv(const AppendKvParams& p, int64_t begin, int64_t end) {
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const char* qkv = static_cast<const char*>(p.qkv);
  char* caches[2] = {static_cast<char*>(p.k_cache), static_cast<char*>(p.v_cache)};
  for (int64_t item = begin; item < end; ++item) {
    const Segment& s = p.segments[item / p.num_heads];
    const int64_t head = item % p.num_heads;
    for (int part = 0; part < 2; ++part) {
      const char* source =
          qkv +
          (s.context_start * p.qkv_row_stride + (part + 1) * p.qkv_part_stride + head * p.qkv_head_stride) * element;
      char* target = caches[part] + (s.cache_slot * p.cache_slot_stride + head * p.cache_head_stride +
                                     s.cache_length * p.cache_position_stride) *
                                        element;
      for (int32_t row = 0; row < s.num_context; ++row) {
        std::memcpy(target + row * p.cache_position_stride * element, source + row * p.qkv_row_stride * element,
                    static_cast<size_t>(p.head_dim * element));
      }
    }
  }
}

}  // namespace lpd::LPD_ISA
