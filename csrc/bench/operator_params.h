// Params of the operators, for the microbenchmarks and the tests' kernel_driver. Arrays have the names of the params
// and a data(); their rows are contiguous but for `padding` elements after each where a stride can be given. What an
// operator writes to, caches included, is left to the caller.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/segment.h"
#include "group_attention/group_attention.h"
#include "kv_cache/cache_rows.h"
#include "layer_norm_folding/fold_layer_norm.h"
#include "locality_order/locality_order.h"
#include "normed_linear/normed_linear.h"
#include "residual_linear/residual_linear.h"
#include "residual_norm/residual_layer_norm.h"
#include "row_embedding/embed_rows.h"
#include "token_sampling/sample_tokens.h"

namespace lpd::bench {

struct SequenceSizes {
  int32_t num_context, num_query, cache_length;
};

// Segments of a step, a slot each: the context rows of all sequences from `first_row` on, then their query rows.
inline std::vector<Segment> make_segments(const std::vector<SequenceSizes>& sequences, int32_t first_row = 0) {
  std::vector<Segment> segments;
  int32_t context = first_row, query = first_row, slot = 0;
  for (const SequenceSizes& sizes : sequences) query += sizes.num_context;
  for (const SequenceSizes& sizes : sequences) {
    segments.push_back({context, sizes.num_context, query, sizes.num_query, sizes.cache_length, slot++});
    context += sizes.num_context;
    query += sizes.num_query;
  }
  return segments;
}

struct CacheSizes {
  int32_t num_segments, num_heads, head_dim, positions;
};

template <class Arrays>
CacheRows cache_rows(const Arrays& arrays, const CacheSizes& sizes, int32_t max_rows, DType dtype,
                     int64_t padding = 0) {
  CacheRows p{};
  p.qkv = arrays.qkv.data();
  p.segments = arrays.segments.data();
  p.qkv_part_stride = int64_t{sizes.num_heads} * sizes.head_dim;
  p.qkv_row_stride = 3 * p.qkv_part_stride + padding;
  p.qkv_head_stride = sizes.head_dim;
  p.cache_position_stride = sizes.head_dim + padding;
  p.cache_head_stride = sizes.positions * p.cache_position_stride;
  p.cache_slot_stride = sizes.num_heads * p.cache_head_stride;
  p.num_segments = sizes.num_segments;
  p.num_heads = sizes.num_heads;
  p.head_dim = sizes.head_dim;
  p.max_rows = max_rows;
  p.dtype = dtype;
  return p;
}

inline GroupAttentionParams group_attention_params(const CacheRows& rows, int32_t max_keys, float scale) {
  GroupAttentionParams p{};
  static_cast<CacheRows&>(p) = rows;
  p.max_keys = max_keys;
  p.scale = scale;
  return p;
}

template <class Arrays>
EmbedRowsParams embed_rows_params(const Arrays& arrays, int64_t rows, int64_t contents, int64_t positions,
                                  int32_t width, DType dtype, int64_t padding = 0) {
  EmbedRowsParams p{};
  p.content_ids = arrays.content_ids.data();
  p.positions = arrays.positions.data();
  p.content = arrays.content.data();
  p.position_embedding = arrays.position_embedding.data();
  p.weight = arrays.weight.data();
  p.bias = arrays.bias.data();
  p.content_stride = p.position_stride = width + padding;
  p.num_rows = rows;
  p.num_content_ids = p.num_position_ids = rows;
  p.num_contents = contents;
  p.num_positions = positions;
  p.width = width;
  p.eps = 1e-6f;
  p.dtype = dtype;
  return p;
}

template <class Arrays>
ResidualLayerNormParams residual_layer_norm_params(const Arrays& arrays, int64_t rows, int32_t width, DType dtype,
                                                   int64_t padding = 0) {
  ResidualLayerNormParams p{};
  p.delta = arrays.delta.data();
  p.weight = arrays.weight.data();
  p.bias = arrays.bias.data();
  p.x_stride = p.delta_stride = width + padding;
  p.num_rows = rows;
  p.width = width;
  p.eps = 1e-6f;
  p.dtype = dtype;
  return p;
}

template <class Arrays>
FewRowProduct few_row_product(const Arrays& arrays, int32_t rows, int32_t features, int32_t depth, DType dtype,
                              int64_t padding = 0) {
  return {arrays.rows.data(), arrays.weight.data(), depth + padding, depth + padding, rows, features, depth, dtype};
}

// Token m in cell m, from logits of row m and, with guidance, of row `tokens` + m.
struct SampledRows {
  explicit SampledRows(int32_t tokens) {
    for (int32_t m = 0; m < tokens; ++m) {
      conditional_row.push_back(m);
      unconditional_row.push_back(tokens + m);
      cell.push_back(m);
    }
  }
  std::vector<int32_t> conditional_row, unconditional_row;
  std::vector<int64_t> cell;
};

template <class Arrays>
SampleTokensParams sample_tokens_params(const Arrays& arrays, int64_t tokens, int32_t vocab_size, bool by_rank,
                                        bool by_weight, DType dtype, int64_t padding = 0) {
  SampleTokensParams p{};
  p.logits = arrays.logits.data();
  p.conditional_row = arrays.conditional_row.data();
  p.unconditional_row = arrays.unconditional_row.data();
  p.guidance = arrays.guidance.data();
  p.temperature = arrays.temperature.data();
  p.top_k = by_rank ? arrays.top_k.data() : nullptr;
  p.top_p = by_weight ? arrays.top_p.data() : nullptr;
  p.seed = arrays.seed.data();
  p.cell = arrays.cell.data();
  p.logits_stride = vocab_size + padding;
  p.num_rows = 2 * int64_t{tokens};
  p.guidance_stride = p.temperature_stride = p.top_k_stride = p.top_p_stride = p.seed_stride = 1;
  p.num_tokens = tokens;
  p.vocab_size = vocab_size;
  p.dtype = dtype;
  return p;
}

struct GridSizes {
  int32_t height, width, steps, repulsion_threshold;
};

template <class Arrays>
LocalityOrderParams locality_order_params(const Arrays& arrays, int32_t batch, const GridSizes& sizes) {
  LocalityOrderParams p{};
  p.group_sizes = arrays.group_sizes.data();
  p.seeds = arrays.seeds.data();
  p.batch = batch;
  p.steps = sizes.steps;
  p.height = sizes.height;
  p.width = sizes.width;
  p.repulsion_threshold = sizes.repulsion_threshold;
  set_proximity_threshold(p, 1.0);
  return p;
}

}  // namespace lpd::bench
