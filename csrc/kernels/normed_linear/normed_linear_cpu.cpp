// normed_linear on the CPU.
#include <cmath>

#include "common/cpu_kernels.h"
#include "few_row_product/few_row_product_cpu.h"

namespace lpd::LPD_ISA {
namespace {

template <class T>
void normed_linear_rows(const NormedLinearParams& p, int64_t begin, int64_t end) {
  const int32_t groups = p.depth / 32;
  for (int64_t row = begin; row < end; ++row) {
    const float* const statistics = p.statistics + row * groups * 2;
    float mean = 0.0f, squares = 0.0f;
    for (int32_t g = 0; g < groups; ++g) mean += statistics[2 * g];
    mean /= static_cast<float>(groups);
    for (int32_t g = 0; g < groups; ++g) {
      const float distance = statistics[2 * g] - mean;
      squares += statistics[2 * g + 1] + 32.0f * (distance * distance);
    }
    const float inverse_deviation = 1.0f / std::sqrt(squares / static_cast<float>(p.depth) + p.eps);
    T* const output = static_cast<T*>(p.output) + row * p.num_features;
    for (int32_t n = 0; n < p.num_features; ++n) {
      const float y = (product_at<T>(p, row, n) - mean * p.slope[n]) * inverse_deviation + p.shift[n];
      output[n] = from_float<T>(p.gelu ? 0.5f * y * std::erfc(-0.70710678118654752f * y) : y);
    }
  }
}

}  // namespace

void normed_linear(const NormedLinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype16(p.dtype, [&](auto element) { normed_linear_rows<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
