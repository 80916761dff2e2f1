// Checks and dispatch of the operators of decoding, on torch's stable ABI (schemas.cpp has what they are called with).
// Kernels know nothing of torch; this folder is all they share with it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <string>
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
using lpd::execution::values_readable;

// ---- group_attention, append_kv ----

// CUDA kernels hold a row in registers, for head dimensions they are compiled for.
void check_cuda_cache_arguments(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache) {
  check(lpd::group_attention_cuda_head_dim(static_cast<int32_t>(qkv.size(3))),
        "qkv: on CUDA head dimension D must be 32, 64 or 128, got ", qkv.size(3));
  check_cuda_rows(qkv, "qkv");
  check_cuda_rows(k_cache, "k_cache");
  check_cuda_rows(v_cache, "v_cache");
}

struct CacheShape {
  int32_t rows, heads, head_dim, slots, positions, segments;
};

CacheShape check_cache_arguments(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& segments) {
  check_device(k_cache, "k_cache", qkv);
  check_device(v_cache, "v_cache", qkv);
  float_dtype(qkv, "qkv");
  check_dtype(k_cache, "k_cache", qkv.scalar_type());
  check_dtype(v_cache, "v_cache", qkv.scalar_type());
  check_shape(qkv, "qkv", "[R, 3, H, D]", {-1, 3, -1, -1});
  const int64_t heads = qkv.size(2), head_dim = qkv.size(3);
  check(head_dim >= 1 && head_dim <= 256 && head_dim % 8 == 0,
        "qkv: head dimension D must be a multiple of 8 in [8, 256], got ", head_dim);
  check_shape(k_cache, "k_cache", "[S, H, P, D]", {-1, heads, -1, head_dim});
  check_shape(v_cache, "v_cache", "[S, H, P, D]", {k_cache.size(0), heads, k_cache.size(2), head_dim});
  check_rows_contiguous(qkv, "qkv");
  check_rows_contiguous(k_cache, "k_cache");
  check_rows_contiguous(v_cache, "v_cache");
  for (int64_t i = 0; i < 3; ++i) {
    check(k_cache.size(i) <= 1 || k_cache.stride(i) == v_cache.stride(i),
          "v_cache must have the strides of k_cache, got stride ", v_cache.stride(i), " and ", k_cache.stride(i),
          " in dimension ", i);
  }
  check_array(segments, "segments", qkv, ScalarType::Int, "[Q, 6]", {-1, 6});
  if (on_cuda_kernels(qkv)) check_cuda_cache_arguments(qkv, k_cache, v_cache);
  size32(int64_t{size32(segments.size(0), "segments: Q")} * size32(heads, "qkv: H"), "segments: Q times H");  // blocks
  return {size32(qkv.size(0), "qkv: R"),
          size32(heads, "qkv: H"),
          size32(head_dim, "qkv: D"),
          size32(k_cache.size(0), "k_cache: S"),
          size32(k_cache.size(2), "k_cache: P"),
          size32(segments.size(0), "segments: Q")};
}

lpd::CacheRows cache_rows(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& segments,
                          const CacheShape& shape, int32_t max_rows) {
  lpd::CacheRows p{};
  p.qkv = qkv.const_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.segments = static_cast<const lpd::Segment*>(segments.const_data_ptr());
  p.qkv_row_stride = qkv.stride(0);
  p.qkv_part_stride = qkv.stride(1);
  p.qkv_head_stride = qkv.stride(2);
  p.cache_slot_stride = k_cache.stride(0);
  p.cache_head_stride = k_cache.stride(1);
  p.cache_position_stride = k_cache.stride(2);
  p.num_segments = shape.segments;
  p.num_heads = shape.heads;
  p.head_dim = shape.head_dim;
  p.max_rows = std::min(max_rows, shape.rows);  // a grid of blocks follows from it
  p.dtype = float_dtype(qkv, "qkv");
  return p;
}

void check_segment_values(const lpd::Segment* values, const Tensor& segments, const CacheShape& shape,
                          const lpd::SegmentLimits& limits) {
  if (!values_readable(segments)) return;
  const std::string fault = lpd::check_segments(values, shape.segments, limits);
  check(fault.empty(), fault);
}

