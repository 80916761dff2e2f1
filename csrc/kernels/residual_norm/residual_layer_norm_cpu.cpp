// residual_layer_norm on the CPU: each row is read from memory once; the other passes hit L1. Limited by bandwidth: 4E
// bytes of x read and written, delta read, normed written.
#include "common/cpu_kernels.h"
#include "common/layer_norm_row.h"

namespace lpd::LPD_ISA {
namespace {

template <class T>
void residual_layer_norm_rows(const ResidualLayerNormParams& p, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias);
  const auto out_at = [&](int64_t row) { return static_cast<T*>(p.normed) + row * p.width; };
  const auto given_at = [&](int64_t row) { return GivenRow{p.x + row * p.x_stride}; };
  const auto sum_at = [&](int64_t row) {
    float* x = p.x + row * p.x_stride;
    return SumRow<float, T>{x, static_cast<const T*>(p.delta) + row * p.delta_stride, x};
  };
  if (p.delta == nullptr) return layer_norm_rows(begin, end, weight, bias, p.width, p.eps, given_at, out_at);
  layer_norm_rows(begin, end, weight, bias, p.width, p.eps, sum_at, out_at);
}

}  // namespace

void residual_layer_norm(const ResidualLayerNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto element) { residual_layer_norm_rows<decltype(element)>(p, begin, end); });
}

}  // namespace lpd::LPD_ISA
