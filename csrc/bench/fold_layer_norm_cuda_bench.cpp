#include "cuda_bench.h"
#include "few_row_layers.h"
#include "layer_norm_folding/fold_layer_norm.h"

namespace lpd::bench {
namespace {

void fold_layer_norm(benchmark::State& state, const Layer& layer) {
  const int turns = layer.weights_in_turn();
  const struct {
    DeviceArray<uint16_t> weight, gamma, beta, bias;
    DeviceArray<float> slope, shift;
  } arrays{random_bf16(turns * layer.weights()),
           random_bf16(layer.depth),
           random_bf16(layer.depth),
           random_bf16(layer.features),
           std::vector<float>(static_cast<size_t>(layer.features)),
           std::vector<float>(static_cast<size_t>(layer.features))};
  FoldLayerNormParams p{};
  p.gamma = arrays.gamma.data();
  p.beta = arrays.beta.data();
  p.bias = arrays.bias.data();
  p.slope = arrays.slope.data();
  p.shift = arrays.shift.data();
  p.weight_stride = layer.depth;
  p.num_features = layer.features;
  p.depth = layer.depth;
  p.dtype = DType::kBFloat16;
  const double bytes = 2.0 * static_cast<double>(layer.weights()) + 4.0 * layer.depth + 10.0 * layer.features;
  int turn = 0;
  const auto next = [&](cudaStream_t stream) {
    p.weight = arrays.weight.data() + turn++ % turns * layer.weights();
    launch_fold_layer_norm(p, stream);
  };
  measure(state, kShapes[0], bytes, next, {turns, 2 * layer.flops(1)});
  state.SetLabel("every step");
}
BENCHMARK_CAPTURE(fold_layer_norm, qkv, kQkv)->Apply(no_shapes);
BENCHMARK_CAPTURE(fold_layer_norm, fc1, kFc1)->Apply(no_shapes);
BENCHMARK_CAPTURE(fold_layer_norm, head, kHead)->Apply(no_shapes);

}  // namespace
}  // namespace lpd::bench