Tensor group_attention(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& segments,
                       int64_t max_rows, int64_t max_keys, int64_t first_output_row, double scale,
                       const OptionalTensor& workspace, bool settled) {
  const CacheShape shape = check_cache_arguments(qkv, k_cache, v_cache, segments);
  check(first_output_row >= 0 && first_output_row <= shape.rows, "first_output_row must be in [0, ", shape.rows,
        "], got ", first_output_row);
  if (workspace.has_value()) {
    check_array(*workspace, "workspace", qkv, ScalarType::Byte, "[bytes]", {-1});
    check(reinterpret_cast<uintptr_t>(workspace->const_data_ptr()) % 16 == 0,
          "workspace must begin at a multiple of 16 bytes");
  }
  check_written({written(k_cache, "k_cache"), written(v_cache, "v_cache"), written(workspace, "workspace"),
                 read(qkv, "qkv"), read(segments, "segments")});
  lpd::GroupAttentionParams params{};
  static_cast<lpd::CacheRows&>(params) =
      cache_rows(qkv, k_cache, v_cache, segments, shape, size32(max_rows, "max_rows"));
  params.first_output_row = static_cast<int32_t>(first_output_row);
  params.max_keys =
      static_cast<int32_t>(std::min<int64_t>(size32(max_keys, "max_keys"), int64_t{shape.positions} + shape.rows));
  params.scale = finite32(scale, "scale");
  params.settled = settled;
  check_segment_values(params.segments, segments, shape,
                       {shape.rows, shape.slots, shape.positions, max_rows, max_keys, first_output_row});

  Tensor output = torch::stable::new_empty(qkv, {shape.rows - first_output_row, int64_t{shape.heads} * shape.head_dim});
  params.output = output.mutable_data_ptr();
  if (workspace.has_value()) {
    params.workspace = workspace->mutable_data_ptr();
    params.workspace_bytes = workspace->numel();
  }
  mark_written({written(k_cache, "k_cache"), written(v_cache, "v_cache"), written(workspace, "workspace")});
  const double flops = 4.0 * params.max_rows * params.max_keys * shape.head_dim;
  execute(qkv, params, LPD_LAUNCHER(launch_group_attention), lpd::cpu_kernels().group_attention,
          lpd::group_attention_items(params), flops / 50);
  return output;
}

void append_kv(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& segments,
               int64_t max_rows) {
  const CacheShape shape = check_cache_arguments(qkv, k_cache, v_cache, segments);
  check_written(
      {written(k_cache, "k_cache"), written(v_cache, "v_cache"), read(qkv, "qkv"), read(segments, "segments")});
  const lpd::AppendKvParams params = cache_rows(qkv, k_cache, v_cache, segments, shape, size32(max_rows, "max_rows"));
  check_segment_values(params.segments, segments, shape,
                       {shape.rows, shape.slots, shape.positions, max_rows, shape.positions + max_rows, shape.rows});
  mark_written({written(k_cache, "k_cache"), written(v_cache, "v_cache")});
  execute(qkv, params, LPD_LAUNCHER(launch_append_kv), lpd::cpu_kernels().append_kv, lpd::append_kv_items(params),
          0.5 * params.max_rows * shape.head_dim);
}

// ---- embed_rows, embed_scaled_rows, residual_layer_norm ----

// How many rows ids stand for: one each, or one for each entry of `index`.
int64_t num_id_rows(const Tensor& ids, const char* name, const OptionalTensor& index, const char* index_name,
                    const Tensor& first) {
  check_array(ids, name, first, ScalarType::Long, index.has_value() ? "[L]" : "[R]", {-1});
  if (index.has_value()) check_array(*index, index_name, first, ScalarType::Long, "[R]", {-1});
  return index.has_value() ? index->size(0) : ids.size(0);
}

// The id of a row is looked up and checked; there are `end` of them.
void check_id(const int64_t* ids, const char* name, const int64_t* index, const char* index_name, int64_t num_ids,
              int64_t row, int64_t end) {
  const int64_t at = index == nullptr ? row : index[row];
  check(at >= 0 && at < num_ids, index_name, "[", row, "] = ", at, " must be in [0, ", num_ids, ")");
  check(ids[at] >= 0 && ids[at] < end, name, "[", at, "] = ", ids[at], " must be in [0, ", end, ")");
}

