#include "cpu_bench.h"

namespace lpd::bench {

Work append_kv_work(const Shape& shape, int32_t batch) {
  const int32_t sequences = 2 * batch;
  const int64_t rows = int64_t{sequences} * (shape.num_context + shape.num_query);
  const int64_t cache_size = int64_t{sequences} * shape.cache_positions * kWidth;
  struct Data {
    Floats qkv, k_cache, v_cache;
    std::vector<Segment> segments;
  };
  auto data = std::make_shared<Data>(Data{random_floats(rows * 3 * kWidth), random_floats(cache_size),
                                          random_floats(cache_size), make_segments(shape, sequences)});
  AppendKvParams p = cache_rows(*data, {sequences, kHeads, kHeadDim, shape.cache_positions},
                                shape.num_context + shape.num_query, DType::kFloat32);
  p.k_cache = data->k_cache.data();
  p.v_cache = data->v_cache.data();
  Work work = make_work(cpu_kernels().append_kv, p, std::move(data), append_kv_items(p));
  work.bytes = 4.0 * 2 * 2 * kWidth * sequences * shape.num_context;  // K and V, read and written
  return work;
}

}  // namespace lpd::bench
