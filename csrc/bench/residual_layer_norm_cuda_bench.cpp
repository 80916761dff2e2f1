#include "cuda_bench.h"
#include "residual_norm/residual_layer_norm.h"

namespace lpd::bench {
namespace {

void residual_layer_norm(benchmark::State& state) {
  const Shape& shape = kShapes[state.range(0)];
  const int64_t rows = 2 * state.range(1) * (shape.num_context + shape.num_query);
  const DeviceArray<float> x(std::vector<float>(static_cast<size_t>(rows * kWidth)));
  const DeviceArray<uint16_t> delta(random_bf16(rows * kWidth)), normed(random_bf16(rows * kWidth));
  const DeviceArray<uint16_t> weight(random_bf16(kWidth)), bias(random_bf16(kWidth));
  ResidualLayerNormParams p{};
  p.x = x.get();
  p.delta = delta.get();
  p.weight = weight.get();
  p.bias = bias.get();
  p.normed = normed.get();
  p.x_stride = p.delta_stride = kWidth;
  p.num_rows = rows;
  p.width = kWidth;
  p.eps = 1e-6f;
  p.dtype = DType::kBFloat16;
  const double bytes = static_cast<double>(rows) * kWidth * (4 + 4 + 2 + 2);
  measure(state, shape, bytes, [&](cudaStream_t stream) { launch_residual_layer_norm(p, stream); });
}
BENCHMARK(residual_layer_norm)->Apply(all_shapes);

}  // namespace
}  // namespace lpd::bench
