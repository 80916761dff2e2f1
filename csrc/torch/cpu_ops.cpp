// Operators that only the CPU has kernels for: checks and dispatch, as ops.cpp has them for the others.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "checks.h"
#include "common/cpu_kernels.h"
#include "execute.h"
#include "written.h"

namespace {

using namespace lpd::checks;
using lpd::execution::execute_on_cpu;
using Quantized = std::tuple<Tensor, Tensor>;

// Of preview_pixels: sides of a cell in pixels, and channels. Sums and products of a few of them fit 32 bits.
constexpr int64_t kMostPixelsOfCell = 1024, kMostChannels = 1 << 20;

// ---- quantize_rows ----

Quantized quantize_rows(const Tensor& x, int64_t levels, bool rotate, int64_t planes) {
  lpd::QuantizeRowsParams params{};
  params.dtype = float_dtype(x, "x");
  check_shape(x, "x", "[R, K]", {-1, -1});
  check_rows_contiguous(x, "x");
  check(levels >= 1 && levels <= 255, "levels must be in [1, 255], got ", levels);
  check(planes == 1 || planes == 2, "planes must be 1 or 2, got ", planes);
  check(!rotate || x.size(1) % lpd::kRotation == 0, "x: K must be a multiple of ", lpd::kRotation,
        " to be rotated, got ", x.size(1));
  const int64_t rows = size32(x.size(0), "x: R");
  params.width = size32(x.size(1), "x: K");
  const Quantized result = {torch::stable::new_empty(x, {planes * rows, x.size(1)}, ScalarType::Byte),
                            torch::stable::new_empty(x, {planes * rows, 2}, ScalarType::Float)};
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.out = {static_cast<uint8_t*>(std::get<0>(result).mutable_data_ptr()),
                static_cast<lpd::RowQuantization*>(std::get<1>(result).mutable_data_ptr()),
                rows,
                static_cast<int32_t>(planes),
                static_cast<int32_t>(levels),
                rotate};
  const double passes = (rotate ? 0.5 : 0.2) * static_cast<double>(planes);
  execute_on_cpu(params, lpd::cpu_kernels().quantize_rows, rows, passes * params.width);
  return result;
}

// ---- group_norm_scale_shift, conv3x3 ----

Tensor group_norm_scale_shift(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups,
                              double eps) {
  check_array(x, "x", x, ScalarType::Float, "[B, H, W, C]", {-1, -1, -1, -1});
  const int32_t batch = size32(x.size(0), "x: B"), channels = size32(x.size(3), "x: C");
  const int64_t pixels = int64_t{size32(x.size(1), "x: H")} * size32(x.size(2), "x: W");
  if (x.size(1) == 0 || x.size(2) == 0) fail("x must have at least one pixel, got ", shape_text(x));
  check_array(weight, "weight", x, ScalarType::Float, "[C]", {channels});
  check_array(bias, "bias", x, ScalarType::Float, "[C]", {channels});
  const int32_t groups = size32(num_groups, "num_groups");
  check(groups >= 1 && channels % groups == 0, "num_groups must divide C = ", channels, ", got ", groups);
  Tensor result = torch::stable::new_empty(x, {batch, 2, channels});
  if (result.numel() == 0) return result;
  lpd::GroupNormParams params{};
  params.x = static_cast<const float*>(x.const_data_ptr());
  params.weight = static_cast<const float*>(weight.const_data_ptr());
  params.bias = static_cast<const float*>(bias.const_data_ptr());
  params.batch = batch;
  params.pixels = pixels;
  params.channels = channels;
  params.groups = groups;
  params.eps = static_cast<float>(eps);
  const int64_t chunks = lpd::group_norm_chunks(params);
  Tensor partials = torch::stable::new_empty(x, {batch, chunks, 2, channels});
  params.partials = static_cast<float*>(partials.mutable_data_ptr());
  params.scale_shift = static_cast<float*>(result.mutable_data_ptr());
  const double numbers = static_cast<double>(channels);
  execute_on_cpu(params, lpd::cpu_kernels().group_norm_partials, batch * chunks, 0.25 * numbers * lpd::kGroupNormChunk);
  execute_on_cpu(params, lpd::cpu_kernels().group_norm_scale_shift, int64_t{batch} * groups,
                 2.0 * numbers / groups * static_cast<double>(chunks));
  return result;
}

void conv3x3(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& scale_shift,
             const Tensor& out, bool upsample, bool accumulate, bool bfloat16) {
  check_array(x, "x", x, ScalarType::Float, "[B, H, W, C]", {-1, -1, -1, -1});
  const int64_t batch = size32(x.size(0), "x: B"), height = size32(x.size(1), "x: H"),
                width = size32(x.size(2), "x: W"), channels = size32(x.size(3), "x: C"), factor = upsample ? 2 : 1;
  check(channels >= 16 && channels % 16 == 0, "x: C must be a multiple of 16, got ", channels);
  check_array(bias, "bias", x, ScalarType::Float, "[K]", {-1});
  const int64_t out_channels = bias.size(0);
  check_array(weight, "weight", x, ScalarType::Float, "[3, 3, C, K]", {3, 3, channels, out_channels});
  if (scale_shift.has_value()) {
    check_array(*scale_shift, "scale_shift", x, ScalarType::Float, "[B, 2, C]", {batch, 2, channels});
  }
  check_array(out, "out", x, ScalarType::Float, upsample ? "[B, 2 H, 2 W, K]" : "[B, H, W, K]",
              {batch, height * factor, width * factor, out_channels});
  check_written({written(out, "out"), read(x, "x"), read(weight, "weight"), read(bias, "bias"),
                 read(scale_shift, "scale_shift")});

  lpd::Conv3x3Params params{};
  params.x = static_cast<const float*>(x.const_data_ptr());
  params.weight = static_cast<const float*>(weight.const_data_ptr());
  params.bias = static_cast<const float*>(bias.const_data_ptr());
  params.scale_shift = optional_data<float>(scale_shift);
  params.out = static_cast<float*>(out.mutable_data_ptr());
  params.batch = static_cast<int32_t>(batch);
  params.height = size32(out.size(1), "out: H");
  params.width = size32(out.size(2), "out: W");
  params.in_channels = static_cast<int32_t>(channels);
  params.out_channels = size32(out_channels, "bias: K");
  params.upsample = upsample;
  params.accumulate = accumulate;
  params.bfloat16 = bfloat16;
  mark_written({written(out, "out")});
  if (out.numel() == 0) return;
  params.plan = lpd::conv3x3_plan(batch, out.size(1), out.size(2), out_channels, torch::stable::get_num_threads());
  Tensor workspace = torch::stable::new_empty(x, {lpd::conv3x3_workspace_floats(params)});
  params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  constexpr double kAlwaysSplit = 1e9;
  if (params.plan.splits == 0) {
    execute_on_cpu(params, lpd::cpu_kernels().conv3x3_weights, params.plan.panels,
                   40.0 * static_cast<double>(channels));
  }
  execute_on_cpu(params, lpd::cpu_kernels().conv3x3, params.plan.workers, kAlwaysSplit);
}

// ---- preview_pixels ----

Tensor preview_pixels(const Tensor& tokens, const Tensor& codebook, const Tensor& weight1, const Tensor& bias1,
                      const Tensor& weight2, const Tensor& bias2, const Tensor& head, const Tensor& head_bias) {
  check_array(tokens, "tokens", tokens, ScalarType::Long, "[B, h, w]", {-1, -1, -1});
  const int64_t batch = size32(tokens.size(0), "tokens: B"), height = size32(tokens.size(1), "tokens: h"),
                width = size32(tokens.size(2), "tokens: w");
  check_array(codebook, "codebook", tokens, ScalarType::Float, "[V, d]", {-1, -1});
  const int64_t codes = codebook.size(0), length = size32(codebook.size(1), "codebook: d");
  check_array(bias1, "bias1", tokens, ScalarType::Float, "[K]", {-1});
  const int64_t width1 = size32(bias1.size(0), "bias1: K");
  check_array(weight1, "weight1", tokens, ScalarType::Float, "[3, 3, d + 1, K]", {3, 3, length + 1, width1});
  check_array(bias2, "bias2", tokens, ScalarType::Float, "[L]", {-1});
  const int64_t width2 = size32(bias2.size(0), "bias2: L");
  for (const auto& [name, size] : {std::pair{"codebook: d", length}, {"bias1: K", width1}, {"bias2: L", width2}}) {
    check(size <= kMostChannels, name, " must be at most ", kMostChannels, ", got ", size);
  }
  check_array(weight2, "weight2", tokens, ScalarType::Float, "[3, 3, K, L]", {3, 3, width1, width2});
  check_array(head_bias, "head_bias", tokens, ScalarType::Float, "[s, s, 3]", {-1, head_bias.size(0), 3});
  const int64_t stride = head_bias.size(0);
  check(stride <= kMostPixelsOfCell, "head_bias: s must be at most ", kMostPixelsOfCell, ", got ", stride);
  check_array(head, "head", tokens, ScalarType::Float, "[L, s, s, 3]", {width2, stride, stride, 3});
  const auto* token = static_cast<const int64_t*>(tokens.const_data_ptr());
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    check(token[i] >= -1 && token[i] < codes, "tokens must be in [-1, ", codes, "), got ", token[i]);
  }
  Tensor result = torch::stable::new_empty(tokens, {batch, height * stride, width * stride, 3}, ScalarType::Byte);
  if (result.numel() == 0) return result;
  lpd::PreviewPixelsParams params{};
  params.tokens = token;
  params.codebook = static_cast<const float*>(codebook.const_data_ptr());
  params.weight1 = static_cast<const float*>(weight1.const_data_ptr());
  params.bias1 = static_cast<const float*>(bias1.const_data_ptr());
  params.weight2 = static_cast<const float*>(weight2.const_data_ptr());
  params.bias2 = static_cast<const float*>(bias2.const_data_ptr());
  params.head = static_cast<const float*>(head.const_data_ptr());
  params.head_bias = static_cast<const float*>(head_bias.const_data_ptr());
  params.pixels = static_cast<uint8_t*>(result.mutable_data_ptr());
  params.batch = batch;
  params.height = static_cast<int32_t>(height);
  params.width = static_cast<int32_t>(width);
  params.code_length = static_cast<int32_t>(length);
  params.width1 = static_cast<int32_t>(width1);
  params.width2 = static_cast<int32_t>(width2);
  params.stride = static_cast<int32_t>(stride);
  Tensor workspace =
      torch::stable::new_empty(codebook, {batch, lpd::preview_workspace_floats(params)}, ScalarType::Float);
  params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  constexpr double kProductsPerNanosecond = 20;
  const auto channels = static_cast<double>(length + 1), k = static_cast<double>(width1),
             l = static_cast<double>(width2);
  const double products = 9 * channels * k + 9 * k * l + 3 * l * static_cast<double>(stride * stride);
  execute_on_cpu(params, lpd::cpu_kernels().preview_pixels, batch,
                 products * static_cast<double>(height * width) / kProductsPerNanosecond);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lpd_ext, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("group_norm_scale_shift", TORCH_BOX(&group_norm_scale_shift));
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("preview_pixels", TORCH_BOX(&preview_pixels));
}
