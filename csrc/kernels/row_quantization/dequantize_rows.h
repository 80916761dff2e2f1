// dequantize_rows: what an integer matrix product of quantised rows means, in place.
// gelu_quantize_rows: GELU of that, quantised again for the next product.
#pragma once

#include <cstdint>

#include "row_quantization/quantize_rows.h"

namespace lpd {

// y = scale * (product - zero_point * column_sum) + bias, for product[r, n] = sum_k byte[r, k] * weight[n, k]; with two
// planes, the sum of that of rows r and R + r, and bias once. Strides in elements; rows are contiguous.
struct DequantizeRowsParams {
  float* product;                       // [planes * R, N]; y is written to its first R rows
  const RowQuantization* quantization;  // [planes * R]
  const float* column_sum;              // [N]: sum over k of weight[n, k]
  const float* bias;                    // [N] or nullptr
  int64_t product_stride;
  int64_t num_rows;  // R
  int32_t planes;    // 1 or 2
  int32_t width;     // N
};

struct GeluQuantizeRowsParams {
  DequantizeRowsParams rows;  // gelu(y) is left in their product, never rotated
  RowBytes out;               // of gelu(y)
};

}  // namespace lpd
