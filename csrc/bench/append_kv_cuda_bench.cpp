#include "cuda_bench.h"
#include "kv_cache/append_kv.h"

namespace lpd::bench {
namespace {

void append_kv(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const auto sequences = static_cast<int32_t>(2 * state.range(1));
  const int64_t rows = int64_t{sequences} * (shape.num_context + shape.num_query);
  const int32_t positions = shape.cache_length + shape.num_context;
  const int64_t cache_size = int64_t{sequences} * positions * kWidth;
  const struct {
    DeviceArray<uint16_t> qkv, k_cache, v_cache;
    DeviceArray<Segment> segments;
  } arrays{random_bf16(rows * 3 * kWidth), random_bf16(cache_size), random_bf16(cache_size),
           make_segments(shape, sequences)};
  AppendKvParams p = cache_rows(arrays, {sequences, kHeads, kHeadDim, positions}, shape.num_context + shape.num_query,
                                DType::kBFloat16);
  p.k_cache = arrays.k_cache.data();
  p.v_cache = arrays.v_cache.data();
  const double bytes = 2.0 * 2 * 2 * kWidth * sequences * shape.num_context;  // K and V, read and written
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_append_kv(p, stream); });
}
BENCHMARK(append_kv)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
