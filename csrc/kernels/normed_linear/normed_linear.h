// normed_linear: LayerNorm(x) W^T + bias, or GELU of it, of what residual_linear left of x: scaled = x * gamma, and
// statistics. With slope = W gamma and shift = W beta + bias (fold_layer_norm) it is
// (scaled W^T - mean * slope) / deviation + shift.
#pragma once

#include "few_row_product/few_row_product.h"

namespace lpd {

struct NormedLinearParams : FewRowProduct {  // rows: scaled
  const float* statistics;                   // [R, K / 32, 2]: mean and sum of squared deviations of every 32 columns
  const float* slope;                        // [N]
  const float* shift;                        // [N]
  void* output;                              // [R, N] in dtype, contiguous
  float eps;
  bool gelu;
};

// On CUDA, asynchronously on a cudaStream_t. Rows of all arrays must begin at multiples of 16 bytes.
void launch_normed_linear(const NormedLinearParams& params, void* stream);

}  // namespace lpd
