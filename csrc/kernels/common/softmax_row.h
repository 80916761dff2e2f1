// Rows of the attention kernels on the CPU: in and out of scratch memory, and the parts of an online softmax.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/softmax_reference.h"

namespace lpd {
namespace {

// to[0, n) = from * scale, padded with zeros up to a whole vector.
template <class T>
void copy_row(const T* from, float scale, int n, float* to) {
  constexpr int kWidth = Vec::kWidth;
  const int full = n / kWidth * kWidth;
  const Vec factor = broadcast(scale);
  for (int i = 0; i < full; i += kWidth) store(to + i, load(from + i) * factor);
  if (full < n) store(to + full, load_partial(from + full, n - full) * factor);
}

// Largest of n scores; the lanes after them, up to a whole vector, become -inf.
inline float finish_scores(float* scores, int n) {
  constexpr int kWidth = Vec::kWidth;
  const int full = n / kWidth * kWidth;
  Vec top = broadcast(kMinusInfinity);
  for (int i = 0; i < full; i += kWidth) top = max(top, load(scores + i));
  if (full < n) {
    const Vec tail = keep_first(load(scores + full), n - full, kMinusInfinity);
    store(scores + full, tail);
    top = max(top, tail);
  }
  return reduce_max(top);
}

// Turns n finished scores into exp(score - reference) and returns their sum.
inline float exponentiate(float* scores, int n, float reference) {
  constexpr int kWidth = Vec::kWidth;
  Vec sum = broadcast(0.0f);
  for (int i = 0; i < n; i += kWidth) {
    const Vec probability = exp_nonpositive(load(scores + i) - broadcast(reference));
    store(scores + i, probability);
    sum = sum + probability;
  }
  return reduce_add(sum);
}

}  // namespace
}  // namespace lpd
