#include "cuda_bench.h"
#include "group_attention/group_attention.h"

namespace lpd::bench {
namespace {

void group_attention(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const auto sequences = static_cast<int32_t>(2 * state.range(1));
  const int64_t rows_per_sequence = shape.num_context + shape.num_query, rows = sequences * rows_per_sequence;
  const int64_t positions = shape.cache_length + shape.num_context;
  const DeviceArray<uint16_t> qkv(random_bf16(rows * 3 * kWidth));
  const DeviceArray<uint16_t> k_cache(random_bf16(sequences * positions * kWidth));
  const DeviceArray<uint16_t> v_cache(random_bf16(sequences * positions * kWidth));
  const DeviceArray<uint16_t> output(std::vector<uint16_t>(static_cast<size_t>(rows * kWidth)));
  const DeviceArray<int32_t> segments(make_segments(shape, sequences));
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const int64_t workspace_bytes = group_attention_workspace_bytes(kHeadDim, multiprocessors);
  const DeviceArray<uint8_t> workspace(std::vector<uint8_t>(static_cast<size_t>(workspace_bytes)));
  GroupAttentionParams p{};
  p.qkv = qkv.get();
  p.k_cache = k_cache.get();
  p.v_cache = v_cache.get();
  p.output = output.get();
  p.segments = reinterpret_cast<const Segment*>(segments.get());
  p.workspace = workspace.get();
  p.workspace_bytes = workspace_bytes;
  p.qkv_row_stride = 3 * kWidth;
  p.qkv_part_stride = kWidth;
  p.qkv_head_stride = kHeadDim;
  p.cache_slot_stride = positions * kWidth;
  p.cache_head_stride = positions * kHeadDim;
  p.cache_position_stride = kHeadDim;
  p.num_segments = sequences;
  p.num_heads = kHeads;
  p.head_dim = kHeadDim;
  p.max_rows = static_cast<int32_t>(rows_per_sequence);
  p.max_keys = static_cast<int32_t>(shape.cache_length + rows_per_sequence);
  p.scale = 0.125f;
  p.dtype = DType::kBFloat16;
  // Q and output, K and V of this step, K and V appended, K and V of the cache.
  const double per_sequence = 4.0 * rows_per_sequence + 2.0 * shape.num_context + 2.0 * shape.cache_length;
  measure(state, shape, 2.0 * kWidth * sequences * per_sequence,
          [&](cudaStream_t stream) { launch_group_attention(p, stream); });
}
BENCHMARK(group_attention)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
