#include "cuda_bench.h"
#include "residual_norm/residual_layer_norm.h"

namespace lpd::bench {
namespace {

void residual_layer_norm(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t rows = 2 * state.range(1) * (shape.num_context + shape.num_query);
  const struct {
    DeviceArray<uint16_t> delta, weight, bias;
  } arrays{random_bf16(rows * kWidth), random_bf16(kWidth), random_bf16(kWidth)};
  const DeviceArray<float> x(std::vector<float>(static_cast<size_t>(rows * kWidth)));
  const DeviceArray<uint16_t> normed(random_bf16(rows * kWidth));
  ResidualLayerNormParams p = residual_layer_norm_params(arrays, rows, kWidth, DType::kBFloat16);
  p.x = x.data();
  p.normed = normed.data();
  const double bytes = static_cast<double>(rows) * kWidth * (4 + 4 + 2 + 2);
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_residual_layer_norm(p, stream); });
}
BENCHMARK(residual_layer_norm)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
