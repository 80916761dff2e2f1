// training_attention: the attention of the teacher-forced pass and its gradient, from the sizes of the groups alone.
// Rows are 1 + N - m_last context rows, then N query rows. Context block i (the condition is block 0, group t block
// t + 1) sees context blocks <= i; query group t sees context blocks <= t and its own group, or each query row itself
// alone.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace lpd {

// All strides are in elements. The innermost dimension (D) is contiguous everywhere.
struct TrainingAttentionParams {
  const void* qkv;             // [B, rows, 3, H, D]
  void* output;                // [B, rows, H * D], contiguous; the backward pass reads it
  float* logsumexp;            // [B, H, rows]: log of the sum of exp(scale * q k^T) over the keys of a row; as output
  const void* grad_output;     // [B, rows, H * D], contiguous; backward only, as grad_qkv
  void* grad_qkv;              // [B, rows, 3, H, D], contiguous
  const int32_t* group_sizes;  // [T]
  float* workspace;            // training_attention_workspace_floats for each worker
  int64_t qkv_image_stride;
  int64_t qkv_row_stride;
  int64_t qkv_part_stride;  // from q to k to v
  int64_t qkv_head_stride;
  int64_t workspace_stride;  // from worker to worker
  int32_t batch;
  int32_t rows;
  int32_t num_heads;
  int32_t head_dim;  // a multiple of 8
  int32_t num_steps;
  int32_t workers;  // items of both kernels; worker w takes heads w, w + workers, ... of all images
  float scale;
  bool mutual_visibility;
  DType dtype;
};

constexpr int32_t kTrainingAttentionMaxHeadDim = 256;
constexpr int32_t kTrainingTileRows = 96;     // rows that share one pass over the keys
constexpr int32_t kTrainingTileStride = 272;  // of every tile's rows: see kScratchStride of group_attention_cpu.cpp
constexpr int32_t kTrainingAlignment = 16;    // floats: a cache line, and the longest vector

inline int64_t training_attention_padded(int64_t count) {
  return (count + kTrainingAlignment - 1) / kTrainingAlignment * kTrainingAlignment;
}

// Row stride of the transposed keys: a vector of columns after the last one can be read, and the odd number of cache
// lines spreads the rows over the sets of L1.
inline int64_t training_attention_key_stride(int64_t rows) {
  const int64_t lines = training_attention_padded(rows) / kTrainingAlignment + 1;
  return (lines | 1) * kTrainingAlignment;
}

inline int64_t training_attention_workspace_floats(int64_t rows, int64_t head_dim, bool backward) {
  const int64_t transposed = training_attention_key_stride(rows) * head_dim;
  const int64_t matrix = training_attention_padded(rows) * training_attention_padded(head_dim);
  const int64_t tile = int64_t{kTrainingTileRows} * kTrainingTileStride;
  return backward ? 2 * transposed + 3 * matrix + 5 * tile : transposed + matrix + 3 * tile;
}

}  // namespace lpd
