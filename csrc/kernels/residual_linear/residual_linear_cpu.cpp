// residual_linear on the CPU.
#include "common/cpu_kernels.h"
#include "few_row_product/few_row_product_cpu.h"

namespace lpd::LPD_ISA {
namespace {

template <class T>
void residual_linear_rows(const ResidualLinearParams& p, int64_t begin, int64_t end) {
  const T* const bias = static_cast<const T*>(p.bias);
  const T* const scale = static_cast<const T*>(p.scale);
  for (int64_t row = begin; row < end; ++row) {
    float* const x = p.x + row * p.x_stride;
    T* const scaled = static_cast<T*>(p.scaled) + row * p.num_features;
    for (int32_t n = 0; n < p.num_features; ++n) {
      x[n] += product_at<T>(p, row, n) + (bias == nullptr ? 0.0f : to_float(bias[n]));
    }
    scale_row(x, scale, p.num_features, scaled, p.statistics + row * p.num_features / kStatisticsColumns * 2);
  }
}

}  // namespace

void residual_linear(const ResidualLinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype16(p.dtype, [&](auto element) { residual_linear_rows<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
