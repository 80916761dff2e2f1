// residual_layer_norm on the CPU: each row is read from memory once; the statistics passes hit L1. Limited by
// bandwidth: 4E bytes of x read and written, delta read, normed written.
#include "common/cpu_kernels.h"
#include "common/layer_norm_row.h"

namespace lpd::LPD_ISA {
namespace {

template <class T>
void residual_layer_norm_rows(const ResidualLayerNormParams& p, int64_t begin, int64_t end) {
  constexpr int kWidth = Vec::kWidth;
  const int full = p.width / kWidth * kWidth;
  for (int64_t row = begin; row < end; ++row) {
    float* x = p.x + row * p.x_stride;
    if (p.delta != nullptr) {
      const T* delta = static_cast<const T*>(p.delta) + row * p.delta_stride;
      for (int i = 0; i < full; i += kWidth) store(x + i, load(x + i) + load(delta + i));
      for (int i = full; i < p.width; ++i) x[i] += to_float(delta[i]);
    }
    layer_norm_row(x, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias),
                   static_cast<T*>(p.normed) + row * p.width, p.width, p.eps);
  }
}

}  // namespace

void residual_layer_norm(const ResidualLayerNormParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32: return residual_layer_norm_rows<float>(p, begin, end);
    case DType::kBFloat16: return residual_layer_norm_rows<BFloat16>(p, begin, end);
    case DType::kFloat16: return residual_layer_norm_rows<Float16>(p, begin, end);
  }
}

}  // namespace lpd::LPD_ISA
