// Linear layers of packed weights, on the CPU: checks and dispatch, as ops.cpp has them for the others.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "checks.h"
#include "common/cpu_kernels.h"
#include "execute.h"
#include "written.h"

namespace {

using namespace lpd::checks;
using lpd::LinearOperands;
using lpd::execution::execute_on_cpu;

// x, weight, y and the sizes of params, whose operands and planes are set.
void set_operands(lpd::PackedLinearParams& params, const Tensor& x, const char* name, const Tensor& weight,
                  int64_t out_features, Tensor& out) {
  check_shape(x, name, "[R, K]", {-1, -1});
  check_rows_contiguous(x, name);
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.num_rows = x.size(0) / params.planes;
  const int64_t in_features = x.size(1);
  check(in_features >= 1, name, ": K must be at least 1, got ", in_features);
  check(in_features <= INT32_MAX, name, ": K must be in [0, 2^31), got ", in_features);
  params.in_features = static_cast<int32_t>(in_features);
  const ScalarType sums = params.operands == LinearOperands::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  check(out_features >= 1, "out_features must be at least 1, got ", out_features);
  check_array(out, "out", x, sums, "[R, N]", {params.num_rows, out_features});
  params.out_features = size32(out_features, "out_features");
  params.y = out.mutable_data_ptr();
  const int64_t elements = lpd::linear_word_elements(params.operands);
  check_shape(weight, "weight", "[ceil(N / 32), words, 32, elements of a word]",
              {lpd::linear_panels(params), lpd::linear_words(params), lpd::kLinearPanel, elements});
  check(weight.is_contiguous(), "weight must be contiguous");
  params.weight = static_cast<const uint32_t*>(weight.const_data_ptr());
}

// Scratch of the calling thread, kept from call to call: large memory that is given back and taken again is zeroed by
// the system each time, page by page.
uint32_t* packed_rows(int64_t words) {
  thread_local std::vector<uint32_t> kept;
  if (static_cast<int64_t>(kept.size()) < words) {
    kept = {};  // first: the old and the new are not needed together
    kept.resize(static_cast<size_t>(words));
  }
  return kept.data();
}

void execute(lpd::PackedLinearParams& params) {
  if (params.num_rows == 0) return;
  const int64_t words = lpd::linear_words(params), rows = params.num_rows * params.planes;
  const int64_t panels = lpd::linear_panels(params), blocks = lpd::linear_blocks(params);
  const lpd::CpuKernels& kernels = lpd::cpu_kernels();
  // Rows of more than 4 MB are read once for four panels; those of floats in runs of words, all panels for one run
  // before the next, so that L3 holds what is read again.
  constexpr int64_t kSmallRows = 1 << 20;  // words
  const bool large = rows * words > kSmallRows;
  const int64_t part = large && params.operands == LinearOperands::kFloat32 ? lpd::kLinearRunWords : words;
  params.packed_rows = packed_rows(lpd::linear_scratch_words(params, std::min(words, part)));
  params.group_panels = large ? 4 : 1;
  // Few items leave threads idle unless they share the rows.
  params.row_parts = 1;
  const int64_t threads = torch::stable::get_num_threads(), groups = lpd::linear_items(params);
  params.row_parts =
      static_cast<int32_t>(std::clamp<int64_t>(((large ? 16 : 4) * threads + groups - 1) / groups, 1, blocks));
  const int64_t workers = std::min(threads, lpd::linear_items(params));
  for (int64_t first = 0; first < words; first += part) {
    params.first_word = static_cast<int32_t>(first);
    params.last_word = static_cast<int32_t>(std::min(words, first + part));
    std::atomic<int64_t> next_item{0};
    params.next_item = &next_item;
    const double panel_words = params.last_word - params.first_word;
    const double block_words = panel_words * static_cast<double>(rows) / static_cast<double>(blocks);
    execute_on_cpu(params, kernels.pack_linear_rows, blocks, 0.1 * block_words);
    const double panel_ns = std::max(0.5 * panel_words * static_cast<double>(rows), 10.0 * panel_words);
    execute_on_cpu(params, kernels.packed_linear, workers,
                   panel_ns * static_cast<double>(panels) / static_cast<double>(workers));
  }
}

void packed_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features, bool gelu,
                   Tensor out) {
  lpd::PackedLinearParams params{};
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x must be float32 or bfloat16, got ",
        dtype_text(dtype));
  params.operands = dtype == ScalarType::Float ? LinearOperands::kFloat32 : LinearOperands::kBFloat16;
  params.planes = 1;
  params.gelu = gelu;
  check_device(weight, "weight", x);
  check_dtype(weight, "weight", dtype);
  set_operands(params, x, "x", weight, out_features, out);
  if (bias.has_value()) check_array(*bias, "bias", x, dtype, "[N]", {out_features});
  params.bias = optional_data<void>(bias);
  check_written({written(out, "out"), read(x, "x"), read(weight, "weight"), read(bias, "bias")});
  mark_written({written(out, "out")});
  execute(params);
}

void packed_linear_int8(const Tensor& quantized, const Tensor& quantization, const Tensor& weight, const Tensor& scale,
                        const Tensor& column_sum, const OptionalTensor& bias, int64_t planes, bool gelu, Tensor out) {
  lpd::PackedLinearParams params{};
  check(planes == 1 || planes == 2, "planes must be 1 or 2, got ", planes);
  check_dtype(quantized, "quantized", ScalarType::Byte);
  params.operands = LinearOperands::kInt8;
  params.planes = static_cast<int32_t>(planes);
  params.gelu = gelu;
  check_shape(quantized, "quantized", "[R, K]", {-1, -1});
  check(quantized.size(0) % planes == 0, "quantized: its rows must be in ", planes, " planes, got ", quantized.size(0));
  check(quantized.size(1) <= lpd::kLinearMaxInt8Features, "quantized: K must be at most ", lpd::kLinearMaxInt8Features,
        ", got ", quantized.size(1));
  check_array(quantization, "quantization", quantized, ScalarType::Float, "[R, 2]", {quantized.size(0), 2});
  check_array(scale, "scale", quantized, ScalarType::Float, "[N]", {-1});
  const int64_t out_features = scale.size(0);
  check_device(weight, "weight", quantized);
  check_dtype(weight, "weight", ScalarType::Char);
  set_operands(params, quantized, "quantized", weight, out_features, out);
  check_array(column_sum, "column_sum", quantized, ScalarType::Float, "[N]", {out_features});
  if (bias.has_value()) check_array(*bias, "bias", quantized, ScalarType::Float, "[N]", {out_features});
  params.quantization = static_cast<const lpd::RowQuantization*>(quantization.const_data_ptr());
  params.scale = static_cast<const float*>(scale.const_data_ptr());
  params.column_sum = static_cast<const float*>(column_sum.const_data_ptr());
  params.bias = optional_data<void>(bias);
  check_written({written(out, "out"), read(quantized, "quantized"), read(quantization, "quantization"),
                 read(weight, "weight"), read(scale, "scale"), read(column_sum, "column_sum"), read(bias, "bias")});
  mark_written({written(out, "out")});
  execute(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lpd_ext, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_linear_int8", TORCH_BOX(&packed_linear_int8));
}
