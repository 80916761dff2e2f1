#include "cpu_bench.h"

namespace lpd::bench {

Work group_attention_work(const Shape& shape, int32_t batch) {
  const int32_t sequences = 2 * batch;
  const int32_t rows_per_sequence = shape.num_context + shape.num_query;
  const int64_t rows = int64_t{sequences} * rows_per_sequence;
  const int64_t cache_size = int64_t{sequences} * shape.cache_positions * kWidth;
  struct Data {
    Floats qkv, k_cache, v_cache, output;
    std::vector<Segment> segments;
  };
  auto data = std::make_shared<Data>(Data{random_floats(rows * 3 * kWidth), random_floats(cache_size),
                                          random_floats(cache_size), Floats(static_cast<size_t>(rows * kWidth)),
                                          make_segments(shape, sequences)});
  GroupAttentionParams p = group_attention_params(
      cache_rows(*data, {sequences, kHeads, kHeadDim, shape.cache_positions}, rows_per_sequence, DType::kFloat32),
      shape.cache_length + rows_per_sequence, 0.125f);
  p.k_cache = data->k_cache.data();
  p.v_cache = data->v_cache.data();
  p.output = data->output.data();
  Work work = make_work(cpu_kernels().group_attention, p, std::move(data), group_attention_items(p));
  // Q and output, K and V of this step, K and V appended, K and V of the cache.
  const double moved = 4.0 * rows_per_sequence + 2.0 * shape.num_context + 2.0 * shape.cache_length;
  work.bytes = 4.0 * kWidth * sequences * moved;
  // Two products, each of a multiplication and an addition for every visible pair of row and key.
  const double shared = shape.cache_length + shape.num_context;
  work.flops = 4.0 * kWidth * sequences * (shape.num_context * shared + shape.num_query * (shared + shape.num_query));
  return work;
}

}  // namespace lpd::bench
