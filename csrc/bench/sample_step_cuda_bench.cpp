#include "cuda_bench.h"
#include "step_tables.h"
#include "token_sampling/sample_tokens.h"

namespace lpd::bench {
namespace {

void sample_step(benchmark::State& state, bool filters) {
  const Shape& shape = kShapes[state.range(0)];
  const auto batch = static_cast<int32_t>(state.range(1));
  const StepTablesData tables(shape, batch);
  const int32_t tokens = batch * shape.num_query;
  const SampledRows sampled(tokens);
  const struct {
    DeviceArray<uint16_t> logits;
    DeviceArray<int32_t> conditional_row, unconditional_row, top_k;
    DeviceArray<float> guidance, temperature, top_p;
    DeviceArray<int64_t> seed, cell, image, token_index, write_index, twin_index, positions, contents, grid;
  } arrays{random_bf16(int64_t{2} * tokens * kVocab),
           sampled.conditional_row,
           sampled.unconditional_row,
           tables.top_k,
           tables.guidance,
           tables.temperature,
           tables.top_p,
           tables.seed,
           sampled.cell,
           tables.image,
           tables.token_index,
           tables.write_index,
           tables.twin_index,
           tables.positions,
           tables.contents,
           tables.grid};
  SampleTokensParams p = sample_step_params(arrays, tables, filters, DType::kBFloat16);
  p.tables.contents = arrays.contents.data();
  p.tables.grid = arrays.grid.data();
  // Logits, and of each token its rows, indices, position and settings, and three writes.
  const double bytes = static_cast<double>(tokens) * (2.0 * 2 * kVocab + 8 + 5 * 8 + 12 + 8 + 3 * 8);
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_sample_tokens(p, stream); });
}
BENCHMARK_CAPTURE(sample_step, all, false)->Apply(all_shapes);
BENCHMARK_CAPTURE(sample_step, k_900_p_095, true)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
