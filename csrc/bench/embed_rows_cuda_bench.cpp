#include "cuda_bench.h"
#include "row_embedding/embed_rows.h"

namespace lpd::bench {
namespace {

void embed_rows(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t rows = 2 * state.range(1) * (shape.num_context + shape.num_query);
  const int64_t contents = kVocab + kClasses, positions = 1 + shape.schedule().height * shape.schedule().width;
  const DeviceArray<int64_t> content_ids(random_ids<int64_t>(rows, contents));
  const DeviceArray<int64_t> position_ids(random_ids<int64_t>(rows, positions));
  const DeviceArray<uint16_t> content(random_bf16(contents * kWidth));
  const DeviceArray<uint16_t> position_embedding(random_bf16(positions * kWidth));
  const DeviceArray<uint16_t> weight(random_bf16(kWidth)), bias(random_bf16(kWidth));
  const DeviceArray<float> x(std::vector<float>(static_cast<size_t>(rows * kWidth)));
  EmbedRowsParams p{};
  p.content_ids = content_ids.get();
  p.positions = position_ids.get();
  p.content = content.get();
  p.position_embedding = position_embedding.get();
  p.weight = weight.get();
  p.bias = bias.get();
  p.x = x.get();
  p.content_stride = p.position_stride = kWidth;
  p.num_rows = rows;
  p.num_contents = contents;
  p.num_positions = positions;
  p.width = kWidth;
  p.eps = 1e-6f;
  p.dtype = DType::kBFloat16;
  const double bytes = static_cast<double>(rows) * (16 + kWidth * (2 + 2 + 4));
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_embed_rows(p, stream); });
}
BENCHMARK(embed_rows)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
