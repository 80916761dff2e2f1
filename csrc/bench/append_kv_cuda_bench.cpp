#include "cuda_bench.h"
#include "kv_cache/append_kv.h"

namespace lpd::bench {
namespace {

void append_kv(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const auto sequences = static_cast<int32_t>(2 * state.range(1));
  const int64_t rows = int64_t{sequences} * (shape.num_context + shape.num_query);
  const int64_t positions = shape.cache_length + shape.num_context;
  const DeviceArray<uint16_t> qkv(random_bf16(rows * 3 * kWidth));
  const DeviceArray<uint16_t> k_cache(random_bf16(sequences * positions * kWidth));
  const DeviceArray<uint16_t> v_cache(random_bf16(sequences * positions * kWidth));
  const DeviceArray<int32_t> segments(make_segments(shape, sequences));
  AppendKvParams p{};
  p.qkv = qkv.get();
  p.k_cache = k_cache.get();
  p.v_cache = v_cache.get();
  p.segments = reinterpret_cast<const Segment*>(segments.get());
  p.qkv_row_stride = 3 * kWidth;
  p.qkv_part_stride = kWidth;
  p.qkv_head_stride = kHeadDim;
  p.cache_slot_stride = positions * kWidth;
  p.cache_head_stride = positions * kHeadDim;
  p.cache_position_stride = kHeadDim;
  p.num_segments = sequences;
  p.num_heads = kHeads;
  p.head_dim = kHeadDim;
  p.max_rows = shape.num_context + shape.num_query;
  p.dtype = DType::kBFloat16;
  const double bytes = 2.0 * 2 * 2 * kWidth * sequences * shape.num_context;  // K and V, read and written
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_append_kv(p, stream); });
}
BENCHMARK(append_kv)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
