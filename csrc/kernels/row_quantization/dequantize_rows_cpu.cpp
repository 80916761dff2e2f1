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
  const auto part = [&](int64_t plane_row, Vec sum, Vec column_sum, Vec added) {
    const RowQuantization& of = p.quantization[plane_row];
    return fma(fma(broadcast(-of.zero_point), column_sum, sum), broadcast(of.scale), added);
  };
  const int64_t fine_row = p.planes == 2 ? p.num_rows + row : -1;
  const float* fine = fine_row < 0 ? nullptr : p.product + fine_row * p.product_stride;
  const Vec zero = broadcast(0.0f);
  for (int i = 0; i < full; i += kWidth) {
    const Vec column_sum = load(p.column_sum + i);
    Vec added = p.bias ? load(p.bias + i) : zero;
    if (fine) added = part(fine_row, load(fine + i), column_sum, added);
    store(product + i, activation(part(row, load(product + i), column_sum, added)));
  }
  if (rest > 0) {
    const Vec column_sum = load_partial(p.column_sum + full, rest);
    Vec added = p.bias ? load_partial(p.bias + full, rest) : zero;
    if (fine) added = part(fine_row, load_partial(fine + full, rest), column_sum, added);
    store_partial(product + full, activation(part(row, load_partial(product + full, rest), column_sum, added)), rest);
  }
}

}  // namespace

void dequantize_rows(const DequantizeRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) dequantize_row(p, row, identity);
}

void gelu_quantize_rows(const GeluQuantizeRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    dequantize_row(p.rows, row, gelu);
    quantize_row(p.rows.product + row * p.rows.product_stride, p.rows.width, p.out, row);
  }
}

}  // namespace lpd::LPD_ISA
