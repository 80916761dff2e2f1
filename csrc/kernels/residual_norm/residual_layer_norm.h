// residual_layer_norm: x += delta, then LayerNorm(x) into the compute dtype; the residual stream stays fp32.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace lpd {

// Strides in elements; rows are contiguous.
struct ResidualLayerNormParams {
  float* x;            // [R, E]; written only where delta is given
  const void* delta;   // [R, E] in dtype, or nullptr
  const void* weight;  // [E] in dtype
  const void* bias;    // [E] in dtype
  void* normed;        // [R, E] in dtype, contiguous
  int64_t x_stride;
  int64_t delta_stride;
  int64_t num_rows;
  int32_t width;  // E
  float eps;
  DType dtype;
};

// On CUDA, asynchronously on a cudaStream_t.
void launch_residual_layer_norm(const ResidualLayerNormParams& params, void* stream);

}  // namespace lpd
