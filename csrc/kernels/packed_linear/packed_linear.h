// packed_linear: y = x W^T + bias, or GELU of that, for the few rows of a decoding step and weights laid out for it.
#pragma once

#include <atomic>
#include <cstdint>

#include "row_quantization/quantize_rows.h"

namespace lpd {

// Rows and weights are words of four bytes: one float32, two bfloat16, or four bytes of quantised rows and int8
// weights.
enum class LinearOperands { kFloat32, kBFloat16, kInt8 };

// Output channels that lie together. A row of a panel is one word of each, 128 bytes.
constexpr int kLinearPanel = 32;
// Rows of x that share a pass over a panel, those of both planes counted.
constexpr int kLinearRows = 12;
// Words of a row of floats whose sums are kept in registers before they are added to y.
constexpr int kLinearRunWords = 1024;
// Sums of products of bytes stay below 2^31.
constexpr int kLinearMaxInt8Features = 65536;

// Strides in elements; rows are contiguous. Channels beyond N and inputs beyond K are zeros in `weight`.
struct PackedLinearParams {
  const void* x;           // [R, K] of the operands' type; kInt8: bytes [planes * R, K]
  const uint32_t* weight;  // [panels, words, kLinearPanel]
  const void* bias;        // [N] of y's type, or nullptr
  void* y;                 // [R, N], contiguous: float, of kBFloat16 BFloat16
  uint32_t* packed_rows;   // scratch of linear_scratch_words: in blocks of rows, each [words, rows of the block]
  // kInt8: y = sum over planes of row_scale * (scale * product - zero_point * column_sum), and bias once.
  const RowQuantization* quantization;  // [planes * R]
  const float* scale;                   // [N]: weight[n, k] stands for scale[n] * weight[n, k]
  const float* column_sum;              // [N]: scale[n] * sum over k of weight[n, k]
  int64_t x_stride;
  int64_t num_rows;      // R
  int32_t in_features;   // K
  int32_t out_features;  // N
  int32_t planes;        // 1; kInt8: 1 or 2
  bool gelu;
  LinearOperands operands;
  // A call packs and multiplies these words of the rows; sums of the first get the bias, later ones are added to y
  // (kFloat32 only), and those of the last make it whole.
  int32_t first_word, last_word;
  // An item is this many panels and one of the parts of the blocks of rows; workers take items from the counter, so
  // that one that wakes late takes fewer.
  int32_t group_panels;
  int32_t row_parts;
  std::atomic<int64_t>* next_item;
};

constexpr int linear_word_elements(LinearOperands operands) {
  return operands == LinearOperands::kFloat32 ? 1 : operands == LinearOperands::kBFloat16 ? 2 : 4;
}

inline int64_t linear_words(const PackedLinearParams& p) {
  const int elements = linear_word_elements(p.operands);
  return (int64_t{p.in_features} + elements - 1) / elements;
}

// Size of packed_rows, for calls of `words` words each. Kernels that multiply bytes as 16 bits make two words of one.
inline int64_t linear_scratch_words(const PackedLinearParams& p, int64_t words) {
  return p.planes * p.num_rows * words * (p.operands == LinearOperands::kInt8 ? 2 : 1);
}

inline int64_t linear_panels(const PackedLinearParams& p) {
  return (int64_t{p.out_features} + kLinearPanel - 1) / kLinearPanel;
}

// Rows of x in every block but the last: shared out evenly over as few blocks as there can be.
inline int64_t linear_block_rows(const PackedLinearParams& p) {
  const int64_t most = kLinearRows / p.planes, blocks = (p.num_rows + most - 1) / most;
  return (p.num_rows + blocks - 1) / blocks;
}

// Number of work items of pack_linear_rows. R > 0.
inline int64_t linear_blocks(const PackedLinearParams& p) {
  const int64_t rows = linear_block_rows(p);
  return (p.num_rows + rows - 1) / rows;
}

// Number of work items that the workers of packed_linear, which follows, take from next_item.
inline int64_t linear_items(const PackedLinearParams& p) {
  return (linear_panels(p) + p.group_panels - 1) / p.group_panels * p.row_parts;
}

}  // namespace lpd
