// fc1 of lpd_l, whatever the step.
#include "cpu_bench.h"
#include "few_row_layers.h"

namespace lpd::bench {

Work fold_layer_norm_work() {
  struct Data {
    Bfloats weight, gamma, beta, bias;
    Floats slope, shift;
  };
  auto data = std::make_shared<Data>(Data{random_bfloats(kFc1.weights()), random_bfloats(kFc1.depth),
                                          random_bfloats(kFc1.depth), random_bfloats(kFc1.features),
                                          Floats(static_cast<size_t>(kFc1.features)),
                                          Floats(static_cast<size_t>(kFc1.features))});
  FoldLayerNormParams p{};
  p.weight = data->weight.data();
  p.gamma = data->gamma.data();
  p.beta = data->beta.data();
  p.bias = data->bias.data();
  p.slope = data->slope.data();
  p.shift = data->shift.data();
  p.weight_stride = kFc1.depth;
  p.num_features = kFc1.features;
  p.depth = kFc1.depth;
  p.dtype = DType::kBFloat16;
  Work work = make_work(cpu_kernels().fold_layer_norm, p, std::move(data), kFc1.features);
  work.flops = 2 * kFc1.flops(1);
  return work;
}

}  // namespace lpd::bench