// Checked arguments of both operators; x is made here.
struct EmbeddedRows {
  lpd::EmbedRowsParams params;
  Tensor x;
};
EmbeddedRows rows_to_embed(const Tensor& content_ids, const Tensor& positions, const Tensor& content,
                           const Tensor& position_embedding, const Tensor& weight, const Tensor& bias, double eps,
                           const OptionalTensor& content_index, const OptionalTensor& position_index) {
  const int64_t rows = size32(num_id_rows(content_ids, "content_ids", content_index, "content_index", content_ids),
                              content_index.has_value() ? "content_index: R" : "content_ids: R");
  const int64_t position_rows = num_id_rows(positions, "positions", position_index, "position_index", content_ids);
  check(position_rows == rows, position_index.has_value() ? "position_index" : "positions", " must have shape [R] = [",
        rows, "], got [", position_rows, "]");
  check_device(content, "content", content_ids);
  const lpd::DType dtype = float_dtype(content, "content");
  check_shape(content, "content", "[M, E]", {-1, -1});
  check_rows_contiguous(content, "content");
  const int64_t width = content.size(1);
  check_device(position_embedding, "position_embedding", content_ids);
  check_dtype(position_embedding, "position_embedding", content.scalar_type());
  check_shape(position_embedding, "position_embedding", "[1 + N, E]", {-1, width});
  check_rows_contiguous(position_embedding, "position_embedding");
  check_array(weight, "weight", content_ids, content.scalar_type(), "[E]", {width});
  check_array(bias, "bias", content_ids, content.scalar_type(), "[E]", {width});

  lpd::EmbedRowsParams params{};
  params.content_ids = static_cast<const int64_t*>(content_ids.const_data_ptr());
  params.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  params.content_index = optional_data<int64_t>(content_index);
  params.position_index = optional_data<int64_t>(position_index);
  params.num_content_ids = content_ids.size(0);
  params.num_position_ids = positions.size(0);
  params.num_contents = content.size(0);
  params.num_positions = position_embedding.size(0);
  // A row of an empty table is none; kernels read the first one in place of a wrong one.
  check(rows == 0 || params.num_contents > 0, "content must have rows, got an empty table");
  check(rows == 0 || params.num_positions > 0, "position_embedding must have rows, got an empty table");
  // CUDA kernels, which cannot be checked beforehand without waiting for the device, make a NaN row of a wrong id.
  for (int64_t row = 0; row < rows && !on_cuda_kernels(content_ids); ++row) {
    check_id(params.content_ids, "content_ids", params.content_index, "content_index", params.num_content_ids, row,
             params.num_contents);
    check_id(params.positions, "positions", params.position_index, "position_index", params.num_position_ids, row,
             params.num_positions);
  }
  Tensor x = torch::stable::new_empty(content, {rows, width}, ScalarType::Float);
  params.content = content.const_data_ptr();
  params.position_embedding = position_embedding.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = bias.const_data_ptr();
  params.x = static_cast<float*>(x.mutable_data_ptr());
  params.content_stride = content.stride(0);
  params.position_stride = position_embedding.stride(0);
  params.num_rows = rows;
  params.width = size32(width, "content: E");
  params.eps = static_cast<float>(eps);
  params.dtype = dtype;
  return {params, x};
}

void embed(const Tensor& content_ids, const lpd::EmbedRowsParams& params, double cost_of_column) {
  execute(content_ids, params, LPD_LAUNCHER(launch_embed_rows), lpd::cpu_kernels().embed_rows, params.num_rows,
          cost_of_column * params.width);
}

Tensor embed_rows(const Tensor& content_ids, const Tensor& positions, const Tensor& content,
                  const Tensor& position_embedding, const Tensor& weight, const Tensor& bias, double eps,
                  const OptionalTensor& content_index, const OptionalTensor& position_index) {
  const auto [params, x] = rows_to_embed(content_ids, positions, content, position_embedding, weight, bias, eps,
                                         content_index, position_index);
  embed(content_ids, params, 0.5);
  return x;
}

