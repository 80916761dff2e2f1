// LayerNorm of rows that are made by an addition: the first pass adds and sums, the second sums centred squares, the
// third writes. A row stays in L1. The third pass of a row runs together with the first of the next, so that waiting
// for memory and arithmetic overlap; and the partial sums of a pass do not wait for each other.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace lpd {
namespace {

constexpr int kRowSums = 4;  // partial sums of a pass
constexpr int kGroup = 8;    // vectors that a loop works on at a time

// steps(i, j), one after the other, for the vectors of a group, then of the next one. A vector begins at element i and
// adds to partial sum j. Loops that write two rows are faster so than vector by vector: AVX-512, L-256-20 step 15,
// B = 16: 121 us instead of 155 for residual_layer_norm.
template <class... Steps>
inline void for_each_vector(int full, const Steps&... steps) {
  constexpr int kWidth = Vec::kWidth;
  int i = 0;
  const auto for_group = [&](const auto& step) {
    LPD_UNROLL for (int k = 0; k < kGroup; ++k) step(i + k * kWidth, k % kRowSums);
  };
  for (; i + kGroup * kWidth <= full; i += kGroup * kWidth) (for_group(steps), ...);
  for (; i < full; i += kWidth) (steps(i, 0), ...);
}

struct RowSums {
  Vec part[kRowSums];
  RowSums() { LPD_UNROLL for (int j = 0; j < kRowSums; ++j) part[j] = broadcast(0.0f); }
  float total() const { return reduce_add((part[0] + part[1]) + (part[2] + part[3])); }
};

// x = a + b, where `a` may be x.
template <class A, class B>
struct SumRow {
  const A* a;
  const B* b;
  float* x;
  // The hardware prefetcher does not foresee rows of a table, which lie at random. Without vectors this would be a
  // prefetch per element.
  void fetch(int i) const {
    if (Vec::kWidth > 1) __builtin_prefetch(a + i);
  }
  Vec make(int i) const {
    const Vec sum = load(a + i) + load(b + i);
    store(x + i, sum);
    return sum;
  }
  float make_one(int i) const { return x[i] = to_float(a[i]) + to_float(b[i]); }
};

// A row that is there already.
struct GivenRow {
  const float* x;
  void fetch(int) const {}
  Vec make(int i) const { return load(x + i); }
  float make_one(int i) const { return x[i]; }
};

// In place of the next row, after the last.
struct NoRow {
  void fetch(int) const {}
  Vec make(int) const { return broadcast(0.0f); }
  float make_one(int) const { return 0.0f; }
};

// Mean and 1 / deviation; the mean is the sum of two numbers.
struct RowStatistics {
  float mean, rest_mean, inverse_deviation;
};

// Statistics of the row x, whose sum is `total`; fetches `next` into L1 meanwhile.
template <class Next>
RowStatistics row_statistics(const float* x, float total, int width, float eps, const Next& next) {
  const int full = width / Vec::kWidth * Vec::kWidth;
  const float mean = total / static_cast<float>(width);
  const Vec mean_v = broadcast(mean);
  RowSums squares, sums_centred;
  for_each_vector(full, [&](int i, int j) {
    next.fetch(i);
    const Vec centred = load(x + i) - mean_v;
    squares.part[j] = fma(centred, centred, squares.part[j]);
    sums_centred.part[j] = sums_centred.part[j] + centred;
  });
  float total_squares = squares.total(), total_centred = sums_centred.total();
  for (int i = full; i < width; ++i) {
    const float centred = x[i] - mean;
    total_squares += centred * centred;
    total_centred += centred;
  }
  // Rounding left `rest_mean` in the mean; where rows lie far from 0 it would dominate the error.
  const float rest_mean = total_centred / static_cast<float>(width);
  const float variance = total_squares / static_cast<float>(width) - rest_mean * rest_mean;
  // Where squares overflow the row becomes NaN, as torch's does: 0 * inf and inf - inf have to stay. Below 0 is
  // rounding.
  return {mean, rest_mean, 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps) + 0.0f * variance};
}

// out = x normalised, which may be in place; makes `next` meanwhile and returns its sum.
template <class T, class Out, class Next>
float write_row(const float* x, const RowStatistics& s, const T* weight, const T* bias, Out* out, int width,
                const Next& next) {
  const int full = width / Vec::kWidth * Vec::kWidth, rest = width - full;
  const Vec mean = broadcast(s.mean), scale = broadcast(s.inverse_deviation),
            shift = broadcast(-s.rest_mean * s.inverse_deviation);
  RowSums sums;
  for_each_vector(
      full, [&](int i, int j) { sums.part[j] = sums.part[j] + next.make(i); },
      [&](int i, int) {
        store(out + i, fma(fma(load(x + i) - mean, scale, shift), load(weight + i), load(bias + i)));
      });
  float total = sums.total();
  for (int i = full; i < width; ++i) total += next.make_one(i);
  if (rest > 0) {
    const Vec tail = fma(load_partial(x + full, rest) - mean, scale, shift);
    store_partial(out + full, fma(tail, load_partial(weight + full, rest), load_partial(bias + full, rest)), rest);
  }
  return total;
}

// LayerNorm of rows [begin, end): row_at(row) is a SumRow or GivenRow, out_at(row) where its result goes.
template <class T, class RowAt, class OutAt>
void layer_norm_rows(int64_t begin, int64_t end, const T* weight, const T* bias, int width, float eps,
                     const RowAt& row_at, const OutAt& out_at) {
  if (begin >= end) return;
  auto row = row_at(begin);
  const int full = width / Vec::kWidth * Vec::kWidth;
  RowSums sums;
  for_each_vector(full, [&](int i, int j) { sums.part[j] = sums.part[j] + row.make(i); });
  float total = sums.total();
  for (int i = full; i < width; ++i) total += row.make_one(i);
  for (int64_t index = begin; index + 1 < end; ++index) {
    const auto next = row_at(index + 1);
    const RowStatistics statistics = row_statistics(row.x, total, width, eps, next);
    total = write_row(row.x, statistics, weight, bias, out_at(index), width, next);
    row = next;
  }
  const RowStatistics statistics = row_statistics(row.x, total, width, eps, NoRow{});
  write_row(row.x, statistics, weight, bias, out_at(end - 1), width, NoRow{});
}

}  // namespace
}  // namespace lpd
