// Linear layers of few rows between which a LayerNorm is folded away, in 16 bits, on CPU and CUDA: checks and dispatch,
// as ops.cpp has them for the others.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "checks.h"
#include "common/cpu_kernels.h"
#include "execute.h"
#include "written.h"

// A macro of our own, so that the namespace is expanded before torch's macros make names of it.
#define LPD_LIBRARY_IMPL(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace {

using namespace lpd::checks;
using lpd::execution::execute;
using lpd::execution::on_cuda_kernels;

lpd::DType dtype16(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::BFloat16 || type == ScalarType::Half, name, " must be bfloat16 or float16, got ",
        dtype_text(type));
  return float_dtype(t, name);
}

// weight [N, K], of the dtype and device of `first`, in which N and K are multiples of these; its sizes.
struct Sizes {
  int32_t features, depth;
};
Sizes check_weight(const Tensor& weight, const Tensor& first, int64_t depth, int64_t features_of) {
  check_device(weight, "weight", first);
  check_dtype(weight, "weight", first.scalar_type());
  check_shape(weight, "weight", "[N, K]", {-1, depth});
  check_rows_contiguous(weight, "weight");
  check(weight.size(0) % features_of == 0, "weight: N must be a multiple of ", features_of, ", got ", weight.size(0));
  check(weight.size(1) > 0 && weight.size(1) % 32 == 0, "weight: K must be a multiple of 32, got ", weight.size(1));
  return {size32(weight.size(0), "weight: N"), size32(weight.size(1), "weight: K")};
}

lpd::FewRowProduct product(const Tensor& rows, const char* name, const Tensor& weight, int64_t features_of) {
  lpd::FewRowProduct p{};
  p.dtype = dtype16(rows, name);
  check_shape(rows, name, "[R, K]", {-1, -1});
  check_rows_contiguous(rows, name);
  const auto [features, depth] = check_weight(weight, rows, rows.size(1), features_of);
  if (on_cuda_kernels(rows)) {
    check_cuda_rows(rows, name);
    check_cuda_rows(weight, "weight");
  }
  p.rows = rows.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.rows_stride = rows.stride(0);
  p.weight_stride = weight.stride(0);
  p.num_rows = size32(rows.size(0), text(name, ": R").c_str());
  p.num_features = features;
  p.depth = depth;
  return p;
}

double row_cost(const lpd::FewRowProduct& p) { return 0.5 * p.num_features * p.depth; }

std::tuple<Tensor, Tensor> residual_linear(const Tensor& x, const Tensor& rows, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& scale) {
  lpd::ResidualLinearParams params{};
  static_cast<lpd::FewRowProduct&>(params) = product(rows, "rows", weight, lpd::kStatisticsColumns);
  const int64_t num_rows = params.num_rows, features = params.num_features;
  check_device(x, "x", rows);
  check_dtype(x, "x", ScalarType::Float);
  check_shape(x, "x", "[R, N]", {num_rows, features});
  check_rows_contiguous(x, "x");
  if (bias.has_value()) check_array(*bias, "bias", rows, rows.scalar_type(), "[N]", {features});
  check_array(scale, "scale", rows, rows.scalar_type(), "[N]", {features});
  if (on_cuda_kernels(rows)) {
    check_cuda_rows(x, "x");
    if (bias.has_value()) check_cuda_rows(*bias, "bias");
    check_cuda_rows(scale, "scale");
  }
  check_written(
      {written(x, "x"), read(rows, "rows"), read(weight, "weight"), read(bias, "bias"), read(scale, "scale")});
  Tensor scaled = torch::stable::new_empty(rows, {num_rows, features});
  Tensor statistics =
      torch::stable::new_empty(rows, {num_rows, features / lpd::kStatisticsColumns, 2}, ScalarType::Float);
  mark_written({written(x, "x")});
  params.x = static_cast<float*>(x.mutable_data_ptr());
  params.bias = optional_data<void>(bias);
  params.scale = scale.const_data_ptr();
  params.scaled = scaled.mutable_data_ptr();
  params.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  params.x_stride = x.stride(0);
  execute(rows, params, LPD_LAUNCHER(launch_residual_linear), lpd::cpu_kernels().residual_linear, num_rows,
          row_cost(params));
  return {scaled, statistics};
}