std::tuple<Tensor, Tensor, Tensor> embed_scaled_rows(const Tensor& content_ids, const Tensor& positions,
                                                     const Tensor& content, const Tensor& position_embedding,
                                                     const Tensor& weight, const Tensor& bias, const Tensor& scale,
                                                     double eps, const OptionalTensor& content_index,
                                                     const OptionalTensor& position_index) {
  auto [params, x] = rows_to_embed(content_ids, positions, content, position_embedding, weight, bias, eps,
                                   content_index, position_index);
  const ScalarType type = content.scalar_type();
  check(type != ScalarType::Float, "content must be bfloat16 or float16 where rows are scaled, got float32");
  check(params.width > 0 && params.width % lpd::kStatisticsColumns == 0, "content: E must be a multiple of ",
        lpd::kStatisticsColumns, " where rows are scaled, got ", params.width);
  check_array(scale, "scale", content_ids, type, "[E]", {params.width});
  if (on_cuda_kernels(content_ids)) {
    check_cuda_rows(content, "content");
    check_cuda_rows(position_embedding, "position_embedding");
    check_cuda_rows(weight, "weight");
    check_cuda_rows(bias, "bias");
    check_cuda_rows(scale, "scale");
  }
  Tensor scaled = torch::stable::new_empty(content, {params.num_rows, params.width});
  Tensor statistics = torch::stable::new_empty(content, {params.num_rows, params.width / lpd::kStatisticsColumns, 2},
                                               ScalarType::Float);
  params.scale = scale.const_data_ptr();
  params.scaled = scaled.mutable_data_ptr();
  params.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  embed(content_ids, params, 2.0);
  return {x, scaled, statistics};
}

Tensor residual_layer_norm(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, const Tensor& bias,
                           double eps) {
  check_dtype(x, "x", ScalarType::Float);
  check_shape(x, "x", "[R, E]", {-1, -1});
  check_rows_contiguous(x, "x");
  const int64_t rows = x.size(0), width = x.size(1);
  const lpd::DType dtype = float_dtype(weight, "weight");
  check_array(weight, "weight", x, weight.scalar_type(), "[E]", {width});
  check_array(bias, "bias", x, weight.scalar_type(), "[E]", {width});
  if (delta.has_value()) {
    check_device(*delta, "delta", x);
    check_dtype(*delta, "delta", weight.scalar_type());
    check_shape(*delta, "delta", "[R, E]", {rows, width});
    check_rows_contiguous(*delta, "delta");
  }
  const Argument stream{&x, "x", delta.has_value()};
  check_written({stream, read(delta, "delta"), read(weight, "weight"), read(bias, "bias")});
  lpd::ResidualLayerNormParams params{};
  params.width = size32(width, "x: E");
  Tensor normed = torch::stable::new_empty(weight, {rows, width});
  if (normed.numel() > 0) size32(rows, "x: R");
  mark_written({stream});
  if (normed.numel() == 0) return normed;
  params.x = static_cast<float*>(x.mutable_data_ptr());
  params.delta = optional_data<void>(delta);
  params.weight = weight.const_data_ptr();
  params.bias = bias.const_data_ptr();
  params.normed = normed.mutable_data_ptr();
  params.x_stride = x.stride(0);
  params.delta_stride = delta.has_value() ? delta->stride(0) : 0;
  params.num_rows = rows;
  params.eps = static_cast<float>(eps);
  params.dtype = dtype;
  execute(x, params, LPD_LAUNCHER(launch_residual_layer_norm), lpd::cpu_kernels().residual_layer_norm, rows,
          0.5 * static_cast<double>(width));
  return normed;
}

// ---- sample_tokens, sample_step ----

// The logits, and which of their rows each token mixes.
lpd::SampleTokensParams mixed_rows(const Tensor& logits, const Tensor& conditional_row,
                                   const Tensor& unconditional_row) {
  lpd::SampleTokensParams params{};
  params.dtype = float_dtype(logits, "logits");
  check_shape(logits, "logits", "[Q, V]", {-1, -1});
  check_rows_contiguous(logits, "logits");
  const int64_t vocab_size = logits.size(1);
  check(vocab_size >= 1 && vocab_size <= (int64_t{1} << 24), "logits: V must be in [1, 2^24], got ", vocab_size);
  check_array(conditional_row, "conditional_row", logits, ScalarType::Int, "[M]", {-1});
  params.num_tokens = size32(conditional_row.size(0), "conditional_row: M");
  check_array(unconditional_row, "unconditional_row", logits, ScalarType::Int, "[M]", {params.num_tokens});
  params.logits = logits.const_data_ptr();
  params.conditional_row = static_cast<const int32_t*>(conditional_row.const_data_ptr());
  params.unconditional_row = static_cast<const int32_t*>(unconditional_row.const_data_ptr());
  params.logits_stride = logits.stride(0);
  params.num_rows = logits.size(0);
  params.vocab_size = static_cast<int32_t>(vocab_size);
  return params;
}

