// embed_rows: token rows of a step, x = LayerNorm(content[content_id] + position_embedding[position]).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace lpd {

// Strides in elements; rows are contiguous. Tables and LayerNorm parameters share one dtype, x is the fp32 residual
// stream.
struct EmbedRowsParams {
  const int64_t* content_ids;      // [R], each in [0, M)
  const int64_t* positions;        // [R], each in [0, 1 + N)
  const void* content;             // [M, E], not empty if there are rows; neither is the next
  const void* position_embedding;  // [1 + N, E]
  const void* weight;              // [E]
  const void* bias;                // [E]
  float* x;                        // [R, E], contiguous
  int64_t content_stride;
  int64_t position_stride;
  int64_t num_rows;
  int64_t num_contents;
  int64_t num_positions;
  int32_t width;  // E
  float eps;
  DType dtype;
};

// On CUDA, asynchronously on a cudaStream_t; an index outside its table gives a row of NaN.
void launch_embed_rows(const EmbedRowsParams& params, void* stream);

}  // namespace lpd
