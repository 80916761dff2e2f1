// dequantize_rows and gelu_quantize_rows on the CPU. Limited by bandwidth: the product is read, and written once.
#include "common/cpu_kernels.h"
#include "row_quantization/quantize_row.h"

namespace lpd::LPD_ISA {
namespace {

// x * Phi(x) by erfc of Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
Vec gelu(Vec x) {
  const Vec zero = broadcast(0.0f), size = max(x, zero - x);
  const Vec a = size * broadcast(0.70710678f);
  const Vec t = broadcast(1.0f) / fma(a, broadcast(0.3275911f), broadcast(1.0f));
  Vec poly = broadcast(1.061405429f);
  poly = fma(poly, t, broadcast(-1.453152027f));
  poly = fma(poly, t, broadcast(1.421413741f));
  poly = fma(poly, t, broadcast(-0.284496736f));
  poly = fma(poly, t, broadcast(0.254829592f));
  const Vec erfc = poly * t * exp_nonpositive(zero - a * a);
  const Vec half = broadcast(0.5f);
  return fma(size, half - erfc * half, x * half);
}

Vec identity(Vec y) { return y; }

template <class Activation>
void dequantize_row(const DequantizeRowsParams& p, int64_t row, Activation activation) {
  constexpr int kWidth = Vec::kWidth;
  const int full = p.width / kWidth * kWidth, rest = p.width - full;
  float* product = p.product + row * p.product_stride;
  const Vec scale = broadcast(p.quantization[row].scale);
  const Vec minus_zero_point = broadcast(-p.quantization[row].zero_point);
  const auto value = [&](Vec sum, Vec column_sum, Vec bias) {
    return activation(fma(fma(minus_zero_point, column_sum, sum), scale, bias));
  };
  const Vec zero = broadcast(0.0f);
  for (int i = 0; i < full; i += kWidth) {
    store(product + i, value(load(product + i), load(p.column_sum + i), p.bias ? load(p.bias + i) : zero));
  }
  if (rest > 0) {
    const Vec bias = p.bias ? load_partial(p.bias + full, rest) : zero;
    store_partial(product + full,
                  value(load_partial(product + full, rest), load_partial(p.column_sum + full, rest), bias), rest);
  }
}

}  // namespace

void dequantize_rows(const DequantizeRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) dequantize_row(p, row, identity);
}

void gelu_quantize_rows(const GeluQuantizeRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    dequantize_row(p.rows, row, gelu);
    p.quantization[row] = quantize_row(p.rows.product + row * p.rows.product_stride, p.quantized + row * p.rows.width,
                                       p.rows.width, p.levels, p.rotate);
  }
}

}  // namespace lpd::LPD_ISA
