// One row to bytes, in two passes of which the second finds it in cache: the range, then the bytes.
#pragma once

#include <cfloat>

#include "common/simd.h"
#include "row_quantization/quantize_rows.h"

namespace lpd {
namespace {

template <class T>
RowQuantization quantize_row(const T* x, uint8_t* out, int width, int levels) {
  constexpr int kWidth = Vec::kWidth;
  const int full = width / kWidth * kWidth, rest = width - full;
  const Vec zero = broadcast(0.0f);

  Vec low = zero, high = zero, not_finite = zero;  // comparisons lose a NaN, so 0 * x is summed: it keeps one
  const auto take = [&](Vec value) {
    low = min(low, value);
    high = max(high, value);
    not_finite = fma(value, zero, not_finite);
  };
  for (int i = 0; i < full; i += kWidth) take(load(x + i));
  if (rest > 0) take(load_partial(x + full, rest));
  const float top = reduce_max(high), bottom = -reduce_max(zero - low), largest = static_cast<float>(levels);
  const float span = (top - bottom) / largest;
  const float scale = span >= FLT_MIN ? span : 1.0f;
  const float inverse = 1.0f / scale;
  const float zero_point = __builtin_nearbyintf(-bottom * inverse);

  const Vec factor = broadcast(inverse), shift = broadcast(zero_point), end = broadcast(largest);
  const auto bytes = [&](Vec value) { return min(max(round_to_int(fma(value, factor, shift)), zero), end); };
  for (int i = 0; i < full; i += kWidth) store_bytes(out + i, bytes(load(x + i)));
  if (rest > 0) {
    uint8_t buffer[kWidth];
    store_bytes(buffer, bytes(load_partial(x + full, rest)));
    for (int i = 0; i < rest; ++i) out[full + i] = buffer[i];
  }
  return {scale + reduce_add(not_finite), zero_point};
}

}  // namespace
}  // namespace lpd
