#include "cuda_bench.h"
#include "token_sampling/sample_tokens.h"

namespace lpd::bench {
namespace {

void sample_tokens(benchmark::State& state, int32_t top_k, float top_p) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t tokens = state.range(1) * shape.num_query;
  const auto count = static_cast<size_t>(tokens);
  const DeviceArray<uint16_t> logits(random_bf16(2 * tokens * kVocab));
  std::vector<int32_t> conditional, unconditional;
  std::vector<int64_t> ids;
  for (int32_t m = 0; m < tokens; ++m) {
    conditional.push_back(m);
    unconditional.push_back(static_cast<int32_t>(tokens) + m);
    ids.push_back(m);
  }
  const DeviceArray<int32_t> conditional_row(conditional), unconditional_row(unconditional);
  const DeviceArray<int32_t> ks(std::vector<int32_t>(count, top_k));
  const DeviceArray<float> ps(std::vector<float>(count, top_p));
  const DeviceArray<float> guidance(std::vector<float>(count, 4.8f)), temperature(std::vector<float>(count, 1.0f));
  const DeviceArray<int64_t> seed(ids), cell(ids), drawn(ids);
  SampleTokensParams p{};
  p.logits = logits.get();
  p.conditional_row = conditional_row.get();
  p.unconditional_row = unconditional_row.get();
  p.guidance = guidance.get();
  p.temperature = temperature.get();
  p.top_k = top_k > 0 ? ks.get() : nullptr;
  p.top_p = top_p < 1 ? ps.get() : nullptr;
  p.seed = seed.get();
  p.cell = cell.get();
  p.tokens = drawn.get();
  p.logits_stride = kVocab;
  p.num_tokens = tokens;
  p.vocab_size = kVocab;
  p.dtype = DType::kBFloat16;
  const double bytes = static_cast<double>(tokens) * 2 * 2 * kVocab;
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_sample_tokens(p, stream); });
}
BENCHMARK_CAPTURE(sample_tokens, all, 0, 1.0f)->Apply(all_shapes);
BENCHMARK_CAPTURE(sample_tokens, k_900_p_095, 900, 0.95f)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
