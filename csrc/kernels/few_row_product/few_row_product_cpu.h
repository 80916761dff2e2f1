// The same product on the CPU, for tests and for what few rows a CPU is given: simple, not fast. packed_linear is what
// decodes on a CPU use.
#pragma once

#include "few_row_product/few_row_product.h"

namespace lpd {
namespace {

// rows[row] W^T of one feature, in sixteen sums.
template <class T>
float product_at(const FewRowProduct& p, int64_t row, int64_t feature) {
  constexpr int kLanes = 16;
  const T* const x = static_cast<const T*>(p.rows) + row * p.rows_stride;
  const T* const w = static_cast<const T*>(p.weight) + feature * p.weight_stride;
  float sums[kLanes] = {};
  for (int32_t k = 0; k < p.depth; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) sums[i] += to_float(x[k + i]) * to_float(w[k + i]);
  }
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    for (int i = 0; i < lanes; ++i) sums[i] += sums[i + lanes];
  }
  return sums[0];
}

}  // namespace
}  // namespace lpd
