#include "cpu_bench.h"
#include "step_tables.h"

namespace lpd::bench {
namespace {

Work make(const Shape& shape, int32_t batch, bool filters) {
  struct Data : StepTablesData {
    using StepTablesData::StepTablesData;
    Floats logits;
    std::vector<int32_t> conditional_row, unconditional_row;
    std::vector<int64_t> cell;
  };
  auto data = std::make_shared<Data>(shape, batch);
  const int32_t tokens = batch * shape.num_query;
  const SampledRows sampled(tokens);
  data->logits = random_floats(int64_t{2} * tokens * kVocab);
  data->conditional_row = sampled.conditional_row;
  data->unconditional_row = sampled.unconditional_row;
  data->cell = sampled.cell;
  SampleTokensParams p = sample_step_params(*data, *data, filters, DType::kFloat32);
  p.tables.contents = data->contents.data();
  p.tables.grid = data->grid.data();
  Work work = make_work(cpu_kernels().sample_tokens, p, std::move(data), tokens);
  work.bytes = static_cast<double>(tokens) * (2.0 * 4 * kVocab + 8 + 5 * 8 + 12 + 8 + 3 * 8);
  return work;
}

}  // namespace

Work sample_step_work(const Shape& shape, int32_t batch) { return make(shape, batch, false); }
Work sample_step_filtered_work(const Shape& shape, int32_t batch) { return make(shape, batch, true); }

}  // namespace lpd::bench
