// quantize_rows: rounds each row of activations to bytes with a scale and a zero point of its own, from its range; as
// it is, or rotated, which spreads outliers over the row and makes the steps smaller.
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

// Where the bytes of rows go, and how they are made. With two planes a value is the sum of the values of its bytes in
// rows r and R + r: the second holds the rounding error of the first.
struct RowBytes {
  uint8_t* quantized;             // [planes * R, K], contiguous
  RowQuantization* quantization;  // [planes * R]
  int64_t num_rows;               // R
  int32_t planes;                 // 1 or 2
  int32_t levels;                 // the largest byte
  bool rotate;                    // K is then a multiple of kRotation
};

// Strides in elements; rows are contiguous.
struct QuantizeRowsParams {
  const void* x;  // [R, K]
  RowBytes out;
  int64_t x_stride;
  int32_t width;  // K
  DType dtype;    // of x
};

}  // namespace lpd
