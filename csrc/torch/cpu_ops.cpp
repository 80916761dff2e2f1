// Operators of the CPU's own decoding path: schemas, checks and dispatch, as ops.cpp has them for the others.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "common/cpu_kernels.h"
#include "execute.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lpd_ext, m) {
  m.def("quantize_rows(Tensor x, int levels) -> (Tensor, Tensor)");
  m.def("dequantize_rows(Tensor(a!) product, Tensor quantization, Tensor column_sum, Tensor? bias) -> ()");
  m.def(
      "gelu_quantize_rows(Tensor(a!) product, Tensor quantization, Tensor column_sum, Tensor? bias, int levels) -> "
      "(Tensor, Tensor)");
}

namespace {

using namespace lpd::checks;
using lpd::execution::execute;
using OptionalTensor = std::optional<Tensor>;
using Quantized = std::tuple<Tensor, Tensor>;

int32_t width_of(const Tensor& t, const char* name) {
  check_bound(t.size(1), name);
  return static_cast<int32_t>(t.size(1));
}

int32_t checked_levels(int64_t levels) {
  check(levels >= 1 && levels <= 255, "levels must be in [1, 255], got ", levels);
  return static_cast<int32_t>(levels);
}

Quantized empty_quantized(const Tensor& rows) {
  return {torch::stable::new_empty(rows, {rows.size(0), rows.size(1)}, ScalarType::Byte),
          torch::stable::new_empty(rows, {rows.size(0), 2}, ScalarType::Float)};
}

lpd::RowQuantization* quantization_data(const Tensor& quantization) {
  return static_cast<lpd::RowQuantization*>(quantization.mutable_data_ptr());
}

Quantized quantize_rows(const Tensor& x, int64_t levels) {
  lpd::QuantizeRowsParams params{};
  params.dtype = float_dtype(x, "x");
  check_shape(x, "x", "[R, K]", {-1, -1});
  check_rows_contiguous(x, "x");
  params.levels = checked_levels(levels);
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.num_rows = x.size(0);
  params.width = width_of(x, "x: K");
  const Quantized result = empty_quantized(x);
  params.quantized = static_cast<uint8_t*>(std::get<0>(result).mutable_data_ptr());
  params.quantization = quantization_data(std::get<1>(result));
  execute(x, params, nullptr, lpd::cpu_kernels().quantize_rows, params.num_rows, 0.2 * params.width);
  return result;
}

lpd::DequantizeRowsParams dequantize_params(const Tensor& product, const Tensor& quantization, const Tensor& column_sum,
                                            const OptionalTensor& bias) {
  check_dtype(product, "product", ScalarType::Float);
  check_shape(product, "product", "[R, N]", {-1, -1});
  check_rows_contiguous(product, "product");
  check_distinct_rows(product, "product");
  check_array(quantization, "quantization", product, ScalarType::Float, "[R, 2]", {product.size(0), 2});
  check_array(column_sum, "column_sum", product, ScalarType::Float, "[N]", {product.size(1)});
  if (bias.has_value()) check_array(*bias, "bias", product, ScalarType::Float, "[N]", {product.size(1)});
  lpd::DequantizeRowsParams params{};
  params.product = static_cast<float*>(product.mutable_data_ptr());
  params.quantization = static_cast<const lpd::RowQuantization*>(quantization.const_data_ptr());
  params.column_sum = static_cast<const float*>(column_sum.const_data_ptr());
  params.bias = bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  params.product_stride = product.stride(0);
  params.num_rows = product.size(0);
  params.width = width_of(product, "product: N");
  return params;
}

void dequantize_rows(const Tensor& product, const Tensor& quantization, const Tensor& column_sum,
                     const OptionalTensor& bias) {
  const lpd::DequantizeRowsParams params = dequantize_params(product, quantization, column_sum, bias);
  execute(product, params, nullptr, lpd::cpu_kernels().dequantize_rows, params.num_rows, 0.3 * params.width);
}

Quantized gelu_quantize_rows(const Tensor& product, const Tensor& quantization, const Tensor& column_sum,
                             const OptionalTensor& bias, int64_t levels) {
  lpd::GeluQuantizeRowsParams params{};
  params.rows = dequantize_params(product, quantization, column_sum, bias);
  params.levels = checked_levels(levels);
  const Quantized result = empty_quantized(product);
  params.quantized = static_cast<uint8_t*>(std::get<0>(result).mutable_data_ptr());
  params.quantization = quantization_data(std::get<1>(result));
  execute(product, params, nullptr, lpd::cpu_kernels().gelu_quantize_rows, params.rows.num_rows,
          1.0 * params.rows.width);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lpd_ext, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("dequantize_rows", TORCH_BOX(&dequantize_rows));
  m.impl("gelu_quantize_rows", TORCH_BOX(&gelu_quantize_rows));
}
