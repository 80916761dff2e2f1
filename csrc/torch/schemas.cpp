// Every operator's schema, beside the file that checks its arguments and dispatches. `Tensor(a!)` is written to; no
// operator returns what it was given.
#include <torch/csrc/stable/library.h>

#include "execute.h"

// A macro of our own, so that the namespace is expanded before torch's macros make names of it.
#define LPD_LIBRARY(library, m) STABLE_TORCH_LIBRARY(library, m)

LPD_LIBRARY(LPD_OPERATOR_NAMESPACE, m) {
  // CPU and CUDA, ops.cpp
  m.def(
      "group_attention(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor segments, int max_rows, "
      "int max_keys, int first_output_row, float scale, Tensor(c!)? workspace=None, "
      "bool settled=False) -> Tensor");
  m.def("append_kv(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor segments, int max_rows) -> ()");
  m.def(
      "embed_rows(Tensor content_ids, Tensor positions, Tensor content, Tensor position_embedding, Tensor weight, "
      "Tensor bias, float eps, Tensor? content_index=None, Tensor? position_index=None) -> Tensor");
  m.def(
      "embed_scaled_rows(Tensor content_ids, Tensor positions, Tensor content, Tensor position_embedding, "
      "Tensor weight, Tensor bias, Tensor scale, float eps, Tensor? content_index=None, "
      "Tensor? position_index=None) -> (Tensor, Tensor, Tensor)");
  m.def("residual_layer_norm(Tensor(a!) x, Tensor? delta, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "sample_tokens(Tensor logits, Tensor conditional_row, Tensor unconditional_row, Tensor guidance, "
      "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor seed, Tensor cell) -> Tensor");
  m.def(
      "sample_step(Tensor logits, Tensor conditional_row, Tensor unconditional_row, Tensor image, Tensor token_index, "
      "Tensor write_index, Tensor twin_index, Tensor guidance, Tensor temperature, Tensor? top_k, Tensor? top_p, "
      "Tensor seeds, Tensor positions, Tensor(a!) contents, Tensor(b!) grid) -> ()");
  m.def(
      "locality_order(Tensor group_sizes, int height, int width, float proximity_threshold, int repulsion_threshold, "
      "Tensor seeds, Tensor? known) -> Tensor");
  // CPU and CUDA, few_row_ops.cpp
  m.def("residual_linear(Tensor(a!) x, Tensor rows, Tensor weight, Tensor? bias, Tensor scale) -> (Tensor, Tensor)");
  m.def(
      "normed_linear(Tensor scaled, Tensor statistics, Tensor weight, Tensor slope, Tensor shift, float eps, bool "
      "gelu) "
      "-> Tensor");
  m.def("fold_layer_norm(Tensor weight, Tensor gamma, Tensor beta, Tensor? bias) -> (Tensor, Tensor)");
#if !defined(LPD_EMULATED_OPERATORS)
  // CPU, cpu_ops.cpp
  m.def("quantize_rows(Tensor x, int levels, bool rotate, int planes) -> (Tensor, Tensor)");
  m.def("group_norm_scale_shift(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps) -> Tensor");
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor bias, Tensor? scale_shift, Tensor(a!) out, bool upsample, "
      "bool accumulate, bool bfloat16) -> ()");
  m.def(
      "preview_pixels(Tensor tokens, Tensor codebook, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
      "Tensor head, Tensor head_bias) -> Tensor");
  // CPU, linear_ops.cpp
  m.def("packed_linear(Tensor x, Tensor weight, Tensor? bias, int out_features, bool gelu, Tensor(a!) out) -> ()");
  m.def(
      "packed_linear_int8(Tensor quantized, Tensor quantization, Tensor weight, Tensor scale, Tensor column_sum, "
      "Tensor? bias, int planes, bool gelu, Tensor(a!) out) -> ()");
  // CPU, training_ops.cpp
  m.def("training_attention(Tensor qkv, Tensor group_sizes, bool mutual_visibility, float scale) -> (Tensor, Tensor)");
  m.def(
      "training_attention_backward(Tensor grad_output, Tensor qkv, Tensor output, Tensor logsumexp, "
      "Tensor group_sizes, bool mutual_visibility, float scale) -> Tensor");
#endif
}
