// embed_rows: token rows of a step, x = LayerNorm(content[content_id] + position_embedding[position]).
// embed_scaled_rows: the same, and what normed_linear takes of x, as residual_linear leaves it.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace lpd {

// Strides in elements; rows are contiguous. Tables and LayerNorm parameters share one dtype, x is the fp32 residual
// stream.
struct EmbedRowsParams {
  const int64_t* content_ids;      // [R] or, with content_index, [C]; each in [0, M)
  const int64_t* positions;        // [R] or, with position_index, [P]; each in [0, 1 + N)
  const int64_t* content_index;    // [R], in [0, C): where a row's id lies; nullptr: at the row itself
  const int64_t* position_index;   // [R], in [0, P)
  const void* content;             // [M, E], not empty if there are rows; neither is the next
  const void* position_embedding;  // [1 + N, E]
  const void* weight;              // [E]
  const void* bias;                // [E]
  float* x;                        // [R, E], contiguous
  const void* scale;               // [E], the weight of the LayerNorm that follows; nullptr: without the next two
  void* scaled;                    // [R, E] in dtype, of 16 bits, contiguous: x * scale
  float* statistics;               // [R, E / 32, 2], of every 32 columns of x
  int64_t content_stride;
  int64_t position_stride;
  int64_t num_rows;
  int64_t num_content_ids;   // C
  int64_t num_position_ids;  // P
  int64_t num_contents;
  int64_t num_positions;
  int32_t width;  // E
  float eps;
  DType dtype;
};

// The id of a row, or -1 where its index is outside the ids.
LPD_HOST_DEVICE inline int64_t id_of(const int64_t* ids, const int64_t* index, int64_t num_ids, int64_t row) {
  const int64_t at = index == nullptr ? row : index[row];
  return at >= 0 && at < num_ids ? ids[at] : -1;
}

// On CUDA, asynchronously on a cudaStream_t; an index or an id outside its table gives a row of NaN. With a scale, E is
// a multiple of 32 and rows of all arrays begin at multiples of 16 bytes.
void launch_embed_rows(const EmbedRowsParams& params, void* stream);

}  // namespace lpd