// Of one token; values of CUDA tensors are not looked at.
void check_sampling_values(const lpd::SampleTokensParams& params, int64_t m) {
  const int64_t rows = params.num_rows;
  check(params.conditional_row[m] >= 0 && params.conditional_row[m] < rows, "conditional_row[", m,
        "] = ", params.conditional_row[m], " must be in [0, ", rows, ")");
  check(params.unconditional_row[m] >= -1 && params.unconditional_row[m] < rows, "unconditional_row[", m,
        "] = ", params.unconditional_row[m], " must be in [-1, ", rows, ")");
  const lpd::TokenSettings settings = lpd::settings_of(params, m);
  check(std::isfinite(settings.guidance), "guidance[", settings.image, "] = ", settings.guidance, " must be finite");
  check(settings.temperature >= 0 && std::isfinite(settings.temperature), "temperature[", settings.image,
        "] = ", settings.temperature, " must be finite and >= 0");
  check(settings.top_k >= 0, "top_k[", settings.image, "] = ", settings.top_k, " must be >= 0");
  check(settings.top_p > 0 && settings.top_p <= 1, "top_p[", settings.image, "] = ", settings.top_p,
        " must be in (0, 1]");
}

// Runs the kernel, which is sample_tokens for both operators.
void draw_tokens(const Tensor& logits, const lpd::SampleTokensParams& params) {
  execute(logits, params, LPD_LAUNCHER(launch_sample_tokens), lpd::cpu_kernels().sample_tokens, params.num_tokens,
          1.0 * static_cast<double>(params.vocab_size));
  for (int64_t m = 0; m < params.num_tokens && !on_cuda_kernels(logits); ++m) {
    check(params.tokens[m] >= 0, "logits of token ", m, " (row ", params.conditional_row[m],
          ") contain NaN or are -inf throughout: nothing can be drawn");
  }
}

Tensor sample_tokens(const Tensor& logits, const Tensor& conditional_row, const Tensor& unconditional_row,
                     const Tensor& guidance, const Tensor& temperature, const OptionalTensor& top_k,
                     const OptionalTensor& top_p, const Tensor& seed, const Tensor& cell) {
  lpd::SampleTokensParams params = mixed_rows(logits, conditional_row, unconditional_row);
  const int64_t tokens = params.num_tokens;
  check_array(guidance, "guidance", logits, ScalarType::Float, "[M]", {tokens});
  check_array(temperature, "temperature", logits, ScalarType::Float, "[M]", {tokens});
  if (top_k.has_value()) check_array(*top_k, "top_k", logits, ScalarType::Int, "[M]", {tokens});
  if (top_p.has_value()) check_array(*top_p, "top_p", logits, ScalarType::Float, "[M]", {tokens});
  check_array(seed, "seed", logits, ScalarType::Long, "[M]", {tokens});
  check_array(cell, "cell", logits, ScalarType::Long, "[M]", {tokens});
  params.guidance = static_cast<const float*>(guidance.const_data_ptr());
  params.temperature = static_cast<const float*>(temperature.const_data_ptr());
  params.top_k = optional_data<int32_t>(top_k);
  params.top_p = optional_data<float>(top_p);
  params.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  params.cell = static_cast<const int64_t*>(cell.const_data_ptr());
  params.guidance_stride = params.temperature_stride = params.top_k_stride = params.top_p_stride = params.seed_stride =
      1;
  for (int64_t m = 0; m < tokens && !on_cuda_kernels(logits); ++m) check_sampling_values(params, m);
  Tensor result = torch::stable::new_empty(seed, {tokens});
  params.tokens = static_cast<int64_t*>(result.mutable_data_ptr());
  draw_tokens(logits, params);
  return result;
}

// A setting of each image, in a table of any stride.
void check_by_image(const Tensor& t, const char* name, const Tensor& logits, ScalarType dtype, int64_t images) {
  check_device(t, name, logits);
  check_dtype(t, name, dtype);
  check_shape(t, name, "[B]", {images});
}

void check_step_values(const lpd::SampleTokensParams& params, int64_t m) {
  const lpd::StepTables& tables = params.tables;
  const auto within = [m](const char* name, int64_t value, int64_t low, int64_t end) {
    check(value >= low && value < end, name, "[", m, "] = ", value, " must be in [", low, ", ", end, ")");
  };
  within("image", tables.image[m], 0, tables.num_images);
  within("token_index", tables.token_index[m], 0, tables.num_cells);
  within("write_index", tables.write_index[m], 0, tables.num_entries);
  within("twin_index", tables.twin_index[m], -1, tables.num_entries);
  const int64_t position = tables.positions[tables.write_index[m]];
  check(position >= 1 && position <= tables.num_cells, "positions at write_index[", m, "] = ", tables.write_index[m],
        " must be in [1, ", tables.num_cells, "], got ", position);
}