Tensor normed_linear(const Tensor& scaled, const Tensor& statistics, const Tensor& weight, const Tensor& slope,
                     const Tensor& shift, double eps, bool gelu) {
  lpd::NormedLinearParams params{};
  static_cast<lpd::FewRowProduct&>(params) = product(scaled, "scaled", weight, 8);
  const int64_t num_rows = params.num_rows, features = params.num_features;
  check_array(statistics, "statistics", scaled, ScalarType::Float, "[R, K / 32, 2]", {num_rows, params.depth / 32, 2});
  check_array(slope, "slope", scaled, ScalarType::Float, "[N]", {features});
  check_array(shift, "shift", scaled, ScalarType::Float, "[N]", {features});
  if (on_cuda_kernels(scaled)) {
    check_cuda_rows(slope, "slope");
    check_cuda_rows(shift, "shift");
    check(reinterpret_cast<uintptr_t>(statistics.const_data_ptr()) % 8 == 0,
          "statistics must begin at a multiple of 8 bytes");
  }
  params.eps = finite32(eps, "eps");
  Tensor output = torch::stable::new_empty(scaled, {num_rows, features});
  params.statistics = static_cast<const float*>(statistics.const_data_ptr());
  params.slope = static_cast<const float*>(slope.const_data_ptr());
  params.shift = static_cast<const float*>(shift.const_data_ptr());
  params.output = output.mutable_data_ptr();
  params.gelu = gelu;
  execute(scaled, params, LPD_LAUNCHER(launch_normed_linear), lpd::cpu_kernels().normed_linear, num_rows,
          row_cost(params));
  return output;
}

std::tuple<Tensor, Tensor> fold_layer_norm(const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                                           const OptionalTensor& bias) {
  lpd::FoldLayerNormParams params{};
  params.dtype = dtype16(weight, "weight");
  const auto [features, depth] = check_weight(weight, weight, -1, 1);
  check_array(gamma, "gamma", weight, weight.scalar_type(), "[K]", {depth});
  check_array(beta, "beta", weight, weight.scalar_type(), "[K]", {depth});
  if (bias.has_value()) check_array(*bias, "bias", weight, weight.scalar_type(), "[N]", {features});
  if (on_cuda_kernels(weight)) {
    check_cuda_rows(weight, "weight");
    check_cuda_rows(gamma, "gamma");
    check_cuda_rows(beta, "beta");
  }
  Tensor slope = torch::stable::new_empty(weight, {features}, ScalarType::Float);
  Tensor shift = torch::stable::new_empty(weight, {features}, ScalarType::Float);
  params.weight = weight.const_data_ptr();
  params.gamma = gamma.const_data_ptr();
  params.beta = beta.const_data_ptr();
  params.bias = optional_data<void>(bias);
  params.slope = static_cast<float*>(slope.mutable_data_ptr());
  params.shift = static_cast<float*>(shift.mutable_data_ptr());
  params.weight_stride = weight.stride(0);
  params.num_features = features;
  params.depth = depth;
  execute(weight, params, LPD_LAUNCHER(launch_fold_layer_norm), lpd::cpu_kernels().fold_layer_norm, features,
          1.0 * depth);
  return {slope, shift};
}

template <class Library>
void register_operators(Library& m) {
  m.impl("residual_linear", TORCH_BOX(&residual_linear));
  m.impl("normed_linear", TORCH_BOX(&normed_linear));
  m.impl("fold_layer_norm", TORCH_BOX(&fold_layer_norm));
}

}  // namespace

LPD_LIBRARY_IMPL(LPD_OPERATOR_NAMESPACE, CPU, m) { register_operators(m); }
#ifdef LPD_WITH_CUDA
LPD_LIBRARY_IMPL(LPD_OPERATOR_NAMESPACE, CUDA, m) { register_operators(m); }
#endif
