#include "cuda_bench.h"
#include "few_row_layers.h"
#include "residual_linear/residual_linear.h"

namespace lpd::bench {
namespace {

void residual_linear(benchmark::State& state, const Layer& layer) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t rows = rows_of(shape, state.range(1));
  const int turns = layer.weights_in_turn();
  const auto results = static_cast<size_t>(rows * layer.features);
  // Rows of 0, so that x does not grow from launch to launch.
  const struct {
    DeviceArray<uint16_t> rows, weight, bias, scale, scaled;
    DeviceArray<float> x, statistics;
  } arrays{std::vector<uint16_t>(static_cast<size_t>(rows * layer.depth)),
           random_bf16(turns * layer.weights()),
           std::vector<uint16_t>(static_cast<size_t>(layer.features)),
           random_bf16(layer.features),
           std::vector<uint16_t>(results),
           std::vector<float>(results, 1.0f),
           std::vector<float>(results / kStatisticsColumns * 2)};
  ResidualLinearParams p{};
  static_cast<FewRowProduct&>(p) =
      few_row_product(arrays, static_cast<int32_t>(rows), layer.features, layer.depth, DType::kBFloat16);
  p.x = arrays.x.data();
  p.bias = arrays.bias.data();
  p.scale = arrays.scale.data();
  p.scaled = arrays.scaled.data();
  p.statistics = arrays.statistics.data();
  p.x_stride = layer.features;
  const double bytes = 2.0 * static_cast<double>(layer.weights()) + 4.0 * layer.features +
                       static_cast<double>(rows) * (2.0 * layer.depth + (4 + 4 + 2 + 0.25) * layer.features);
  int turn = 0;
  const auto next = [&](cudaStream_t stream) {
    p.weight = arrays.weight.data() + turn++ % turns * layer.weights();
    launch_residual_linear(p, stream);
  };
  measure(state, shape, bytes, next, {turns, layer.flops(rows)});
}
BENCHMARK_CAPTURE(residual_linear, proj, kProj)->Apply(all_shapes);
BENCHMARK_CAPTURE(residual_linear, fc2, kFc2)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
