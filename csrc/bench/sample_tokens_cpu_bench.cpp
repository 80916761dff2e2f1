#include "cpu_bench.h"

namespace lpd::bench {
namespace {

Work make(const Shape& shape, int32_t batch, int32_t top_k, float top_p) {
  const int64_t tokens = int64_t{batch} * shape.num_query;
  const auto count = static_cast<size_t>(tokens);
  struct Data {
    Floats logits;
    std::vector<int32_t> conditional_row, unconditional_row, top_k;
    std::vector<float> top_p, guidance, temperature;
    std::vector<int64_t> seed, cell, drawn;
  };
  auto data = std::make_shared<Data>();
  data->logits = random_floats(2 * tokens * kVocab);
  const SampledRows sampled(static_cast<int32_t>(tokens));
  data->conditional_row = sampled.conditional_row;
  data->unconditional_row = sampled.unconditional_row;
  data->seed = data->cell = data->drawn = sampled.cell;
  data->top_k.assign(count, top_k);
  data->top_p.assign(count, top_p);
  data->guidance.assign(count, 4.8f);
  data->temperature.assign(count, 1.0f);
  SampleTokensParams p = sample_tokens_params(*data, tokens, kVocab, top_k > 0, top_p < 1, DType::kFloat32);
  p.tokens = data->drawn.data();
  Work work = make_work(cpu_kernels().sample_tokens, p, std::move(data), tokens);
  work.bytes = static_cast<double>(tokens) * 2 * 4 * kVocab;
  return work;
}

}  // namespace

Work sample_tokens_work(const Shape& shape, int32_t batch) { return make(shape, batch, 0, 1.0f); }
Work sample_tokens_filtered_work(const Shape& shape, int32_t batch) { return make(shape, batch, 900, 0.95f); }

}  // namespace lpd::bench
