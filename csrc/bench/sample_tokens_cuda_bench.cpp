#include "cuda_bench.h"
#include "token_sampling/sample_tokens.h"

namespace lpd::bench {
namespace {

void sample_tokens(benchmark::State& state, int32_t top_k, float top_p) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t tokens = state.range(1) * shape.num_query;
  const auto count = static_cast<size_t>(tokens);
  const SampledRows sampled(static_cast<int32_t>(tokens));
  const struct {
    DeviceArray<uint16_t> logits;
    DeviceArray<int32_t> conditional_row, unconditional_row, top_k;
    DeviceArray<float> top_p, guidance, temperature;
    DeviceArray<int64_t> seed, cell, drawn;
  } arrays{random_bf16(2 * tokens * kVocab),
           sampled.conditional_row,
           sampled.unconditional_row,
           std::vector<int32_t>(count, top_k),
           std::vector<float>(count, top_p),
           std::vector<float>(count, 4.8f),
           std::vector<float>(count, 1.0f),
           sampled.cell,
           sampled.cell,
           sampled.cell};
  SampleTokensParams p = sample_tokens_params(arrays, tokens, kVocab, top_k > 0, top_p < 1, DType::kBFloat16);
  p.tokens = arrays.drawn.data();
  const double bytes = static_cast<double>(tokens) * 2 * 2 * kVocab;
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_sample_tokens(p, stream); });
}
BENCHMARK_CAPTURE(sample_tokens, all, 0, 1.0f)->Apply(all_shapes);
BENCHMARK_CAPTURE(sample_tokens, k_900_p_095, 900, 0.95f)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
