// fold_layer_norm: what a LayerNorm's weight and bias are to the linear layer that follows: slope = W gamma and
// shift = W beta + bias, in fp32, as normed_linear takes them.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace lpd {

struct FoldLayerNormParams {
  const void* weight;  // [N, K] in dtype, of 16 bits
  const void* gamma;   // [K] in dtype
  const void* beta;    // [K] in dtype
  const void* bias;    // [N] in dtype, or nullptr
  float* slope;        // [N]
  float* shift;        // [N]
  int64_t weight_stride;
  int32_t num_features;  // N
  int32_t depth;         // K, a multiple of 32
  DType dtype;
};

// On CUDA, asynchronously on a cudaStream_t. Rows of all arrays must begin at multiples of 16 bytes.
void launch_fold_layer_norm(const FoldLayerNormParams& params, void* stream);

}  // namespace lpd
