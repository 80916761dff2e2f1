#include "cpu_bench.h"

namespace lpd::bench {

Work append_kv_work(const Shape& shape, int32_t batch) {
  const int32_t sequences = 2 * batch;
  const int64_t rows = int64_t{sequences} * (shape.num_context + shape.num_query);
  const int64_t cache_size = int64_t{sequences} * shape.cache_positions * kWidth;
  struct Data {
    Floats qkv, k_cache, v_cache;
    std::vector<int32_t> segments;
  };
  auto data = std::make_shared<Data>(Data{random_floats(rows * 3 * kWidth), random_floats(cache_size),
                                          random_floats(cache_size), make_segments(shape, sequences)});
  AppendKvParams p{};
  p.qkv = data->qkv.data();
  p.k_cache = data->k_cache.data();
  p.v_cache = data->v_cache.data();
  p.segments = reinterpret_cast<const Segment*>(data->segments.data());
  p.qkv_row_stride = 3 * kWidth;
  p.qkv_part_stride = kWidth;
  p.qkv_head_stride = kHeadDim;
  p.cache_slot_stride = int64_t{shape.cache_positions} * kWidth;
  p.cache_head_stride = int64_t{shape.cache_positions} * kHeadDim;
  p.cache_position_stride = kHeadDim;
  p.num_segments = sequences;
  p.num_heads = kHeads;
  p.head_dim = kHeadDim;
  p.max_rows = shape.num_context + shape.num_query;
  p.dtype = DType::kFloat32;
  Work work = make_work(cpu_kernels().append_kv, p, std::move(data), append_kv_items(p));
  work.bytes = 4.0 * 2 * 2 * kWidth * sequences * shape.num_context;  // K and V, read and written
  return work;
}

}  // namespace lpd::bench
