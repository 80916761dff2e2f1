// One row to bytes, in two passes: its floats, rotated if they are to be, and their range; then the bytes of both
// planes.
#pragma once

#include <cfloat>

#include "common/simd.h"
#include "row_quantization/quantize_rows.h"

namespace lpd {
namespace {

// values[j] = sum_i (-1)^popcount(i & j) values[i], by butterflies, eight values in registers at a time.
inline void hadamard(Vec (&values)[kRotation]) {
  static_assert(kRotation == 64, "two rounds of eight");
  for (const int stride : {1, 8}) {
    for (int group = 0; group < 8; ++group) {
      Vec* first = values + (stride == 1 ? 8 * group : group);
      Vec v[8];
      LPD_UNROLL
      for (int k = 0; k < 8; ++k) v[k] = first[k * stride];
      LPD_UNROLL
      for (int half = 1; half < 8; half *= 2) {
        LPD_UNROLL
        for (int k = 0; k < 8; ++k) {
          if ((k & half) == 0) {
            const Vec a = v[k], b = v[k + half];
            v[k] = a + b;
            v[k + half] = a - b;
          }
        }
      }
      LPD_UNROLL
      for (int k = 0; k < 8; ++k) first[k * stride] = v[k];
    }
  }
}

// take(offset, values, count) for all values of a row: count of them, up to kWidth, zeros behind.
template <class T, class Take>
void for_each_vector(const T* x, int width, Take take) {
  const int full = width / Vec::kWidth * Vec::kWidth;
  for (int i = 0; i < full; i += Vec::kWidth) take(i, load(x + i), Vec::kWidth);
  if (full < width) take(full, load_partial(x + full, width - full), width - full);
}

// The same of the rotated row. Its slices lie kRotation-th parts apart, so that only whole vectors are added.
template <class T, class Take>
void for_each_rotated_vector(const T* x, int width, Take take) {
  const int slice = width / kRotation;
  for (int i = 0; i < slice; i += Vec::kWidth) {
    const int count = slice - i < Vec::kWidth ? slice - i : Vec::kWidth;
    Vec tile[kRotation];
    for (int j = 0; j < kRotation; ++j) {
      const T* from = x + j * slice + i;
      tile[j] = count == Vec::kWidth ? load(from) : load_partial(from, count);
    }
    hadamard(tile);
    for (int j = 0; j < kRotation; ++j) take(j * slice + i, tile[j], count);
  }
}

inline RowQuantization with_step(float step, float zero) {
  const float scale = step >= FLT_MIN ? step : 1.0f;
  return {scale, __builtin_nearbyintf(zero / scale)};
}

// The bytes of a plane, with their scale and zero point.
struct Plane {
  Plane(const RowQuantization& of, int levels)
      : factor(broadcast(1.0f / of.scale)),
        scale(broadcast(of.scale)),
        zero_point(broadcast(of.zero_point)),
        largest(broadcast(static_cast<float>(levels))) {}
  Vec bytes(Vec value) const {
    return min(max(round_to_int(fma(value, factor, zero_point)), broadcast(0.0f)), largest);
  }
  Vec rest(Vec value, Vec bytes) const { return fma(zero_point - bytes, scale, value); }
  Vec factor, scale, zero_point, largest;
};

inline void store_first(uint8_t* out, Vec bytes, int count) {
  if (count == Vec::kWidth) return store_bytes(out, bytes);
  uint8_t buffer[Vec::kWidth];
  store_bytes(buffer, bytes);
  for (int i = 0; i < count; ++i) out[i] = buffer[i];
}

// values: scratch [width]. The row at `next` is fetched meanwhile.
template <class T>
void quantize_row(const T* x, int width, const RowBytes& out, int64_t row, float* values, const T* next) {
  const Vec zero = broadcast(0.0f);
  Vec low = zero, high = zero, not_finite = zero;  // comparisons lose a NaN, so 0 * x is summed: it keeps one
  const auto take = [&](int offset, Vec value, int count) {
    low = min(low, value);
    high = max(high, value);
    not_finite = fma(value, zero, not_finite);
    count == Vec::kWidth ? store(values + offset, value) : store_partial(values + offset, value, count);
  };
  out.rotate ? for_each_rotated_vector(x, width, take) : for_each_vector(x, width, take);
  const float top = reduce_max(high), bottom = -reduce_max(zero - low), levels = static_cast<float>(out.levels);
  // The rounding error of the first plane is at most half a step, either way.
  const RowQuantization first = with_step((top - bottom) / levels, -bottom);
  const RowQuantization second = with_step(first.scale / levels, first.scale / 2);
  const Plane coarse(first, out.levels), fine(second, out.levels);
  uint8_t* bytes = out.quantized + row * width;
  uint8_t* fine_bytes = out.planes == 2 ? bytes + out.num_rows * width : nullptr;
  for_each_vector(values, width, [&](int offset, Vec value, int count) {
    __builtin_prefetch(next + offset, 0, 2);
    const Vec whole = coarse.bytes(value);
    store_first(bytes + offset, whole, count);
    if (fine_bytes) store_first(fine_bytes + offset, fine.bytes(coarse.rest(value, whole)), count);
  });
  const float spoiled = reduce_add(not_finite);
  out.quantization[row] = {first.scale + spoiled, first.zero_point};
  if (fine_bytes) out.quantization[out.num_rows + row] = {second.scale + spoiled, second.zero_point};
}

}  // namespace
}  // namespace lpd
