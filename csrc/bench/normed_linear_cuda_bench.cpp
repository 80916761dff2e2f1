#include "cuda_bench.h"
#include "few_row_layers.h"
#include "normed_linear/normed_linear.h"

namespace lpd::bench {
namespace {

void normed_linear(benchmark::State& state, const Layer& layer) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t rows = rows_of(shape, state.range(1));
  const int turns = layer.weights_in_turn();
  const struct {
    DeviceArray<uint16_t> rows, weight, output;
    DeviceArray<float> statistics, slope, shift;
  } arrays{random_bf16(rows * layer.depth),
           random_bf16(turns * layer.weights()),
           random_bf16(rows * layer.features),
           std::vector<float>(static_cast<size_t>(rows * layer.depth / 32 * 2), 1.0f),
           std::vector<float>(static_cast<size_t>(layer.features), 0.5f),
           std::vector<float>(static_cast<size_t>(layer.features), 0.5f)};
  NormedLinearParams p{};
  static_cast<FewRowProduct&>(p) =
      few_row_product(arrays, static_cast<int32_t>(rows), layer.features, layer.depth, DType::kBFloat16);
  p.statistics = arrays.statistics.data();
  p.slope = arrays.slope.data();
  p.shift = arrays.shift.data();
  p.output = arrays.output.data();
  p.eps = 1e-6f;
  p.gelu = layer.gelu;
  const double bytes = 2.0 * static_cast<double>(layer.weights()) + 8.0 * layer.features +
                       static_cast<double>(rows) * (2.0 * (layer.depth + layer.features) + layer.depth / 4.0);
  int turn = 0;
  const auto next = [&](cudaStream_t stream) {
    p.weight = arrays.weight.data() + turn++ % turns * layer.weights();
    launch_normed_linear(p, stream);
  };
  measure(state, shape, bytes, next, {turns, layer.flops(rows)});
}
BENCHMARK_CAPTURE(normed_linear, qkv, kQkv)->Apply(all_shapes);
BENCHMARK_CAPTURE(normed_linear, fc1, kFc1)->Apply(all_shapes);
BENCHMARK_CAPTURE(normed_linear, head, kHead)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
