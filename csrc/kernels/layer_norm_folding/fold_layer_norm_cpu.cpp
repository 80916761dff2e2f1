// fold_layer_norm on the CPU.
#include "common/cpu_kernels.h"
#include "few_row_product/few_row_product_cpu.h"

namespace lpd::LPD_ISA {

void fold_layer_norm(const FoldLayerNormParams& p, int64_t begin, int64_t end) {
  const FewRowProduct gamma{p.gamma, p.weight, 0, p.weight_stride, 1, p.num_features, p.depth, p.dtype};
  FewRowProduct beta = gamma;
  beta.rows = p.beta;
  dispatch_dtype16(p.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t n = begin; n < end; ++n) {
      p.slope[n] = product_at<T>(gamma, 0, n);
      p.shift[n] = product_at<T>(beta, 0, n) + (p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[n]));
    }
  });
}

}  // namespace lpd::LPD_ISA