void sample_step(const Tensor& logits, const Tensor& conditional_row, const Tensor& unconditional_row,
                 const Tensor& image, const Tensor& token_index, const Tensor& write_index, const Tensor& twin_index,
                 const Tensor& guidance, const Tensor& temperature, const OptionalTensor& top_k,
                 const OptionalTensor& top_p, const Tensor& seeds, const Tensor& positions, const Tensor& contents,
                 const Tensor& grid) {
  lpd::SampleTokensParams params = mixed_rows(logits, conditional_row, unconditional_row);
  const int64_t tokens = params.num_tokens;
  check_array(image, "image", logits, ScalarType::Long, "[M]", {tokens});
  check_array(token_index, "token_index", logits, ScalarType::Long, "[M]", {tokens});
  check_array(write_index, "write_index", logits, ScalarType::Long, "[M]", {tokens});
  check_array(twin_index, "twin_index", logits, ScalarType::Long, "[M]", {tokens});
  check_array(grid, "grid", logits, ScalarType::Long, "[B, N]", {-1, -1});
  const int64_t images = grid.size(0), cells = grid.size(1);
  check_array(positions, "positions", logits, ScalarType::Long, "[S, N + 2]", {-1, cells + 2});
  check_array(contents, "contents", logits, ScalarType::Long, "[S, N + 2]", {positions.size(0), cells + 2});
  check_device(guidance, "guidance", logits);
  check_dtype(guidance, "guidance", ScalarType::Float);
  check_shape(guidance, "guidance", "[B, N]", {images, cells});
  check_rows_contiguous(guidance, "guidance");
  check_by_image(temperature, "temperature", logits, ScalarType::Float, images);
  if (top_k.has_value()) check_by_image(*top_k, "top_k", logits, ScalarType::Int, images);
  if (top_p.has_value()) check_by_image(*top_p, "top_p", logits, ScalarType::Float, images);
  check_by_image(seeds, "seeds", logits, ScalarType::Long, images);
  check_written({written(contents, "contents"), written(grid, "grid"), read(logits, "logits"),
                 read(conditional_row, "conditional_row"), read(unconditional_row, "unconditional_row"),
                 read(image, "image"), read(token_index, "token_index"), read(write_index, "write_index"),
                 read(twin_index, "twin_index"), read(guidance, "guidance"), read(temperature, "temperature"),
                 read(top_k, "top_k"), read(top_p, "top_p"), read(seeds, "seeds"), read(positions, "positions")});

  params.guidance = static_cast<const float*>(guidance.const_data_ptr());
  params.temperature = static_cast<const float*>(temperature.const_data_ptr());
  params.top_k = optional_data<int32_t>(top_k);
  params.top_p = optional_data<float>(top_p);
  params.seed = static_cast<const int64_t*>(seeds.const_data_ptr());
  params.guidance_stride = guidance.stride(0);
  params.temperature_stride = temperature.stride(0);
  params.top_k_stride = top_k.has_value() ? top_k->stride(0) : 0;
  params.top_p_stride = top_p.has_value() ? top_p->stride(0) : 0;
  params.seed_stride = seeds.stride(0);
  params.tables = {static_cast<const int64_t*>(image.const_data_ptr()),
                   static_cast<const int64_t*>(token_index.const_data_ptr()),
                   static_cast<const int64_t*>(write_index.const_data_ptr()),
                   static_cast<const int64_t*>(twin_index.const_data_ptr()),
                   static_cast<const int64_t*>(positions.const_data_ptr()),
                   static_cast<int64_t*>(contents.mutable_data_ptr()),
                   static_cast<int64_t*>(grid.mutable_data_ptr()),
                   images,
                   cells,
                   positions.numel()};
  // CUDA kernels look at the tables themselves.
  for (int64_t m = 0; m < tokens && !on_cuda_kernels(logits); ++m) {
    check_step_values(params, m);
    check_sampling_values(params, m);
  }
  const bool on_cuda = on_cuda_kernels(logits);
  Tensor drawn = torch::stable::new_empty(seeds, {on_cuda ? 0 : tokens});
  if (!on_cuda) {  // nothing is written where a token cannot be drawn
    params.tokens = static_cast<int64_t*>(drawn.mutable_data_ptr());
    draw_tokens(logits, params);
  }
  mark_written({written(contents, "contents"), written(grid, "grid")});
  params.tokens = nullptr;
  if (on_cuda) return draw_tokens(logits, params);
  const auto* results = static_cast<const int64_t*>(drawn.const_data_ptr());
  for (int64_t m = 0; m < tokens; ++m) lpd::write_token(params, m, lpd::settings_of(params, m), results[m]);
}

