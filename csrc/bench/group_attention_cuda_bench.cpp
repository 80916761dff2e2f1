#include "cuda_bench.h"
#include "group_attention/group_attention.h"

namespace lpd::bench {
namespace {

void group_attention(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const auto sequences = static_cast<int32_t>(2 * state.range(1));
  const int32_t rows_per_sequence = shape.num_context + shape.num_query;
  const int64_t rows = int64_t{sequences} * rows_per_sequence;
  const int32_t positions = shape.cache_length + shape.num_context;
  const int64_t cache_size = int64_t{sequences} * positions * kWidth;
  const struct {
    DeviceArray<uint16_t> qkv, k_cache, v_cache, output;
    DeviceArray<Segment> segments;
  } arrays{random_bf16(rows * 3 * kWidth), random_bf16(cache_size), random_bf16(cache_size), random_bf16(rows * kWidth),
           make_segments(shape, sequences)};
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const int64_t workspace_bytes = group_attention_workspace_bytes(kHeadDim, multiprocessors);
  const DeviceArray<uint8_t> workspace(std::vector<uint8_t>(static_cast<size_t>(workspace_bytes)));
  GroupAttentionParams p = group_attention_params(
      cache_rows(arrays, {sequences, kHeads, kHeadDim, positions}, rows_per_sequence, DType::kBFloat16),
      shape.cache_length + rows_per_sequence, 0.125f);
  p.k_cache = arrays.k_cache.data();
  p.v_cache = arrays.v_cache.data();
  p.output = arrays.output.data();
  p.workspace = workspace.data();
  p.workspace_bytes = workspace_bytes;
  // Q and output, K and V of this step, K and V appended, K and V of the cache.
  const double per_sequence = 4.0 * rows_per_sequence + 2.0 * shape.num_context + 2.0 * shape.cache_length;
  measure(state, shape, 2.0 * kWidth * sequences * per_sequence,
          [&](cudaStream_t stream) { launch_group_attention(p, stream); });
}
BENCHMARK(group_attention)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
