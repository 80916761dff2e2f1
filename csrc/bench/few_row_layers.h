// The linear layers of lpd_l that products of few rows stand for, and how many weights a benchmark takes in turn: a
// decode reads each layer's from memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bench_shapes.h"

namespace lpd::bench {

struct Layer {
  int32_t features, depth;  // N, K
  bool gelu;

  int64_t weights() const { return int64_t{features} * depth; }
  // At least one for each of 24 layers, and more than any cache holds.
  int weights_in_turn() const {
    return static_cast<int>(std::max<int64_t>(24, (int64_t{128} << 20) / (2 * weights())));
  }
  double flops(int64_t rows) const { return 2.0 * static_cast<double>(rows) * features * depth; }
};

constexpr Layer kQkv{3 * kWidth, kWidth, false}, kProj{kWidth, kWidth, false}, kFc1{4 * kWidth, kWidth, true},
    kFc2{kWidth, 4 * kWidth, false}, kHead{kVocab, kWidth, false};

// Those of a step's context and query rows, with guidance.
inline int64_t rows_of(const Shape& shape, int64_t batch) { return 2 * batch * (shape.num_context + shape.num_query); }

}  // namespace lpd::bench
