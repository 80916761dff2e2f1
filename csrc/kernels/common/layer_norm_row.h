// LayerNorm of one fp32 row that is in cache: two passes for the statistics (mean, then centred squares), one to write.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace lpd {
namespace {

template <class Weight, class Out>
void layer_norm_row(const float* x, const Weight* weight, const Weight* bias, Out* out, int width, float eps) {
  constexpr int kWidth = Vec::kWidth;
  const int full = width / kWidth * kWidth, rest = width - full;

  Vec sum = broadcast(0.0f);
  for (int i = 0; i < full; i += kWidth) sum = sum + load(x + i);
  float total = reduce_add(sum);
  for (int i = full; i < width; ++i) total += x[i];
  const float mean = total / static_cast<float>(width);

  const Vec mean_v = broadcast(mean);
  Vec squares = broadcast(0.0f), sum_centred = broadcast(0.0f);
  for (int i = 0; i < full; i += kWidth) {
    const Vec centred = load(x + i) - mean_v;
    squares = fma(centred, centred, squares);
    sum_centred = sum_centred + centred;
  }
  float total_squares = reduce_add(squares), total_centred = reduce_add(sum_centred);
  for (int i = full; i < width; ++i) {
    const float centred = x[i] - mean;
    total_squares += centred * centred;
    total_centred += centred;
  }
  // Rounding left `rest_mean` in the mean; where rows lie far from 0 it would dominate the error.
  const float rest_mean = total_centred / static_cast<float>(width);
  const float variance = total_squares / static_cast<float>(width) - rest_mean * rest_mean;
  const float inverse_deviation = 1.0f / std::sqrt((variance > 0.0f ? variance : 0.0f) + eps);

  const Vec scale = broadcast(inverse_deviation), shift = broadcast(-rest_mean * inverse_deviation);
  for (int i = 0; i < full; i += kWidth) {
    store(out + i, fma(fma(load(x + i) - mean_v, scale, shift), load(weight + i), load(bias + i)));
  }
  if (rest > 0) {
    const Vec tail = fma(load_partial(x + full, rest) - mean_v, scale, shift);
    store_partial(out + full, fma(tail, load_partial(weight + full, rest), load_partial(bias + full, rest)), rest);
  }
}

}  // namespace
}  // namespace lpd
