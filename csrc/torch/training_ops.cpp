// training_attention and its gradient, which only the CPU has kernels for: checks and dispatch, as ops.cpp has them for
// the operators of decoding.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "common/cpu_kernels.h"
#include "execute.h"

namespace {

using namespace lpd::checks;
using lpd::execution::execute_on_cpu;

void check_group_sizes(const Tensor& group_sizes, const Tensor& qkv, int64_t rows) {
  check_array(group_sizes, "group_sizes", qkv, ScalarType::Int, "[T]", {-1});
  const int64_t steps = group_sizes.size(0);
  check(steps >= 1, "group_sizes must not be empty");
  const auto* sizes = static_cast<const int32_t*>(group_sizes.const_data_ptr());
  int64_t tokens = 0;
  for (int64_t t = 0; t < steps; ++t) {
    check(sizes[t] >= 1, "group_sizes[", t, "] = ", sizes[t], " must be >= 1");
    tokens += sizes[t];
  }
  const int64_t expected = 1 + 2 * tokens - sizes[steps - 1];
  check(rows == expected, "qkv must have 1 + 2 N - m_last = ", expected, " rows for these group_sizes, got ", rows);
}

lpd::TrainingAttentionParams checked_params(const Tensor& qkv, const Tensor& group_sizes, bool mutual_visibility,
                                            double scale) {
  lpd::TrainingAttentionParams params{};
  params.dtype = float_dtype(qkv, "qkv");
  check_shape(qkv, "qkv", "[B, rows, 3, H, D]", {-1, -1, 3, -1, -1});
  check_rows_contiguous(qkv, "qkv");
  params.batch = size32(qkv.size(0), "qkv: B");
  params.rows = size32(qkv.size(1), "qkv: rows");
  params.num_heads = size32(qkv.size(3), "qkv: H");
  params.head_dim = size32(qkv.size(4), "qkv: D");
  check(params.head_dim >= 8 && params.head_dim % 8 == 0 && params.head_dim <= lpd::kTrainingAttentionMaxHeadDim,
        "qkv: D must be a multiple of 8 and at most ", lpd::kTrainingAttentionMaxHeadDim, ", got ", params.head_dim);
  check_group_sizes(group_sizes, qkv, qkv.size(1));
  params.qkv = qkv.const_data_ptr();
  params.qkv_image_stride = qkv.stride(0);
  params.qkv_row_stride = qkv.stride(1);
  params.qkv_part_stride = qkv.stride(2);
  params.qkv_head_stride = qkv.stride(3);
  params.group_sizes = static_cast<const int32_t*>(group_sizes.const_data_ptr());
  params.num_steps = size32(group_sizes.size(0), "group_sizes: T");
  params.scale = finite32(scale, "scale");
  params.mutual_visibility = mutual_visibility;
  return params;
}

// With a workspace for each thread that can be busy.
void run(const Tensor& qkv, lpd::TrainingAttentionParams& params) {
  const int64_t heads = int64_t{params.batch} * params.num_heads;
  if (heads == 0) return;
  params.workers = static_cast<int32_t>(std::min<int64_t>(heads, torch::stable::get_num_threads()));
  params.workspace_stride =
      lpd::training_attention_workspace_floats(params.rows, params.head_dim, params.grad_qkv != nullptr);
  Tensor workspace = torch::stable::new_empty(qkv, {params.workers * params.workspace_stride}, ScalarType::Float);
  params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  execute_on_cpu(params, lpd::cpu_kernels().training_attention, params.workers, 1e9);
}

std::tuple<Tensor, Tensor> training_attention(const Tensor& qkv, const Tensor& group_sizes, bool mutual_visibility,
                                              double scale) {
  lpd::TrainingAttentionParams params = checked_params(qkv, group_sizes, mutual_visibility, scale);
  const int64_t width = qkv.size(3) * qkv.size(4);
  Tensor output = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), width});
  Tensor logsumexp = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(3), qkv.size(1)}, ScalarType::Float);
  params.output = output.mutable_data_ptr();
  params.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  run(qkv, params);
  return {output, logsumexp};
}

Tensor training_attention_backward(const Tensor& grad_output, const Tensor& qkv, const Tensor& output,
                                   const Tensor& logsumexp, const Tensor& group_sizes, bool mutual_visibility,
                                   double scale) {
  lpd::TrainingAttentionParams params = checked_params(qkv, group_sizes, mutual_visibility, scale);
  const int64_t batch = qkv.size(0), rows = qkv.size(1), width = qkv.size(3) * qkv.size(4);
  check_array(grad_output, "grad_output", qkv, qkv.scalar_type(), "[B, rows, H * D]", {batch, rows, width});
  check_array(output, "output", qkv, qkv.scalar_type(), "[B, rows, H * D]", {batch, rows, width});
  check_array(logsumexp, "logsumexp", qkv, ScalarType::Float, "[B, H, rows]", {batch, qkv.size(3), rows});
  Tensor grad_qkv = torch::stable::new_empty(qkv, {batch, rows, 3, qkv.size(3), qkv.size(4)});
  params.grad_output = grad_output.const_data_ptr();
  params.output = const_cast<void*>(output.const_data_ptr());
  params.logsumexp = static_cast<float*>(const_cast<void*>(logsumexp.const_data_ptr()));
  params.grad_qkv = grad_qkv.mutable_data_ptr();
  run(qkv, params);
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lpd_ext, CPU, m) {
  m.impl("training_attention", TORCH_BOX(&training_attention));
  m.impl("training_attention_backward", TORCH_BOX(&training_attention_backward));
}
