#include "cuda_bench.h"
#include "row_embedding/embed_rows.h"

namespace lpd::bench {
namespace {

void embed_rows(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t rows = 2 * state.range(1) * (shape.num_context + shape.num_query);
  const int64_t contents = kVocab + kClasses, positions = 1 + shape.schedule().height * shape.schedule().width;
  const struct {
    DeviceArray<int64_t> content_ids, positions;
    DeviceArray<uint16_t> content, position_embedding, weight, bias;
  } arrays{random_ids<int64_t>(rows, contents),
           random_ids<int64_t>(rows, positions),
           random_bf16(contents * kWidth),
           random_bf16(positions * kWidth),
           random_bf16(kWidth),
           random_bf16(kWidth)};
  const DeviceArray<float> x(std::vector<float>(static_cast<size_t>(rows * kWidth)));
  EmbedRowsParams p = embed_rows_params(arrays, rows, contents, positions, kWidth, DType::kBFloat16);
  p.x = x.data();
  const double bytes = static_cast<double>(rows) * (16 + kWidth * (2 + 2 + 4));
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_embed_rows(p, stream); });
}
BENCHMARK(embed_rows)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
