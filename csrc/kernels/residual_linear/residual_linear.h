// residual_linear: x += rows W^T + bias, in fp32, and what a LayerNorm that follows needs of the sum: x * scale in the
// compute dtype, and mean and squared deviations of every 32 columns. So the LayerNorm is left to normed_linear, which
// takes both and does the rest in its own epilogue.
#pragma once

#include "common/row_statistics.h"
#include "few_row_product/few_row_product.h"

namespace lpd {

struct ResidualLinearParams : FewRowProduct {  // N, the width of x, is a multiple of 32
  float* x;                                    // [R, N]
  const void* bias;                            // [N] in dtype, or nullptr
  const void* scale;                           // [N] in dtype, the weight of the LayerNorm
  void* scaled;                                // [R, N] in dtype, contiguous
  float* statistics;                           // [R, N / 32, 2]: mean, and sum of squared deviations from it
  int64_t x_stride;
};

// On CUDA, asynchronously on a cudaStream_t. Rows of all arrays must begin at multiples of 16 bytes.
void launch_residual_linear(const ResidualLinearParams& params, void* stream);

}  // namespace lpd
