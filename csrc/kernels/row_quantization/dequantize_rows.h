// dequantize_rows: what an integer matrix product of quantised rows means, in place.
// gelu_quantize_rows: GELU of that, quantised again for the next product.
#pragma once

#include <cstdint>

#include "row_quantization/quantize_rows.h"

namespace lpd {

// y = scale * (product - zero_point * column_sum) + bias, for product[r, n] = sum_k byte[r, k] * weight[n, k]. Strides
// in elements; rows are contiguous.
struct DequantizeRowsParams {
  float* product;                       // [R, N]; y is written in its place
  const RowQuantization* quantization;  // [R]
  const float* column_sum;              // [N]: sum over k of weight[n, k]
  const float* bias;                    // [N] or nullptr
  int64_t product_stride;
  int64_t num_rows;
  int32_t width;  // N
};

struct GeluQuantizeRowsParams {
  DequantizeRowsParams rows;      // gelu(y) is left in their product
  uint8_t* quantized;             // [R, N], contiguous: of gelu(y)
  RowQuantization* quantization;  // [R]: of gelu(y)
  int32_t levels;                 // the largest byte
  bool rotate;                    // as of QuantizeRowsParams: the bytes, not what is left in product
};

}  // namespace lpd