// ---- locality_order ----

Tensor locality_order(const Tensor& group_sizes, int64_t height, int64_t width, double proximity_threshold,
                      int64_t repulsion_threshold, const Tensor& seeds, const OptionalTensor& known) {
  check(height >= 1 && height <= 65536 && width >= 1 && width <= 65536 && height * width <= 65536,
        "height and width must be >= 1 with at most 65536 cells, got ", height, " x ", width);
  check(!std::isnan(proximity_threshold), "proximity_threshold must be a number, got nan");
  check(repulsion_threshold >= 0, "repulsion_threshold must be >= 0, got ", repulsion_threshold);
  check_array(seeds, "seeds", seeds, ScalarType::Long, "[B]", {-1});
  const int64_t batch = seeds.size(0), cells = height * width;
  const bool per_image = group_sizes.dim() == 2;
  if (per_image) {
    check_array(group_sizes, "group_sizes", seeds, ScalarType::Int, "[B, T]", {batch, -1});
  } else {
    check_array(group_sizes, "group_sizes", seeds, ScalarType::Int, "[T]", {-1});
  }
  const int64_t steps = group_sizes.size(group_sizes.dim() - 1);
  if (known.has_value()) check_array(*known, "known", seeds, ScalarType::Bool, "[B, N]", {batch, cells});

  lpd::LocalityOrderParams params{};
  params.group_sizes = static_cast<const int32_t*>(group_sizes.const_data_ptr());
  params.seeds = static_cast<const int64_t*>(seeds.const_data_ptr());
  params.known = optional_data<uint8_t>(known);
  params.group_sizes_stride = per_image ? steps : 0;
  params.batch = size32(batch, "seeds: B");
  params.steps = size32(steps, "group_sizes: T");
  params.height = static_cast<int32_t>(height);
  params.width = static_cast<int32_t>(width);
  params.repulsion_threshold = static_cast<int32_t>(std::min<int64_t>(repulsion_threshold, 65536));
  lpd::set_proximity_threshold(params, proximity_threshold);
  for (int64_t b = 0; b < batch && values_readable(seeds); ++b) {
    int64_t free_cells = cells, sum = 0;
    for (int64_t cell = 0; params.known && cell < cells; ++cell) free_cells -= params.known[b * cells + cell] != 0;
    for (int64_t t = 0; t < steps; ++t) {
      const int32_t size = params.group_sizes[b * params.group_sizes_stride + t];
      check(size >= 0, "group_sizes of image ", b, " contain ", size, "; sizes must be >= 0");
      sum += size;
    }
    check(sum == free_cells, "group_sizes of image ", b, " sum to ", sum, " but it has ", free_cells, " free cells");
  }
  Tensor order = torch::stable::new_empty(seeds, {batch, cells});
  params.order = static_cast<int64_t*>(order.mutable_data_ptr());
  execute(seeds, params, LPD_LAUNCHER(launch_locality_order), lpd::cpu_kernels().locality_order, batch,
          100.0 * static_cast<double>(cells));
  return order;
}

template <class Library>
void register_operators(Library& m) {
  m.impl("group_attention", TORCH_BOX(&group_attention));
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("embed_rows", TORCH_BOX(&embed_rows));
  m.impl("embed_scaled_rows", TORCH_BOX(&embed_scaled_rows));
  m.impl("residual_layer_norm", TORCH_BOX(&residual_layer_norm));
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
  m.impl("sample_step", TORCH_BOX(&sample_step));
  m.impl("locality_order", TORCH_BOX(&locality_order));
}

}  // namespace

LPD_LIBRARY_IMPL(LPD_OPERATOR_NAMESPACE, CPU, m) { register_operators(m); }
#ifdef LPD_WITH_CUDA
LPD_LIBRARY_IMPL(LPD_OPERATOR_NAMESPACE, CUDA, m) { register_operators(m); }
#endif
