// quantize_rows: each row of activations as bytes with a scale and a zero point of its own, chosen from what it holds;
// as it is, or rotated, which spreads outliers over the row, so that the steps get smaller.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace lpd {

// A rotated row is that of kRotation equal slices after a Hadamard transform over them (Sylvester's order, not scaled).
constexpr int kRotation = 64;

// x ~ scale * (byte - zero_point). The range covers 0, and zero_point is a whole number, so 0 is exact.
struct RowQuantization {
  float scale;  // NaN if the row has an infinity or a NaN
  float zero_point;
};

// Strides in elements; rows are contiguous.
struct QuantizeRowsParams {
  const void* x;                  // [R, K]
  uint8_t* quantized;             // [R, K], contiguous
  RowQuantization* quantization;  // [R]
  int64_t x_stride;
  int64_t num_rows;
  int32_t width;   // K
  int32_t levels;  // the largest byte
  bool rotate;     // K is then a multiple of kRotation
  DType dtype;     // of x
};

}  // namespace lpd
